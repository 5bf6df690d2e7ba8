"""What a person types and reads: one module per command."""
