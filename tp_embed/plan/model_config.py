"""Reads a table from options of ``tp-embed plan``, or from the config of a transformers model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_embed.command import CommandError, WrongUsageError

from .setup import ITEM_BYTES

# Config keys for the width of the table, the most specific first.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def read_table(values: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the table from the config of a model, if given. Options override it."""
    config = {} if values["hf_config"] is None else _read(Path(values["hf_config"]))
    given = {name: values[name] for name in ("vocab_size", "embed_dim", "tied", "dtype")}
    table = config | {name: value for name, value in given.items() if value is not None}
    if not values["head"]:
        table["tied"] = bool(given["tied"])
    options = {"vocab_size": "--vocab-size", "embed_dim": "--embed-dim"}
    if config:  # Without the key, the default depends on the class of the model.
        options["tied"] = "--tied or --no-tied"
    missing = [option for name, option in options.items() if name not in table]
    if missing:
        raise WrongUsageError(f"{' and '.join(missing)} must be given.")
    if table.get("dtype", "bf16") not in ITEM_BYTES:
        raise WrongUsageError(
            "The dtype of the config must be float32 or bfloat16, but is "
            f"{table['dtype']!r} instead. Give --dtype, the dtype for training."
        )
    return table


def _read(path: Path) -> dict[str, Any]:
    """Reads the table from the config of a transformers model."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise CommandError(f"`{path}` must be JSON, but is not: {e}") from e
    if not isinstance(config, dict):
        raise CommandError(f"`{path}` must hold a JSON object, but does not.")
    text = config.get("text_config")
    merged = config | text if isinstance(text, dict) else config
    width = next((merged[name] for name in _WIDTHS if merged.get(name) is not None), None)
    dtype = merged.get("dtype", merged.get("torch_dtype"))
    found = {
        "vocab_size": merged.get("vocab_size"),
        "embed_dim": width,
        "tied": config.get("tie_word_embeddings", merged.get("tie_word_embeddings")),
        "dtype": None if dtype is None else _DTYPES.get(str(dtype), str(dtype)),
    }
    return {name: value for name, value in found.items() if value is not None}
