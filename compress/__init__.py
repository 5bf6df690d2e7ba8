"""Decisions and numerics: scores, plans, pruning, GPTQ."""
