"""Checks the options of the commands, from the command line or through Hydra, and builds the
library's arguments from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

from tp_embed.command import WrongUsageError

from .choices import DIMS, FORMATS, Dim, NanPolicy
from .contents import ReadOptions, parse_dtype
from .conversion import MAX_RANKS, Request
from .cuts import Rule

_UNITS = {unit: 1000**i for i, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 1024**i for i, unit in enumerate(("", "KiB", "MiB", "GiB", "TiB"))}


def read_options(
    *,
    tag: str | None = None,
    rules: Sequence[str] = (),
    vocab_size: int | None = None,
    optimizer_names: str | None = None,
    allow_unsafe_pickle: bool = False,
    weights_only: bool = False,
) -> ReadOptions:
    """Builds the options for reading a checkpoint.

    :param rules: rules for :meth:`Rule.parse`, or ``@FILE`` with one per line.
    :param optimizer_names: comma-separated names, or ``@FILE`` with one per line.
    :raises WrongUsageError: an option has an invalid value.
    """
    _check_range("--vocab-size", vocab_size, 2**40)
    with _usage("--rules"):
        parsed = tuple(Rule.parse(line) for rule in rules for line in _items(rule))
    with _usage("--optimizer-names"):
        names = None if optimizer_names is None else tuple(_items(optimizer_names, separator=","))
    return ReadOptions(
        tag=tag,
        rules=parsed,
        vocab_size=vocab_size,
        allow_unsafe_pickle=allow_unsafe_pickle,
        optimizer_names=names,
        with_optimizer=not weights_only,
    )


def build_request(
    *,
    to: str,
    source_format: str | None = None,
    tp: int | None = None,
    dim: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    vocab_size: int | None = None,
    hf_config: str | None = None,
    zero_stage: int = 1,
    dp: int = 1,
    nan: str = "keep",
    **reading: Any,
) -> Request:
    """Builds the request of a conversion.

    :param reading: arguments of :func:`read_options`.
    :raises WrongUsageError: an option has an invalid value.
    """
    _check_choice("--to", to, FORMATS)
    _check_choice("--from", source_format, [None, *FORMATS])
    _check_choice("--dim", dim, [None, *DIMS])
    _check_choice("--nan", nan, get_args(NanPolicy))
    _check_choice("--zero-stage", zero_stage, range(4))
    _check_range("--tp", tp, MAX_RANKS)
    _check_range("--dp", dp, MAX_RANKS)
    if hf_config is not None and not Path(hf_config).is_dir():
        raise WrongUsageError(f"`--hf-config` must be a directory, but is `{hf_config}`.")
    with _usage("--dtype"):
        parsed_dtype = None if dtype is None else parse_dtype(dtype)
    if parsed_dtype is not None and not parsed_dtype.is_floating_point:
        raise WrongUsageError(f"`--dtype` must be one of floating point, but is `{dtype}`.")
    if parsed_dtype is not None and parsed_dtype.itemsize < 2:
        raise WrongUsageError(
            f"`--dtype` must have at least 16 bits, since others need scales, but is `{dtype}`."
        )
    return Request(
        to=to,
        tp_size=tp,
        dim=cast("Dim | None", dim),
        dtype=parsed_dtype,
        vocab_size=vocab_size,
        max_shard_size=parse_size(max_shard_size),
        hf_config=None if hf_config is None else Path(hf_config),
        zero_stage=zero_stage,
        dp_size=dp,
        nan=cast(NanPolicy, nan),
        source_format=source_format,
        read=read_options(vocab_size=vocab_size, **reading),
    )


def parse_size(text: str) -> int:
    """Parses a number of bytes, such as ``5GB``, ``1.5 GiB`` or ``1000000``.

    :raises WrongUsageError: ``text`` is no positive size.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    factor = units.get(match[2].lower()) if match else None
    nbytes = int(float(match[1]) * factor) if match and factor else 0
    if nbytes < 1:
        raise WrongUsageError(
            "A size must be a number of bytes greater than 0, as `5GB`, `500MiB` or `1000000`, but "
            f"is `{text}`."
        )
    return nbytes


def _items(text: str, separator: str | None = None) -> list[str]:
    """Returns the items of ``@FILE``, one per line, or of ``text`` itself."""
    if text.startswith("@"):
        lines = Path(text[1:]).read_text().splitlines()
        items = [line.partition("#")[0] for line in lines]
    else:
        items = text.split(separator) if separator else [text]
    return [item.strip() for item in items if item.strip()]


def _check_choice(option: str, value: object, choices: Iterable[object]) -> None:
    if value not in (choices := list(choices)):
        allowed = [choice for choice in choices if choice is not None]
        raise WrongUsageError(f"`{option}` must be one of {allowed}, but is `{value}`.")


def _check_range(option: str, value: int | None, largest: int) -> None:
    if value is not None and not 1 <= value <= largest:
        raise WrongUsageError(f"`{option}` must be in [1, {largest}], but is {value}.")


@contextmanager
def _usage(option: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as e:
        raise WrongUsageError(f"`{option}` cannot be used: {e}") from e
