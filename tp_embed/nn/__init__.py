"""Modules and functions for models: embeddings, output heads, losses, init functions."""
