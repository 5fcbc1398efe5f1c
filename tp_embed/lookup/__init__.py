"""How a batch of ids becomes rows of a sharded table, and their gradients one of the table."""
