"""State dicts of models with sharded tables: hooks that shard and unshard on save and load."""
