"""The forward pass out of core, through transformers' own modules."""
