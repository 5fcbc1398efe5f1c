"""Saves and loads state dicts of models with sharded tables, whole or by shard."""
