"""Trains a transformer with DeepSpeed's pipeline, where each stage shards its table over a gang.

    deepspeed --num_gpus 4 --no_local_rank examples/train_pipeline.py --stages 2 --tp 2

The first stage looks up ids in the table, and the last one projects to logits with it. Both hold
their rank's block, which DeepSpeed keeps equal, and no rank holds all logits. The layers between
are plain torch, whole on each rank of a gang. They stand for tensor-parallel layers.

Writes DeepSpeed checkpoints to `runs/train_pipeline`; `--resume` loads the last one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor, nn

from corpus import Corpus, load
from tp_embed import Gang, OutputHead, Partition, VocabShardedEmbedding, init_scaled_embedding
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize
from tp_embed.nn.loss import cross_entropy


class Positions(nn.Module):
    """Adds learned position embeddings."""

    def __init__(self, seq_len: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(seq_len, dim) * dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.size(1)]


class Block(nn.TransformerEncoderLayer):
    """A causal transformer layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(1), x.device, x.dtype)
        return super().forward(x, mask, is_causal=True)


def shard_logits(embed: VocabShardedEmbedding, x: Tensor) -> Tensor:
    """Returns the logits of this rank's rows. *Shape:* :math:`(N,S,V_{rank})`."""
    logits: Tensor = OutputHead(embed, output="shard")(x)
    return logits


def build(
    gang: Gang,
    topology: PipeModelDataParallelTopology,
    *,
    vocab_size: int,
    seq_len: int,
    dim: int,
    heads: int,
    layers: int,
    seed: int = 0,
) -> PipelineModule:
    """Builds the same initial model for any number of stages and any gang, by seeding layers by
    number."""
    table = partial(
        TiedLayerSpec,
        "embed",
        VocabShardedEmbedding,
        gang,
        vocab_size,
        dim,
        init_fn=init_scaled_embedding,
        tied_weight_attr="weight",
    )
    specs = [
        table(),
        LayerSpec(Positions, seq_len, dim),
        *(LayerSpec(Block, dim, heads) for _ in range(layers)),
        LayerSpec(nn.LayerNorm, dim),
        table(forward_fn=shard_logits),
    ]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, target, gang, Partition(vocab_size, gang.size))

    return PipelineModule(
        specs,
        topology=topology,
        loss_fn=loss,
        partition_method="type:Block",
        seed_layers=True,
        seed_fn=torch.manual_seed,  # DeepSpeed's default fails on its own numpy integers.
        base_seed=seed,
    )


def micro_batches(
    corpus: Corpus, options: argparse.Namespace, data_rank: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ids and targets, the same on all ranks of a pipeline but different between
    pipelines."""
    for number in count(first):
        tokens = corpus.batch(
            number, options.batch_size, options.seq_len + 1, seed=options.seed, rank=data_rank
        )
        yield tokens[:, :-1], tokens[:, 1:]


def main(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # One process per core.
    deepspeed.init_distributed()
    ranks = dist.get_world_size()
    in_pipeline = options.stages * options.tp
    if ranks % in_pipeline:
        raise ValueError(
            f"`--stages` times `--tp` must divide the number of processes ({ranks}), "
            f"but is {in_pipeline} instead."
        )
    topology = PipeModelDataParallelTopology(options.stages, options.tp, ranks // in_pipeline)
    # The specs need the gang before the pipeline exists, which makes its own grid.
    grid = PipelineParallelGrid(topology)
    gang = DeepSpeedGang.from_mpu(grid)

    corpus_options = options.cache_dir, options.vocab_size, options.max_bytes
    if dist.get_rank() == 0:
        load(*corpus_options)
    dist.barrier()
    corpus = load(*corpus_options)  # From the cache.

    model = build(
        gang,
        topology,
        vocab_size=corpus.vocab_size,
        seq_len=options.seq_len,
        dim=options.dim,
        heads=options.heads,
        layers=options.layers,
        seed=options.seed,
    )
    config = {
        "train_micro_batch_size_per_gpu": options.batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": options.lr}},
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=config)
    if options.resume:
        engine.load_checkpoint(str(options.run_dir))
    batches = micro_batches(
        corpus, options, grid.get_data_parallel_rank(), engine.global_steps * options.micro_batches
    )
    while engine.global_steps < options.steps:
        loss = engine.train_batch(batches)
        if dist.get_rank() == 0:
            print(f"step {engine.global_steps}: loss {loss.item():.4f}", flush=True)
        if (
            engine.global_steps % options.checkpoint_every == 0
            or engine.global_steps == options.steps
        ):
            engine.save_checkpoint(str(options.run_dir))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a transformer in stages.")
    parser.add_argument("--stages", type=int, default=2, help="stages of a pipeline")
    parser.add_argument("--tp", type=int, default=2, help="ranks to shard a table over")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=4, help="sequences per micro-batch")
    parser.add_argument("--micro_batches", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint_every", type=int, default=10, help="steps")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_bytes", type=int, default=4_000_000, help="of the text")
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/cache"))
    parser.add_argument("--run_dir", type=Path, default=Path("runs/train_pipeline"))
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint")
    return parser.parse_args()


if __name__ == "__main__":
    main(parse())
