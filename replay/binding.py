"""Keeps a listening port to one address of this machine.

Reverb listens on every address and has no option for another choice. So we give its sockets a packet filter
(Linux, `man 7 socket`: SO_ATTACH_FILTER, which needs no privilege): what is sent to another address is
dropped before it becomes a connection, and accepted connections inherit the filter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from ipaddress import ip_address

from common.types import UserError

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
AUTO = "auto"  # of `replay.host`

_LOOPBACK = (LOOPBACK, "::1")
_PROBE_SECONDS = 0.2  # a connection within the machine needs far less than a millisecond

# Classic BPF (linux/filter.h, linux/bpf_common.h): (operation, jump if true, jump if false, operand).
_SO_ATTACH_FILTER = 26
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here are into the IP header
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_DROP, _ACCEPT = 0, 0xFFFFFFFF
_DESTINATION = {4: 16, 6: 24}  # where an IP header of that version holds its destination

_Instruction = tuple[int, int, int, int]


def chosen_host(setting: str, own: str) -> str:
    """The address that `replay.host` means; `own` is that of this node, or loopback, for `auto`."""
    return own if setting == AUTO else setting


def reached_at(host: str, own: str = LOOPBACK) -> str:
    """The address at which clients find a server that answers at `host`."""
    return own if host in EVERYWHERE else host


def address(host: str, port: int) -> str:
    """`host:port`, as Reverb's clients take it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_host(host: str) -> None:
    """Raises UserError when `host` is no address of this machine."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError) as error:
        raise UserError(
            f"replay.host {host} is no address of this machine ({error}): give one of its own IP addresses, "
            f"{AUTO}, or {EVERYWHERE[0]} for all of them"
        ) from None


def keep_to(host: str, port: int) -> None:
    """Lets this process answer at `port` only to what was sent to `host`; loopback is 127.0.0.1 and ::1.

    Call it when the port listens already. Raises UserError when that cannot be had.
    """
    if host in EVERYWHERE:
        return
    allowed = _LOOPBACK if host in _LOOPBACK else (host,)
    other = "127.0.0.2" if LOOPBACK in allowed else LOOPBACK
    try:
        with _sockets(port) as found:
            listening = [each for each in found if _listens(each)]
            for each in listening:
                _attach(each, _program(allowed))
        kept = bool(listening) and not _answers(other, port)
        with _sockets(port) as found:  # among them, who came in before the filter was there
            for each in found:
                if not _listens(each) and _local(each) not in allowed:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
    except OSError as error:
        raise _unbound(host, port, str(error.strerror)) from error
    if not kept:
        raise _unbound(host, port, "the system has taken no packet filter")


def _unbound(host: str, port: int, reason: str) -> UserError:
    return UserError(
        f"Port {port} cannot be kept to {host} ({reason}): run on Linux itself, or let the replay server "
        f"answer at every address with --replay.host {EVERYWHERE[0]}, where nobody else can reach them."
    )


@contextlib.contextmanager
def _sockets(port: int) -> Iterator[list[socket.socket]]:
    """Second handles on this process's TCP sockets of that local port."""
    with contextlib.ExitStack() as handles:
        found = []
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile by another thread
                if not stat.S_ISSOCK(os.fstat(int(entry)).st_mode):
                    continue
                each = handles.enter_context(socket.socket(fileno=os.dup(int(entry))))
                if each.family in (socket.AF_INET, socket.AF_INET6) and each.getsockname()[1] == port:
                    found.append(each)
        yield found


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _local(each: socket.socket) -> str:
    return str(each.getsockname()[0]).removeprefix("::ffff:")


def _program(allowed: Sequence[str]) -> list[_Instruction]:
    """Accepts packets whose destination is one of the addresses, drops all others."""
    program: list[_Instruction] = []
    for number in map(ip_address, allowed):
        words = struct.unpack(f">{len(number.packed) // 4}I", number.packed)
        # Each test jumps, where it fails, behind this address's part.
        left = 2 * len(words) + 1
        program += [
            (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
            (_SHIFT_RIGHT, 0, 0, 4),
            (_JUMP_EQUAL, 0, left, number.version),
        ]
        for index, word in enumerate(words):
            left -= 2
            offset = _NETWORK_HEADER + _DESTINATION[number.version] + 4 * index
            program += [(_LOAD_WORD, 0, 0, offset), (_JUMP_EQUAL, 0, left, word)]
        program.append((_RETURN, 0, 0, _ACCEPT))
    return [*program, (_RETURN, 0, 0, _DROP)]


def _attach(each: socket.socket, program: list[_Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    each.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code))
    )


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_PROBE_SECONDS):
            return True
    except OSError:
        return False
