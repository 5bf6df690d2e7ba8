"""`run`: the stages in order, from one recipe."""
