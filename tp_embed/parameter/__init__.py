"""The weight of a sharded table, and what optimizers and norms do with it."""
