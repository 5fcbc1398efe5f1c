"""Estimates what a table and its output head cost a rank: memory, bytes sent, and time.

Arithmetic, no tensors. Costs are for the rank with the largest shard. P ranks share a table
(tensor-parallel), D ranks train on different batches (data-parallel). ZeRO is modeled on DeepSpeed
0.19.8. The tests compare the estimates with the memory and traffic of real layers and engines.
"""

from __future__ import annotations

from .estimate import Cost, auto_strategy, cost, costs, recommend
from .setup import Setup, Strategy
from .traffic import Network, Transfer

__all__ = [
    "Cost",
    "Network",
    "Setup",
    "Strategy",
    "Transfer",
    "auto_strategy",
    "cost",
    "costs",
    "recommend",
]
