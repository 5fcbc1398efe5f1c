"""A step of GRPO (Shao et al., "DeepSeekMath", 2024): samples completions, scores them, and updates
the policy several times.

    deepspeed --num_gpus 2 --no_local_rank examples/grpo_step.py

Log-probabilities, the divergence from the reference model, entropies, and the logits to sample from
come from hidden states: no rank holds all logits.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from tp_embed import shard_embeddings
from tp_embed.integrations.deepspeed import DeepSpeedGang, initialize

VOCAB_SIZE, DIM, END, IGNORED = 101, 32, 0, -100
PROMPTS, GROUP, PROMPT_LENGTH, LENGTH = 3, 4, 5, 8
TEMPERATURE, TOP_K, CLIP, BETA, BONUS, UPDATES = 0.9, 50, 0.2, 0.04, 0.01, 4

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": PROMPTS * GROUP,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "tp_embed": {"strategy": "vocab"},
}


class Rollout(NamedTuple):
    """Completions, of shape (batch, length). ``target`` is the next id, or -100 for prompts and
    what follows the end."""

    ids: Tensor
    target: Tensor
    advantages: Tensor  # (batch, 1)
    log_probs: Tensor


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, DIM)
        self.body = nn.GRU(DIM, DIM, batch_first=True)
        self.head: Any = nn.Linear(DIM, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x: Tensor = self.body(self.embed(ids))[0]
        return x

    def log_probs(self, rollout: Rollout) -> Tensor:
        x = self.hidden(rollout.ids)
        log_probs: Tensor = self.head.log_probs(x, rollout.target, TEMPERATURE)
        return log_probs

    def forward(self, rollout: Rollout, reference_x: Tensor, reference_head: nn.Module) -> Tensor:
        """Returns the loss."""
        x = self.hidden(rollout.ids)
        log_probs = self.head.log_probs(x, rollout.target, TEMPERATURE)
        ratio = (log_probs - rollout.log_probs).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        gain = torch.minimum(ratio * rollout.advantages, clipped * rollout.advantages)
        # KL(policy || reference), over all classes rather than estimated from the sampled one.
        divergence = self.head.kl_divergence(
            x, reference_x, reference_head, TEMPERATURE, reverse=True
        )
        entropy = self.head.entropy(x, TEMPERATURE)
        losses: Tensor = BETA * divergence - BONUS * entropy - gain
        return losses[rollout.target != IGNORED].mean()


@torch.no_grad()
def roll_out(policy: Policy) -> Rollout:
    """Samples completions, the same on all ranks of a tensor-parallel group, and scores them."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCAB_SIZE, (PROMPTS, PROMPT_LENGTH), generator=generator)
    ids = prompts.repeat_interleave(GROUP, 0)
    for _ in range(LENGTH):
        logits, choices = policy.head.top_k(policy.hidden(ids)[:, -1], TOP_K)
        chosen = (logits / TEMPERATURE).softmax(-1).multinomial(1, generator=generator)
        ids = torch.cat([ids, choices.gather(1, chosen)], 1)
    completions = ids[:, PROMPT_LENGTH:]
    ended = (completions == END).cumsum(1) - (completions == END).long() > 0
    rewards = ((completions % 2 == 0) & ~ended).float().mean(1)  # Likes even numbers.

    by_prompt = rewards.view(PROMPTS, GROUP)
    advantages = (by_prompt - by_prompt.mean(1, keepdim=True)) / (
        by_prompt.std(1, keepdim=True) + 1e-4
    )
    target = ids[:, 1:].clone()
    target[:, : PROMPT_LENGTH - 1] = IGNORED
    target[:, PROMPT_LENGTH - 1 :].masked_fill_(ended, IGNORED)
    rollout = Rollout(ids[:, :-1], target, advantages.view(-1, 1), torch.empty(0))
    return rollout._replace(log_probs=policy.log_probs(rollout))


def main() -> None:
    gang = DeepSpeedGang.from_groups(tp_size=2)
    torch.manual_seed(0)
    policy = Policy()
    reference = copy.deepcopy(policy).requires_grad_(False)
    shard_embeddings(reference, gang, strategy="vocab")
    engine, *_ = initialize(model=policy, config=CONFIG, mpu=groups)

    rollout = roll_out(engine.module)
    reference_x = reference.hidden(rollout.ids)
    for update in range(1, UPDATES + 1):
        loss = engine(rollout, reference_x, reference.head)
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0:
            print(f"update {update}: loss {loss.item():.8f}")


if __name__ == "__main__":
    main()
