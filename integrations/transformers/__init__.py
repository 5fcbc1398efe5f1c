"""Hugging Face transformers: the loss of a causal language model from logits that no rank puts
together."""

from .loss import check_loss, shard_logits

__all__ = ["check_loss", "shard_logits"]
