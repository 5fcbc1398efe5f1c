"""Replaces the tables of a finished model by sharded ones."""
