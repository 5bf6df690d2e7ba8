"""What the model is fed, and what is observed while it runs."""
