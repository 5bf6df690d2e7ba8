"""`check`: the rules of the runtimes that load what was made."""
