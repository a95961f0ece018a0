"""Keeps a listening port to one address of this machine. Needs no privilege (Linux from 4.6 on).

Reverb listens on every address and has no option for another choice. But its socket shares its port with
others of the same user (`man 7 socket`: SO_REUSEPORT), and a program that one of them brings along chooses
who gets a connection (SO_ATTACH_REUSEPORT_CBPF). So a socket of ours listens there before Reverb does, with
a program that gives Reverb what was sent to the one address, and ours everything else. Ours accepts nothing
and its queue is full, so that the kernel drops what it is given: from elsewhere nothing seems to be there.
A packet filter (SO_ATTACH_FILTER) would do the same, but newer kernels let only administrators have one.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Sequence
from ipaddress import ip_address

from common.types import UserError

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")
AUTO = "auto"  # of `replay.host`

_LOOPBACK = (LOOPBACK, "::1")
_PROBE_SECONDS = 0.2  # a connection within the machine needs far less than a millisecond
_SERVED_SECONDS = 5.0  # but a machine that does much else may be late with one that must come

# Classic BPF (linux/filter.h, linux/bpf_common.h): (operation, jump if true, jump if false, operand).
_SO_ATTACH_REUSEPORT_CBPF = 51
_NETWORK_HEADER = 0xFFF00000  # SKF_NET_OFF: offsets from here are into the IP header
_LOAD_BYTE, _LOAD_WORD, _SHIFT_RIGHT, _JUMP_EQUAL, _RETURN = 0x30, 0x20, 0x74, 0x15, 0x06
_DESTINATION = {4: 16, 6: 24}  # where an IP header of that version holds its destination
_NOBODY, _SERVER = 0, 1  # who gets a connection: sockets of a port are numbered as they began to listen
_QUEUE = 1  # a queue of that length holds one connection more

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


class Gate:
    """Lets a server at `port` have only what was sent to `host`; loopback is 127.0.0.1 and ::1.

    Make it before the server listens, `check` it when the server does, and close it after the server. Raises
    UserError when the port cannot be kept to the address.
    """

    def __init__(self, host: str, port: int):
        self._host, self._port = host, port
        self._allowed = _LOOPBACK if host in _LOOPBACK else (host,)
        self._nobody: socket.socket | None = None
        if host in EVERYWHERE:
            return
        try:
            self._nobody = _sharing(port)
            _choose(self._nobody, _program(self._allowed))
            self._nobody.listen(_QUEUE)
        except OSError as error:
            self.close()
            raise _unbound(host, port, str(error.strerror)) from error
        for _ in range(_QUEUE + 1):  # while there is no server, all of them wait here
            _answers(host, port, _PROBE_SECONDS)

    def check(self) -> None:
        """Tries the port at the address and at another one."""
        if self._nobody is None:
            return
        other = "127.0.0.2" if LOOPBACK in self._allowed else LOOPBACK
        if _answers(other, self._port, _PROBE_SECONDS):
            raise _unbound(self._host, self._port, f"it answers at {other}, too")
        if not _answers(self._host, self._port, _SERVED_SECONDS):
            raise _unbound(self._host, self._port, "it does not answer there")

    def close(self) -> None:
        """Frees the port."""
        if self._nobody is not None:
            self._nobody.close()


def rehearse(host: str = LOOPBACK) -> None:
    """Keeps a free port to the address for a moment. Raises UserError where this user cannot."""
    with _sharing(0) as server, contextlib.closing(Gate(host, server.getsockname()[1])) as gate:
        server.listen()
        gate.check()


def _unbound(host: str, port: int, reason: str) -> UserError:
    return UserError(
        f"Port {port} cannot be kept to {host} ({reason}): train with --replay.server memory, which opens "
        f"none, or, where no stranger reaches this machine, with --replay.host {EVERYWHERE[0]}."
    )


def _has_six() -> bool:
    """Whether gRPC, and so Reverb, listens on a socket of IPv6 (for IPv4 as well): its own test for that."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _sharing(port: int) -> socket.socket:
    """A socket at every address of the port (0: a free one) that others of this user may have, too."""
    each = socket.socket(socket.AF_INET6 if _has_six() else socket.AF_INET)
    try:
        if each.family == socket.AF_INET6:
            each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind(("", port))
    except OSError:
        each.close()
        raise
    return each


def _choose(each: socket.socket, program: list[_Instruction]) -> None:
    """From now on the program chooses among the sockets of this one's port."""
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    described = struct.pack("@HP", len(program), ctypes.addressof(code))
    each.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, described)


def _program(allowed: Sequence[str]) -> list[_Instruction]:
    """Connections to one of the addresses are the server's, all others nobody's."""
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
        program.append((_RETURN, 0, 0, _SERVER))
    return [*program, (_RETURN, 0, 0, _NOBODY)]


def _answers(host: str, port: int, seconds: float) -> bool:
    try:
        with socket.create_connection((host, port), timeout=seconds):
            return True
    except OSError:
        return False
