"""Bytes: codes and scales in, tensors and files out."""
