"""What the processes of a host share besides a topology: a home directory, a lock, what was compiled for it."""
