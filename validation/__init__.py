"""Proof: perplexity, divergence, throughput, reports."""
