"""What a table and its output head cost a rank by each strategy: memory, bytes sent, and time.

Arithmetic, no tensors. The rank is the one that holds the largest shard. P ranks share a table
(tensor-parallel), D ranks train on other batches (data-parallel); what ZeRO holds is what DeepSpeed
0.19.8 does. The tests compare all of it with what layers and engines hold and send.
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
