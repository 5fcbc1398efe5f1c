"""The input of a plan: a table, its output head, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tp_embed.partition import Partition

Strategy = Literal["none", "embed", "vocab"]
Dtype = Literal["fp32", "bf16"]
Device = Literal["cuda", "cpu"]
Output = Literal["replicated", "sequence"]

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
        of them, in [1/P, 1], for a table cut over its rows; if ``None``, 1/P.
    :param output: what each rank gets from the lookup: all tokens, or a block of the sequence. The
        tokens of a micro-batch count as one sequence.
    :param device: on an accelerator, ``dedup="auto"`` does not de-duplicate, to avoid a
        synchronisation.
    :param fuse_loss: whether a sharded head computes the loss from hidden states.
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
        ):
            if getattr(self, name) not in choices:
                refuse(name, f"one of {choices}", getattr(self, name))
        for name in ("unique_share", "block_unique_share"):
            if (share := getattr(self, name)) is not None and not 0 < share <= 1:
                refuse(name, "in (0, 1]", share)
        if self.owner_share is not None and not 1 / self.tp_size <= self.owner_share <= 1:
            refuse("owner_share", f"in [1/{self.tp_size}, 1]", self.owner_share)
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


def block(setup: Setup, strategy: Strategy) -> int:
    """Returns the rows or columns of the largest shard: the size, divided and rounded up."""
    size = setup.vocab_size if strategy == "vocab" else setup.embed_dim
    return Partition(size, setup.tp_size).block


def shard(setup: Setup, strategy: Strategy) -> int:
    """Returns the number of items in the largest shard of a table."""
    if strategy == "none":
        return setup.vocab_size * setup.embed_dim
    other = setup.embed_dim if strategy == "vocab" else setup.vocab_size
    return block(setup, strategy) * other
