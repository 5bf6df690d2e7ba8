"""One module per stage, from files to files."""
