"""The run directory, the loops, checkpoints and progress: everything an algorithm must not know."""
