"""Freed memory stays in a process that asks for it; a child counts its page faults."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.memory import KEEP_FREED

_SIZE = 200_000_000
_TWICE = f"""
import ctypes, resource, sys, threading
if sys.argv[1] == "call":
    from common.memory import keep_freed
    keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = []

def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc({_SIZE})
    libc.memset(block, 1, {_SIZE})
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

for _ in range(2):
    thread = threading.Thread(target=fill)  # XLA does not compute in the main thread either
    thread.start()
    thread.join()
print(faults[1])
"""


@pytest.mark.parametrize(("how", "kept"), [("call", True), ("environment", True), ("neither", False)])
def test_freed_memory_is_kept(how: str, kept: bool) -> None:
    env = os.environ | (KEEP_FREED if how == "environment" else {})
    child = subprocess.run(
        [sys.executable, "-c", _TWICE, how], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    pages = _SIZE // os.sysconf("SC_PAGE_SIZE")
    # With large pages the system may give back 512 pages per fault.
    assert (int(child.stdout) < pages / 1000) == kept
