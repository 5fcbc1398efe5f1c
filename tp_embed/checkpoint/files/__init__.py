"""Reads and writes the files of checkpoints: arrays, hashes and text."""
