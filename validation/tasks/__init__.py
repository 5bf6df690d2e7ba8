"""Before and after on tasks: the same items for both models, through lm-evaluation-harness or alone."""
