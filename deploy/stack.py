"""Which of the two sets of packages this Python runs: `requirements/classic.lock` or `modern.lock`.

What the set-up knows of them is in `tools/stacks.py`; a program that was shipped to a cluster has no tools.
"""

from __future__ import annotations

import sys

PYTHONS = {(3, 11): "classic", (3, 12): "modern", (3, 13): "modern"}
PLATFORMS = {
    "classic": ("Linux x86_64",),
    "modern": ("Linux x86_64", "Linux aarch64", "Darwin arm64"),
}
SUPPORTED = "Python 3.11, 3.12 or 3.13"


def stack() -> str:
    """Name of this Python's set; that of the nearest supported one if it has none."""
    version = sys.version_info[:2]
    return PYTHONS[min(max(version, min(PYTHONS)), max(PYTHONS))]


def lock(*, cuda: bool = False) -> str:
    """Path of the lock below the root of the checkout."""
    return f"requirements/{stack()}{'-cuda' if cuda else ''}.lock"
