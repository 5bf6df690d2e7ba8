"""Time, memory and disk before a stage starts."""
