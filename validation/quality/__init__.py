"""What a pressed model lost: perplexity, divergence, thresholds."""
