"""The report, and what else tells of a result."""
