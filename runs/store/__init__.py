"""Stores: a folder or a bucket that several machines read and write."""
