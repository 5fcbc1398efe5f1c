"""Looks up batches of ids in a sharded table, and computes the gradient of the table."""
