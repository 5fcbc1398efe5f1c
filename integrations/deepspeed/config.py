"""The ``"tp_embed"`` section of a DeepSpeed config."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch.nn import Parameter

from tp_embed.lookup.options import Output
from tp_embed.lookup.train_rows import Rows, read_rows
from tp_embed.nn import init as init_functions
from tp_embed.nn.embedding import InitFn, Placement
from tp_embed.nn.head import Input
from tp_embed.nn.init import is_blockwise
from tp_embed.nn.tiled_values import Deterministic
from tp_embed.optim import LazyAdam, RowOptimizer, RowwiseAdagrad, RowwiseAdam
from tp_embed.surgery.options import ShardingOptions, Strategy

SECTION = "tp_embed"


class WatchdogConfig(BaseModel):
    """The keys of ``"watchdog"``; see :func:`tp_embed.watchdog.watch`.

    :param timeout: in seconds.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    timeout: float = Field(ge=1)


_OPTIMIZERS: dict[str, Any] = {
    "lazy_adam": LazyAdam,
    "rowwise_adagrad": RowwiseAdagrad,
    "rowwise_adam": RowwiseAdam,
}


class TableConfig(BaseModel):
    """The optimizer of a table that the engine's optimizer doesn't train; see
    :mod:`tp_embed.optim`. Keys that are left out have the default of its class.

    :param optimizer: ``"rowwise_adagrad"``, ``"rowwise_adam"`` or ``"lazy_adam"``.
    :param lr: the learning rate; if ``None``, the engine's, with its schedule.
    :param memory: a directory for memory-mapped files that hold the table and the optimizer's
        states, see :func:`tp_embed.map_table`; if ``None``, they are in memory.
    :param resident: the most bytes of their pages that stay in the memory of a process.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    optimizer: Literal["lazy_adam", "rowwise_adagrad", "rowwise_adam"]
    lr: float | None = None
    betas: list[float] | None = Field(default=None, min_length=2, max_length=2)
    eps: float | None = None
    weight_decay: float | None = None
    memory: str | None = Field(default=None, min_length=1)
    resident: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> TableConfig:
        if self.resident is not None and self.memory is None:
            raise ValueError("`resident` must be left out without `memory`")
        if self.betas is not None and self.optimizer == "rowwise_adagrad":
            raise ValueError("`betas` must be left out for 'rowwise_adagrad', which has none")
        self.make(Parameter(torch.empty(0, 0)))
        return self

    def make(self, weight: Parameter) -> RowOptimizer:
        """Makes the optimizer of ``weight``."""
        given = self.model_dump(exclude={"optimizer", "memory", "resident"}, exclude_none=True)
        made: RowOptimizer = _OPTIMIZERS[self.optimizer]([weight], **given)
        return made


class EmbedConfig(BaseModel):
    """The keys of the ``"tp_embed"`` section, which says how to shard the tables of a model. They
    mean what they mean in :func:`tp_embed.shard_embeddings`, except:

    :param init: the name of a function of :mod:`tp_embed.nn.init`, or
        ``"package.module.function"``, or a mapping of such a ``name`` and keyword arguments,
        ``{"name": "normal", "std": 0.1}``.
    :param train_rows: maps names of tables to the rows that get a gradient: a list of rows, or a
        slice in Python's syntax, ``{"*.embed_tokens": "32000:"}``.
    :param fuse_loss: whether a model of transformers computes its loss from hidden states when it
        is trained with labels, see :func:`tp_embed.integrations.transformers.fuse_loss`; with
        ``"always"`` also in evaluation. Then ``outputs.logits`` holds no logits.
    :param shard_logits: whether a model of transformers computes its loss from rank-local logits,
        see :func:`tp_embed.integrations.transformers.shard_logits`. Then ``outputs.logits`` are
        rank-local whenever labels are given.
    :param tables: maps names of tables to optimizers of their own, whose work grows with the rows
        in use and not with the table: ``{"*.ngram*": {"optimizer": "rowwise_adagrad"}}``. The
        first pattern that matches counts. See :class:`TableConfig`.
    :param watchdog: ends all ranks if one goes missing after the engine is built; off by default.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    strategy: Strategy = "auto"
    rules: dict[str, Strategy] = {}
    tie_head: bool = True
    shard_head: bool = True
    fuse_loss: Literal["always", True, False] = False
    shard_logits: bool = False
    output: Output = "replicated"
    head_input: Input = "replicated"
    head_deterministic: Deterministic = None
    dedup: Literal["auto", True, False] = "auto"
    sparse: bool | None = None
    reuse_grad: bool | None = None
    check_ids: bool | NonNegativeInt | None = None
    init: str | dict[str, Any] | None = None
    train_rows: dict[str, str | list[int]] = {}
    placement: Placement = "block"
    tables: dict[str, TableConfig] = {}
    watchdog: WatchdogConfig | None = None

    @field_validator("reuse_grad")
    @classmethod
    def _check_reuse_grad(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("sparse"):
            raise ValueError("must be false with `sparse`, since it is about dense gradients")
        return value

    @field_validator("shard_logits")
    @classmethod
    def _check_shard_logits(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("fuse_loss"):
            raise ValueError("must be false with `fuse_loss`, which holds no logits")
        return value

    @field_validator("head_deterministic")
    @classmethod
    def _check_deterministic(cls, value: Deterministic, info: ValidationInfo) -> Deterministic:
        if value and info.data.get("shard_logits"):
            raise ValueError(
                "must be null with `shard_logits`, whose loss depends on the gang; use `fuse_loss`"
            )
        return value

    @field_validator("init")
    @classmethod
    def _find_init(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if value is not None:
            _init_function(value)
        return value

    @field_validator("train_rows")
    @classmethod
    def _check_train_rows(cls, value: dict[str, str | list[int]]) -> dict[str, str | list[int]]:
        for rows in value.values():
            read_rows(rows)
        return value

    @property
    def rows(self) -> dict[str, Rows]:
        """``train_rows``, for :func:`tp_embed.shard_embeddings`."""
        return {name: read_rows(rows) for name, rows in self.train_rows.items()}

    @property
    def options(self) -> ShardingOptions:
        """The options for :func:`tp_embed.shard_embeddings`."""
        return ShardingOptions(
            strategy=self.strategy,
            rules=self.rules,
            tie_head=self.tie_head,
            shard_head=self.shard_head,
            output=self.output,
            head_input=self.head_input,
            head_deterministic=self.head_deterministic,
            dedup=self.dedup,
            sparse=self.sparse,
            reuse_grad=self.reuse_grad,
            check_ids=self.check_ids,
            init_fn=None if self.init is None else _init_function(self.init),
            train_rows=self.rows,
            placement=self.placement,
            grad_reduction="mean",  # As engines average gradients over data-parallel ranks.
        )


_GATHER = "stage3_gather_16bit_weights_on_model_save"


def read_section(config: Mapping[str, Any], **keys: Any) -> tuple[dict[str, Any], EmbedConfig]:
    """Splits a config into DeepSpeed's part and our section.

    :param keys: replace the section's, unless they are ``None``.
    :raises ValueError: the section is invalid; the error names the key.
    """
    rest = {key: value for key, value in config.items() if key != SECTION}
    section = config.get(SECTION, {})
    if keys := {key: value for key, value in keys.items() if value is not None}:
        section = section | keys
    try:
        return rest, EmbedConfig.model_validate(section)
    except ValidationError as e:
        raise ValueError("\n".join(map(_describe, e.errors()))) from None


def gather_when_saving(config: dict[str, Any]) -> dict[str, Any]:
    """Returns ``config`` with engines that gather whole models when they save them, unless it says
    otherwise."""
    zero = dict(config.get("zero_optimization") or {})
    if zero.get(_GATHER, "auto") == "auto":
        zero[_GATHER] = True
    return {**config, "zero_optimization": zero}


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in (SECTION, *error["loc"]))
    if error["type"] == "extra_forbidden":
        section, _, _ = key.rpartition(".")
        models: dict[str, type[BaseModel]] = {
            SECTION: EmbedConfig,
            f"{SECTION}.watchdog": WatchdogConfig,
        }
        model = models.get(section, TableConfig)
        keys = ", ".join(sorted(model.model_fields))
        return f"`{key}` is not a key of the DeepSpeed config. The section `{section}` has {keys}."
    message = error["msg"].removeprefix("Value error, ")
    return f"`{key}` of the DeepSpeed config is {error['input']!r}: {message}."


def _init_function(value: str | dict[str, Any]) -> InitFn:
    arguments = {"name": value} if isinstance(value, str) else dict(value)
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise ValueError("an init function must have a `name`, such as 'normal'")
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module) if module else init_functions, attribute, None)
    except ImportError as e:
        raise ValueError(f"the module '{module}' cannot be imported: {e}") from None
    if not callable(found) or (not module and not is_blockwise(found)):
        known = sorted(n for n, f in vars(init_functions).items() if is_blockwise(f))
        raise ValueError(
            f"an init function must be one of {known}, or a 'package.module.function' of your own"
        )
    return partial(found, **arguments) if arguments else found
