"""Rows in memory-mapped files: what :func:`tp_embed.map_table` keeps a table and its states in."""
