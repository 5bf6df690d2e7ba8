"""Work shared by several machines through a store."""
