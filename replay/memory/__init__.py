"""A replay in the memory of one process: the table of `replay.table` without Reverb and without a port."""
