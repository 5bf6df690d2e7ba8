"""What an architecture is."""
