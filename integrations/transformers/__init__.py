"""Hugging Face transformers: the loss of a causal language model from logits that no rank puts
together."""

from .loss import shard_logits

__all__ = ["shard_logits"]
