"""Who can reach the replay server; tried with real connections, for the socket table shows every address."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psutil
import pytest

from common.types import UserError
from replay import binding
from tests.network import reaches

LOOPBACK, OTHER = "127.0.0.1", "127.0.0.2"


def own_addresses() -> list[str]:
    """This machine's addresses that other machines may know, as far as they need no scope."""
    found = [a for each in psutil.net_if_addrs().values() for a in each]
    kinds = (socket.AF_INET, socket.AF_INET6)
    local = ("127.", "::1", "fe80")
    return [a.address for a in found if a.family in kinds and not a.address.startswith(local)]


OWN = own_addresses()


def has_six() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


SIX = ["::1"] if has_six() else []


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Listens as Reverb does: on every address, of both kinds."""
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        if SIX
        else socket.create_server(("", 0))
    ) as server:
        yield server


def port_of(listener: socket.socket) -> int:
    return listener.getsockname()[1]


def test_without_it_every_address_answers(listener: socket.socket) -> None:
    assert all(reaches(host, port_of(listener)) for host in (LOOPBACK, OTHER, *OWN))


@pytest.mark.parametrize("host", [LOOPBACK, *SIX])
def test_loopback_is_both_loopback_addresses_and_no_other(listener: socket.socket, host: str) -> None:
    binding.keep_to(host, port_of(listener))
    assert all(reaches(each, port_of(listener)) for each in (LOOPBACK, *SIX))
    assert not any(reaches(each, port_of(listener)) for each in (OTHER, *OWN))


@pytest.mark.parametrize("host", [OTHER, *OWN])
def test_one_address_is_that_address_alone(listener: socket.socket, host: str) -> None:
    binding.keep_to(host, port_of(listener))
    for each in (LOOPBACK, OTHER, *SIX, *OWN):
        assert reaches(each, port_of(listener)) == (each == host), each


@pytest.mark.parametrize("host", binding.EVERYWHERE)
def test_all_addresses_when_asked_for(listener: socket.socket, host: str) -> None:
    binding.keep_to(host, port_of(listener))
    assert all(reaches(each, port_of(listener)) for each in (LOOPBACK, OTHER, *OWN))


def test_other_ports_of_the_process_are_left_alone(listener: socket.socket) -> None:
    with socket.create_server(("", 0)) as other:
        binding.keep_to(LOOPBACK, port_of(listener))
        assert reaches(OTHER, port_of(other))


def test_whoever_came_in_before_is_put_out(listener: socket.socket) -> None:
    early = socket.create_connection((OTHER, port_of(listener)), timeout=1.0)
    welcome = socket.create_connection((LOOPBACK, port_of(listener)), timeout=1.0)
    accepted = [listener.accept()[0] for _ in range(2)]
    binding.keep_to(LOOPBACK, port_of(listener))
    assert early.recv(1) == b""  # the end of the connection
    accepted[1].sendall(b"x" * 300_000)  # larger than one packet: the filter must not cut any
    received = 0
    while received < 300_000:
        received += len(welcome.recv(65_536))
    for each in (early, welcome, *accepted):
        each.close()


def test_a_filter_that_has_no_effect_is_noticed(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "_attach", lambda each, program: None)
    with pytest.raises(UserError, match=r"cannot be kept to 127\.0\.0\.1 .*--replay\.host 0\.0\.0\.0"):
        binding.keep_to(LOOPBACK, port_of(listener))


def test_a_filter_that_is_refused_is_an_error(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(binding, "_SO_ATTACH_FILTER", 9_999)
    with pytest.raises(UserError, match="Protocol not available"):
        binding.keep_to(LOOPBACK, port_of(listener))


def test_a_port_where_nobody_listens_is_an_error(listener: socket.socket) -> None:
    port = port_of(listener)
    listener.close()
    with pytest.raises(UserError, match="cannot be kept"):
        binding.keep_to(LOOPBACK, port)


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "localhost", "nonsense"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(UserError, match="is no address of this machine"):
        binding.check_host(host)


def test_what_the_setting_means() -> None:
    assert binding.chosen_host("auto", "10.0.0.7") == "10.0.0.7"
    assert binding.chosen_host("0.0.0.0", "10.0.0.7") == "0.0.0.0"
    assert binding.reached_at("0.0.0.0", "10.0.0.7") == "10.0.0.7"
    assert binding.reached_at("10.0.0.8", "10.0.0.7") == "10.0.0.8"
    assert binding.address("10.0.0.7", 5) == "10.0.0.7:5"
    assert binding.address("fd00::2", 5) == "[fd00::2]:5"


# --- the server itself ----------------------------------------------------------------------------


def test_a_replay_server_answers_on_loopback_alone(serve) -> None:
    server = serve()
    assert server.info().size == 0
    assert reaches(LOOPBACK, server.port)
    assert not any(reaches(host, server.port) for host in (OTHER, *OWN))


def test_a_replay_server_answers_at_one_other_address(serve) -> None:
    server = serve(host=OTHER)
    assert server.info().size == 0  # its own client, too, goes to that address
    assert [host for host in (LOOPBACK, OTHER, *OWN) if reaches(host, server.port)] == [OTHER]


def test_a_replay_server_answers_everywhere_when_asked(serve) -> None:
    server = serve(host="0.0.0.0")
    assert server.info().size == 0
    assert all(reaches(host, server.port) for host in (LOOPBACK, OTHER, *OWN))


def test_a_replay_server_refuses_the_address_of_another_machine(serve) -> None:
    with pytest.raises(UserError, match=r"replay\.host 203\.0\.113\.7 is no address of this machine"):
        serve(host="203.0.113.7")
