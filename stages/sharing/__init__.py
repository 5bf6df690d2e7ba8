"""Stages that can be done by the workers of a shared run: how each is planned, opened again, and gathered."""
