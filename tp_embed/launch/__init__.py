"""Finds the launcher of this process, and opens a store to its other ranks."""
