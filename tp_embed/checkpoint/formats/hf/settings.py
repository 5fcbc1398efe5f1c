"""Copies the settings in a Hugging Face directory: ``config.json``, the tokenizer and similar
files, but no code."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from ...contents import Checkpoint, Target
from ...errors import CheckpointError, UnsafeCheckpointError
from ...files.text_files import read_json, write_json

CONFIG = "config.json"

# Files with one of these names and one of these suffixes are copied.
_SETTINGS = (
    CONFIG,
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
_ENDINGS = (".json", ".txt", ".model", ".tiktoken", ".jinja")
_MAX_SETTINGS_BYTES = 256 * 2**20  # In total.


def copy_settings(checkpoint: Checkpoint, target: Target, path: Path) -> None:
    """Copies the settings to ``path`` and adapts ``config.json`` to the weights. Keeps existing
    files."""
    directory = target.hf_config
    if directory is None and checkpoint.format == "hf" and checkpoint.path.is_dir():
        directory = checkpoint.path
    if directory is None:
        return
    if target.hf_config is not None and not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"`--hf-config` must be a directory with `{CONFIG}`, but `{directory}` has none."
        )
    settings = settings_of(directory)
    size = sum(_checked(directory, file).stat().st_size for file in settings)
    if size > _MAX_SETTINGS_BYTES:
        raise CheckpointError(
            f"The settings in `{directory}` must have at most {_MAX_SETTINGS_BYTES} bytes in "
            f"total, but have {size}. Move away files that belong to no configuration or tokenizer."
        )
    for file in settings:
        copy = path / file.name
        if not copy.exists():
            temporary = path / f".{file.name}.layout"
            shutil.copyfile(file, temporary)
            if file.name == CONFIG:
                _adapt_config(temporary, checkpoint, target)
            temporary.replace(copy)


def settings_of(directory: Path) -> list[Path]:
    """Lists the files of ``directory`` that hold settings of a model or a tokenizer."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.suffix in _ENDINGS and any(fnmatchcase(file.name, name) for name in _SETTINGS)
    )


def _checked(directory: Path, file: Path) -> Path:
    """Checks that copying ``file`` leaks nothing from outside ``directory``. In the hub's cache,
    links to its blobs are allowed.

    :raises UnsafeCheckpointError: ``file`` links to a file elsewhere.
    """
    if not file.is_file():
        raise CheckpointError(f"`{file}` must be a regular file, but is not. Remove it.")
    root = directory.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(file.resolve().is_relative_to(each) for each in roots):
        raise UnsafeCheckpointError(
            f"`{file}` must be a file in `{directory}`, but is a link to `{file.resolve()}`. "
            "Replace it with a copy, or remove it."
        )
    return file


def _adapt_config(path: Path, checkpoint: Checkpoint, target: Target) -> None:
    """Adapts dtype and ``vocab_size`` in the ``config.json`` at ``path`` to the checkpoint."""
    config = read_json(path)
    changes: list[tuple[dict[str, Any], str, Any]] = []
    sizes: Counter[torch.dtype] = Counter()
    for array in checkpoint.tensors.values():
        if array.dtype.is_floating_point and array.dtype.itemsize > 1:  # Others are quantized.
            sizes[array.dtype] += array.numel
    for dtype, _ in sizes.most_common(1):
        changes += [
            (section, key, str(dtype).removeprefix("torch."))
            for section in _sections(config)
            for key in ("dtype", "torch_dtype")
            if isinstance(section.get(key), str)
        ]
    rows = {checkpoint.shape(name)[0] for name in target.tables if checkpoint.shape(name)}
    for section in _word_sections(config):
        size = section.get("vocab_size")
        if not isinstance(size, int) or not rows or size in rows:
            continue
        if target.hf_config is not None:
            raise CheckpointError(
                f"The `vocab_size` in `{target.hf_config / CONFIG}` must be the number of rows of "
                f"{sorted(target.tables)}, which is {sorted(rows)}, but is {size}. If rows are "
                f"padding, pass `--vocab-size {size}`; else write the number of rows there."
            )
        if len(rows) == 1 and max(rows) < size:  # Padding was dropped.
            changes.append((section, "vocab_size", max(rows)))
    if any(section[key] != value for section, key, value in changes):
        for section, key, value in changes:
            section[key] = value
        write_json(path, config)


def ties_words(config: Mapping[str, Any]) -> bool:
    """Returns whether every version of transformers ties word embeddings with ``config``. Only some
    read the text section, and the default depends on the class of the model."""
    said = [section.get("tie_word_embeddings") for section in _word_sections(config)]
    return said[0] is True and False not in said[1:]


def _word_sections(config: Mapping[str, Any]) -> list[Any]:
    """Returns the sections of a ``config.json`` that configure word embeddings."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def _sections(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a ``config.json`` and its sections for parts of the model."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            yield value
