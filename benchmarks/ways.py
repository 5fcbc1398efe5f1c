"""Names the layers that `exchange.py` compares, from replicated ids to embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import Module, Parameter

from peers import (
    Fairseq2Embedding,
    MegatronEmbedding,
    Setting,
    deepspeed_layer,
    dtensor_column,
    dtensor_row,
    whole_on_meta,
)
from tp_embed import ShardedEmbedding, VocabShardedEmbedding
from tp_embed.partition import Partition

Who = Literal["ours", "peer", "replicated"]


@dataclass(frozen=True)
class Way:
    """One layer and its options.

    :param who: ours, a peer, or ``torch.nn.Embedding``, which sends nothing.
    :param cut: the cut dimension of the table: "embed", "vocab", or "whole".
    :param output: "replicated", or "sequence": this rank's positions. "sequence-first" is the
        latter with the sequence as the first dimension, as in Megatron-LM.
    :param gradient: "dense", "sparse", or "reused".
    """

    name: str
    who: Who
    cut: str
    build: Callable[[Setting], Module]
    output: str = "replicated"
    gradient: str = "dense"

    def cut_output(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Returns this rank's part of a whole output. *Shape:* (B, S, E) -> see ``output``."""
        if self.output == "replicated":
            return whole
        own = Partition(whole.size(1), size).shard(rank)
        part = whole[:, own.start : own.stop]
        return part.transpose(0, 1) if self.output == "sequence-first" else part


def ours(setting: Setting, cut: str, dedup: bool | str, gradient: str, output: str) -> Module:
    kls = ShardedEmbedding if cut == "embed" else VocabShardedEmbedding
    table = setting.table
    layer = kls(
        setting.gang,
        *table.shape,
        device="meta",
        dtype=table.dtype,
        output=output,  # type: ignore[arg-type]
        dedup=dedup,  # type: ignore[arg-type]
        sparse=gradient == "sparse",
        reuse_grad=gradient == "reused",
        check_ids=False,
    )
    layer.to_empty(device="cpu")
    layer.weight.data = setting.shards[cut]
    return layer


def replicated(setting: Setting) -> Module:
    whole = whole_on_meta(setting)
    whole.weight = Parameter(setting.table)
    return whole


def _all() -> list[Way]:
    ways = [
        Way("nn.Embedding, replicated table", "replicated", "whole", replicated),
        Way("Megatron-LM", "peer", "vocab", MegatronEmbedding),
        Way(
            "DeepSpeed HiddenParallelEmbedding",
            "peer",
            "embed",
            partial(deepspeed_layer, name="HiddenParallelEmbedding", cut="embed"),
        ),
        Way(
            "DeepSpeed VocabParallelEmbedding",
            "peer",
            "vocab",
            partial(deepspeed_layer, name="VocabParallelEmbedding", cut="vocab"),
        ),
        Way("DTensor column-wise", "peer", "embed", dtensor_column),
        Way("DTensor row-wise", "peer", "vocab", dtensor_row),
        Way("fairseq2", "peer", "embed", Fairseq2Embedding),
        Way(
            "Megatron-LM, sequence",
            "peer",
            "vocab",
            partial(MegatronEmbedding, reduce_scatter_embeddings=True),
            "sequence-first",
        ),
        Way(
            "DTensor column-wise, sequence",
            "peer",
            "embed",
            partial(dtensor_column, sequence=True),
            "sequence",
        ),
        Way(
            "DTensor row-wise, sequence",
            "peer",
            "vocab",
            partial(dtensor_row, sequence=True),
            "sequence",
        ),
    ]
    for output in ("replicated", "sequence"):
        for cut in ("embed", "vocab"):
            for dedup in ("auto", True, False):
                for gradient in ("dense", "sparse", "reused"):
                    build = partial(ours, cut=cut, dedup=dedup, gradient=gradient, output=output)
                    name = our_name(cut, dedup, gradient, output)
                    ways.append(Way(name, "ours", cut, build, output, gradient))
    return ways


def our_name(
    cut: str, dedup: bool | str = "auto", gradient: str = "dense", output: str = "replicated"
) -> str:
    """Names one of our ways, such as ``tp_embed embed, auto, sparse`` or ``..., sequence``."""
    rows = "auto" if isinstance(dedup, str) else "dedup" if dedup else "plain"
    end = "" if output == "replicated" else f", {output}"
    return f"tp_embed {cut}, {rows}, {gradient}{end}"


WAYS = {way.name: way for way in _all()}

# The default ways. Of ours: `dedup="auto"` with each kind of gradient, and its other two values
# with a dense one.
DEFAULT = (
    "[!t]*",
    "tp_embed *, auto, *",
    "tp_embed *, plain, dense*",
    "tp_embed *, dedup, dense*",
)

# The ways in the charts of growth with V, N and P.
GROWTH = (
    "Megatron-LM",
    "DeepSpeed HiddenParallelEmbedding",
    "DTensor column-wise",
    "fairseq2",
    *(our_name("embed", gradient=gradient) for gradient in ("dense", "reused", "sparse")),
    our_name("vocab", gradient="sparse"),
)
