"""What a model is: families, checkpoints on disk, the streamed forward pass."""
