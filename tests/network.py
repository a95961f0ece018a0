"""What can be reached from here."""

from __future__ import annotations

import socket


def reaches(host: str, port: int) -> bool:
    """Whether somebody at that address takes a connection."""
    try:
        with socket.create_connection((host, port), timeout=0.3):
            return True
    except OSError:
        return False
