"""Tokens per second, measured and projected; GPUs and what fits into them."""
