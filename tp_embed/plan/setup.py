"""The input of a plan: a table, its output head, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tp_embed.partition import Partition

Strategy = Literal["none", "embed", "vocab", "world"]
Dtype = Literal["fp32", "bf16"]
Device = Literal["cuda", "cpu"]
Output = Literal["replicated", "sequence"]
Placement = Literal["block", "cyclic"]
TableOptimizer = Literal["lazy_adam", "rowwise_adagrad", "rowwise_adam"]

GIB = 1 << 30
ITEM_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}


@dataclass(frozen=True)
class Setup:
    """A table of V x E, and how it is trained.

    :param tied: whether the output head shares the table.
    :param head: whether there is an output head; an untied one has its own V x E.
    :param shard_head: whether an untied head is sharded, over the vocabulary, with the table.
    :param grad_dtype: the dtype of gradient accumulation, ``grad_accum_dtype`` of the DeepSpeed
        config; if ``None``, the dtype of the weights.
    :param tokens: N, per rank and micro-batch.
    :param accumulation_steps: micro-batches per step.
    :param sparse: whether the gradient of the table is sparse.
    :param unique_share: the share of distinct tokens in a micro-batch, in (0, 1]; if ``None``, by
        Zipf's law. Matters for de-duplication and sparse gradients.
    :param block_unique_share: the share of distinct tokens in a rank's block of the sequence; if
        ``None``, by Heaps' law from the share of all tokens.
    :param owner_share: the share of distinct tokens whose rows are on the rank that holds the most
        of them, at least 1/P, for a table cut over its rows, but not with cyclic placement; if
        ``None``, 1/P. P counts all ranks for the strategy ``"world"``.
    :param output: what each rank gets from the lookup: all tokens, or a block of the sequence. The
        tokens of a micro-batch count as one sequence.
    :param device: on an accelerator, ``dedup="auto"`` does not de-duplicate, to avoid a
        synchronisation.
    :param fuse_loss: whether a sharded head computes the loss from hidden states.
    :param table_optimizer: the optimizer that the table has of its own, ``tables`` of the DeepSpeed
        config, unless it stays whole.
    :param table_decay: whether that optimizer has weight decay.
    :param placement: which rows a rank holds with the strategy ``"world"``.
    :raises ValueError: a value is out of range, or DeepSpeed does not support the combination.
    """

    vocab_size: int
    embed_dim: int
    tied: bool = False
    head: bool = True
    shard_head: bool = True
    tp_size: int = 1
    dp_size: int = 1
    zero_stage: int = 1
    dtype: Dtype = "bf16"
    grad_dtype: Dtype | None = None
    optimizer: str = "adamw"
    tokens: int = 8192
    accumulation_steps: int = 1
    sparse: bool = False
    unique_share: float | None = None
    block_unique_share: float | None = None
    owner_share: float | None = None
    output: Output = "replicated"
    device: Device = "cuda"
    fuse_loss: bool = False
    table_optimizer: TableOptimizer | None = None
    table_decay: bool = False
    placement: Placement = "block"

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "embed_dim", "tp_size", "dp_size", "tokens", "accumulation_steps")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                refuse(name, "an integer greater than or equal to 1", value)
        for name, choices in (
            ("zero_stage", (0, 1, 2, 3)),
            ("dtype", get_args(Dtype)),
            ("grad_dtype", (None, *get_args(Dtype))),
            ("optimizer", tuple(MOMENTS)),
            ("output", get_args(Output)),
            ("device", get_args(Device)),
            ("table_optimizer", (None, *get_args(TableOptimizer))),
            ("placement", get_args(Placement)),
        ):
            if getattr(self, name) not in choices:
                refuse(name, f"one of {choices}", getattr(self, name))
        for name in ("unique_share", "block_unique_share"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                refuse(name, "in (0, 1]", share)
        ranks = self.tp_size * self.dp_size
        if self.owner_share is not None and not 1 / ranks <= self.owner_share <= 1:
            refuse("owner_share", f"in [1/{ranks}, 1]", self.owner_share)
        for name in ("tied", "fuse_loss"):
            if getattr(self, name) and not self.head:
                refuse(name, "false where there is no head", True)
        if self.dtype == "fp32" and self.grad_dtype == "bf16":
            refuse("grad_dtype", "'fp32' for weights in fp32", "bf16")
        if self.zero_stage == 0 and (self.dtype != "fp32" or self.grad_dtype == "bf16"):
            refuse("zero_stage", "1, 2 or 3 for bf16 (DeepSpeed's gradient norm is wrong at 0)", 0)
        if self.sparse and (self.zero_stage or self.tied or MOMENTS[self.optimizer] == 2):
            raise ValueError(
                "`sparse` must be false except for an untied table, at ZeRO 0, with an optimizer "
                "that takes sparse gradients ('sgd', 'momentum'), but is true instead."
            )
        if self.table_optimizer is not None:
            self._check_own_optimizer()
        elif self.table_decay:
            refuse("table_decay", "false without `table_optimizer`", True)

    def _check_own_optimizer(self) -> None:
        if self.tied:
            refuse("tied", "false with `table_optimizer`: the gradient of a head is dense", True)
        if self.sparse:
            refuse("sparse", "false with `table_optimizer`, whose gradients always are", True)
        if self.zero_stage == 1 and self.dtype == "bf16" and self.grad_dtype == "fp32":
            refuse("grad_dtype", "'bf16' with `table_optimizer` at ZeRO 1", "fp32")


def refuse(name: str, expected: str, value: object) -> None:
    """Raises that ``name`` must be ``expected``, but is ``value``.

    :raises ValueError: always.
    """
    raise ValueError(f"`{name}` must be {expected}, but is {value!r} instead.")


def head_cut(setup: Setup, strategy: Strategy) -> Strategy:
    """Returns how the head is cut: like its table if tied, else over the vocabulary."""
    if not setup.head or strategy == "none" or not (setup.tied or setup.shard_head):
        return "none"
    return strategy if setup.tied else "vocab"


def problem_of_world(setup: Setup) -> str | None:
    """Returns why the strategy ``"world"`` is refused, if it is."""
    problem = None
    if setup.tied:
        problem = "`tied` must be false", "whose ranks look up ids of their own"
    elif setup.output != "replicated":
        problem = "`output` must be 'replicated'", "which gives each rank the rows of its ids"
    elif setup.zero_stage and setup.table_optimizer is None:
        problem = "`table_optimizer` must be given", "unless `zero_stage` is 0: ZeRO cuts copies"
    return problem and f"{problem[0]} for the strategy 'world', {problem[1]}."


def sharers(setup: Setup, strategy: Strategy) -> int:
    """Returns the number of ranks that a cut table is cut over."""
    return setup.tp_size * (setup.dp_size if strategy == "world" else 1)


def block(setup: Setup, strategy: Strategy) -> int:
    """Returns the rows or columns of the largest shard: the size, divided and rounded up."""
    size = setup.embed_dim if strategy == "embed" else setup.vocab_size
    return Partition(size, sharers(setup, strategy)).block


def shape(setup: Setup, strategy: Strategy) -> tuple[int, int]:
    """Returns the rows and columns of the largest shard of a table."""
    rows, columns = setup.vocab_size, setup.embed_dim
    if strategy == "embed":
        return rows, block(setup, strategy)
    return (rows if strategy == "none" else block(setup, strategy)), columns


def shard(setup: Setup, strategy: Strategy) -> int:
    """Returns the number of items in the largest shard of a table."""
    rows, columns = shape(setup, strategy)
    return rows * columns
