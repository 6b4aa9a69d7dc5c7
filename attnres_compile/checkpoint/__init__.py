"""Checkpoints on disk: read, convert, write whole or not at all, and load."""
