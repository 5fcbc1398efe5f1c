"""Draws random token ids from a named distribution."""

from __future__ import annotations

import torch
from torch import Tensor

# With 2**15 ids, 33% of 8192 tokens are distinct; 39% of 4096, and 39% of 8192 with 2**17 ids.
ZIPF_EXPONENT = 1.05

DISTRIBUTIONS = ("zipf", "zipf-sorted", "uniform")


def draw(distribution: str, num_ids: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draws ids in [0, ``num_ids``), the same everywhere for a seed.

    - ``"zipf"``: the probability of the k-th most frequent id is proportional to k ** -1.05 (Zipf,
      1949), and a random id is the k-th most frequent: frequent ids are anywhere;
    - ``"zipf-sorted"``: the same, but id k is the k-th most frequent, as in a tokenizer that
      numbers tokens by frequency: the first rank of a cut vocabulary owns most;
    - ``"uniform"``: 88% of 8192 are distinct with 2**15 ids.
    """
    generator = torch.Generator().manual_seed(seed)
    if distribution == "uniform":
        return torch.randint(num_ids, shape, generator=generator)
    weights = torch.arange(1, num_ids + 1, dtype=torch.float64) ** -ZIPF_EXPONENT
    count = torch.Size(shape).numel()
    ids = weights.multinomial(count, replacement=True, generator=generator)
    if distribution == "zipf":
        ids = torch.randperm(num_ids, generator=generator)[ids]
    return ids.view(shape)
