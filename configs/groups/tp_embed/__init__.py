"""The groups of our own apps, which call them ``init``, ``embedding`` and ``head``."""
