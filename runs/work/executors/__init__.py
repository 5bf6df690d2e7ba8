"""Who starts workers: processes on this machine, or Ray. Array jobs need nobody: each job is a worker itself."""
