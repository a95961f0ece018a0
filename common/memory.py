"""How a process asks the system for memory.

A training step at full size needs about a gigabyte for a second. glibc gives so much back to the system each
time and asks again: a fifth of the step's CPU time went into page faults.
"""

from __future__ import annotations

import ctypes

_LARGEST = 2**31 - 1  # mallopt takes an int
# Names of glibc's malloc.h with their numbers, by the environment variables of the same meaning.
_OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, 1),  # only the main arena can hold large blocks
    "MALLOC_MMAP_MAX_": (-4, 0),  # no block gets a mapping of its own, which ends with the block
    "MALLOC_TRIM_THRESHOLD_": (-1, _LARGEST),
}

# For a process to be started.
KEEP_FREED = {name: str(value) for name, (_, value) in _OPTIONS.items()}


def keep_freed() -> None:
    """Keeps freed memory in this process, up to its peak. Call it before threads start; glibc only."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for number, value in _OPTIONS.values():
            libc.mallopt(number, value)
