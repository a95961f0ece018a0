"""What can be reached from here."""

from __future__ import annotations

import socket


def reaches(host: str, port: int, seconds: float = 0.3) -> bool:
    """Whether somebody at that address takes a connection."""
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False
