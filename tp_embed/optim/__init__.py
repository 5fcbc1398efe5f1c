"""Optimizers whose work grows with the rows that a step touches, for tables of any size.

They train tables with ``sparse=True``, whole or sharded, and :class:`torch.nn.Embedding` with
``sparse=True``.
"""

from tp_embed.optim.adagrad import RowwiseAdagrad
from tp_embed.optim.adam import LazyAdam, RowwiseAdam
from tp_embed.optim.rows import RowOptimizer

__all__ = ["LazyAdam", "RowOptimizer", "RowwiseAdagrad", "RowwiseAdam"]
