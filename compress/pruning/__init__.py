"""Which experts stay, and a checkpoint without the others."""
