"""Lists the transfers of a step.

Tensor-parallel traffic follows the docstrings of :mod:`tp_embed.lookup.exchange`,
:mod:`tp_embed.nn.head` and :mod:`tp_embed.nn.loss`; data-parallel traffic follows ZeRO in DeepSpeed
0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .lookups import lookup_of
from .own_tables import exchange_of_own, has_own_optimizer
from .setup import ITEM_BYTES, Setup, Strategy, block, head_cut
from .tokens import sparse_bytes
from .traffic import Transfer


def transfers(
    setup: Setup, strategy: Strategy, shard_logits: bool, dedup: bool, sizes: Sequence[int]
) -> tuple[Transfer, ...]:
    """Returns all transfers of a step.

    :param sizes: the items of a rank's Parameters that DeepSpeed averages, the table's first if it
        is among them.
    """
    found = (
        *lookup_of(setup, strategy, dedup).transfers(),
        *_project(setup, head_cut(setup, strategy), shard_logits),
        *_data_parallel(setup, strategy, sizes),
        *(exchange_of_own(setup, strategy) if has_own_optimizer(setup, strategy) else ()),
    )
    return tuple(transfer for transfer in found if transfer.ranks > 1)


def _project(setup: Setup, cut: Strategy, shard_logits: bool) -> Iterator[Transfer]:
    """Yields the transfers of head and loss."""
    item, count, ranks = ITEM_BYTES[setup.dtype], setup.accumulation_steps, setup.tp_size
    tokens, hidden = setup.tokens, setup.tokens * setup.embed_dim * item
    if cut == "embed":
        if setup.fuse_loss:
            item = 4  # Logits are summed in fp32.
        logits, columns = tokens * setup.vocab_size * item, tokens * block(setup, "embed") * item
        yield Transfer("logits", "forward", "all_reduce", "tp", ranks, logits, count)
        yield Transfer("hidden states", "backward", "all_gather", "tp", ranks, columns, count)
    elif cut == "vocab":
        if setup.fuse_loss:  # Of each rank: the highest logit, the sum, and the target's.
            yield Transfer("loss", "forward", "all_gather", "tp", ranks, 12 * tokens, count)
        elif shard_logits:
            for numbers in (1, 2):  # The highest logit; the sum of the others, and the target's.
                payload = 4 * numbers * tokens
                yield Transfer("loss", "forward", "all_reduce", "tp", ranks, payload, count)
        else:
            logits = tokens * block(setup, "vocab") * item
            yield Transfer("logits", "forward", "all_gather", "tp", ranks, logits, count)
        yield Transfer("hidden states", "backward", "all_reduce", "tp", ranks, hidden, count)


def _data_parallel(setup: Setup, strategy: Strategy, sizes: Sequence[int]) -> Iterator[Transfer]:
    """Yields the transfers of ZeRO. DeepSpeed all-reduces gradients at stages 1 and 2 too."""
    item, ranks, count = ITEM_BYTES[setup.dtype], setup.dp_size, setup.accumulation_steps
    if not sizes:
        return
    if setup.zero_stage == 3:
        uses = [*sizes, *sizes[: setup.tied]]  # The head uses a tied table again.
        gathered = sum(-(-size // ranks) for size in uses) * item
        # Parameters are gathered for each use, unless still present from the last one.
        yield Transfer("weight", "forward", "all_gather", "dp", ranks, gathered, count)
        yield Transfer("weight", "backward", "all_gather", "dp", ranks, gathered, count)
        whole = sum(-(-size // ranks) * ranks for size in sizes) * item
        yield Transfer("gradient", "backward", "reduce_scatter", "dp", ranks, whole, count)
        return
    dense = sum(sizes) * item
    if setup.sparse and strategy != "world":
        dense -= sizes[0] * item
        rows = sparse_bytes(setup, strategy)
        yield Transfer("gradient", "backward", "all_gather", "dp", ranks, rows)
    if dense:  # ZeRO 2 reduces in every micro-batch.
        times = count if setup.zero_stage == 2 else 1
        yield Transfer("gradient", "backward", "all_reduce", "dp", ranks, dense, times)
    if setup.zero_stage:
        share = -(-sum(sizes) // ranks) * item
        yield Transfer("weight", "step", "all_gather", "dp", ranks, share)
