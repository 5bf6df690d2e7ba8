"""Models of the Hugging Face hub, by their id."""
