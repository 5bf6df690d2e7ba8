"""MLX: what mlx-lm loads on Apple's machines, and on CPUs elsewhere."""
