"""Run by the `deepspeed` launcher on two ranks for test_token_values_engines.py: values of tokens,
by us and by DeepSpeed, and engines whose model computes them at ZeRO 0 to 3."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.sequence.vocab_parallel_ops import (
    vocab_parallel_entropy,
    vocab_parallel_kl_div,
    vocab_parallel_logprobs,
)
from deepspeed.utils import groups
from torch import Tensor, nn

from token_problems import heads, problem
from tp_embed import VocabShardedEmbedding
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize

V, E, STEPS, LR = 24, 8, 3, 0.05


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, E)
        self.body = nn.Linear(E, E)
        self.head: Any = nn.Linear(E, V, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.head
        return head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body(self.embed(ids)).tanh()
        target, weight = ids.roll(1), torch.linspace(0.1, 1.0, V)
        values, _ = self.head.top_k(x, 3)
        losses = self.head.loss(x, target, reduction="none", label_smoothing=0.1)
        teacher_x = x.detach().roll(1, 0)
        divergence = self.head.kl_divergence(x, teacher_x, self.head, 2.0)
        other = self.head.kl_divergence(x, teacher_x, self.head, reverse=True)
        total = self.head.entropy(x) - self.head.log_probs(x, target, 0.5) + losses.square()
        total = total + 0.1 * values.sum(-1) + divergence + other
        loss: Tensor = total.mean() + self.head.loss(x, target, weight=weight)
        return loss


def build(tied: bool) -> Model:
    torch.manual_seed(0)
    return Model(tied)


def batches() -> list[Tensor]:
    return list(torch.randint(V, (STEPS, 12), generator=torch.Generator().manual_seed(1)))


def train(stage: int, tied: bool) -> list[float]:
    config: dict[str, Any] = {
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_allow_untested_optimizer": True,
        "tp_embed": {"strategy": "vocab"},
    }
    if stage == 3:
        # Releases all Parameters after each use.
        config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    engine, *_ = initialize(model=build(tied), config=config, mpu=groups)
    losses = []
    for ids in batches():
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def side_by_side(gang: Any) -> dict[str, list[Tensor]]:
    """Returns values and gradients of logits, by us and by DeepSpeed's functions of logits."""
    student, teacher, target = problem(23, torch.float32, dim=6)
    embed, head, (teacher_x, teacher_head) = heads(VocabShardedEmbedding, gang, student, teacher)
    group, own = gang.as_process_group(), embed.rows
    for each in (head, teacher_head):
        each.output = "shard"
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_x)
    several = torch.stack([target, target.clamp_min(0).roll(1)], -1)
    rows = {"vocab_start_index": own.start, "vocab_end_index": own.stop}
    ways: dict[str, Any] = {
        "log-probs": (
            lambda x: head.log_probs(x, several),
            lambda z: vocab_parallel_logprobs(z, several, group, **rows),
        ),
        "entropy": (head.entropy, lambda z: vocab_parallel_entropy(z, group)),
        "divergence": (
            lambda x: head.kl_divergence(x, teacher_x, teacher_head),
            lambda z: vocab_parallel_kl_div(z, teacher_logits, False, group),
        ),
        "reverse": (
            lambda x: head.kl_divergence(x, teacher_x, teacher_head, reverse=True),
            lambda z: vocab_parallel_kl_div(z, teacher_logits, True, group),
        ),
    }
    seen: dict[str, list[Tensor]] = {}
    for name, (ours, theirs) in ways.items():
        seen[name] = []
        for values_of in (ours, lambda x, theirs=theirs: theirs(head(x))):
            x = student[2].clone().requires_grad_()
            values = values_of(x)
            upstream = torch.linspace(0.5, 1.5, values.numel()).view_as(values)
            grads = torch.autograd.grad(values, [x, embed.weight], upstream)
            seen[name] += [values.detach(), grads[0], embed_grad(grads[1])]
    return seen


def embed_grad(grad: Any) -> Tensor:
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad
    return local


def main(out: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    gang = DeepSpeedGang.from_groups(tp_size=2)
    seen: dict[str, Any] = {"side by side": side_by_side(gang)}
    for stage in range(4):
        for tied in (True, False):
            seen[f"{stage} {tied}"] = train(stage, tied)
    torch.save(seen, out / f"seen{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
