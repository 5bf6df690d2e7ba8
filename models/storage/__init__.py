"""Checkpoints on disk: read piece by piece, written as streams."""
