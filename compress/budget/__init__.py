"""Experts and bits under a budget in bytes."""
