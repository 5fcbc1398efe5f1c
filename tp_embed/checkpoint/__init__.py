"""State dicts of models with sharded tables: whole, in shards, or as DTensors."""

from .hooks import Mode, full_state_dict, hook_state_dict

__all__ = ["Mode", "full_state_dict", "hook_state_dict"]
