"""The weight of a sharded table, and its optimizers and norms."""
