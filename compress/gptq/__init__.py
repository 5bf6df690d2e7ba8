"""GPTQ: scales, the solver, and the walk that quantizes a model."""
