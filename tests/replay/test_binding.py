"""Who can reach the replay server; tried with real connections, for the socket table shows every address."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from common.types import UserError
from replay import binding
from replay.server import free_ports
from tests import ordinary
from tests.network import reaches
from tests.stacks import needs_reverb

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


FAMILY = socket.AF_INET6 if SIX else socket.AF_INET


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@contextlib.contextmanager
def server(port: int, count: int = 1) -> Iterator[list[socket.socket]]:
    """Listens as Reverb does: on every address, of both kinds, shared; with more sockets if asked."""
    with contextlib.ExitStack() as opened:
        yield [opened.enter_context(listener(port)) for _ in range(count)]


def listener(port: int) -> socket.socket:
    return socket.create_server(("", port), family=FAMILY, dualstack_ipv6=bool(SIX), reuse_port=True)


@contextlib.contextmanager
def gate(host: str, port: int) -> Iterator[binding.Gate]:
    with contextlib.closing(binding.Gate(host, port)) as opened:
        yield opened


def test_without_it_every_address_answers(port: int) -> None:
    with server(port):
        assert all(reaches(host, port) for host in (LOOPBACK, OTHER, *OWN))


@pytest.mark.parametrize("host", [LOOPBACK, *SIX])
def test_loopback_is_both_loopback_addresses_and_no_other(port: int, host: str) -> None:
    with gate(host, port) as opened, server(port):
        opened.check()
        assert all(reaches(each, port) for each in (LOOPBACK, *SIX))
        assert not any(reaches(each, port) for each in (OTHER, *OWN))


@pytest.mark.parametrize("host", [OTHER, *OWN])
def test_one_address_is_that_address_alone(port: int, host: str) -> None:
    with gate(host, port) as opened, server(port):
        opened.check()
        for each in (LOOPBACK, OTHER, *SIX, *OWN):
            assert reaches(each, port) == (each == host), each


@pytest.mark.parametrize("host", binding.EVERYWHERE)
def test_all_addresses_when_asked_for(port: int, host: str) -> None:
    with gate(host, port) as opened, server(port):
        opened.check()
        assert all(reaches(each, port) for each in (LOOPBACK, OTHER, *OWN))


def test_other_ports_of_the_process_are_left_alone(port: int) -> None:
    (second,) = free_ports(1)
    with gate(LOOPBACK, port), server(port), server(second):
        assert reaches(OTHER, second)


def test_a_server_may_listen_with_several_sockets_and_close_some(port: int) -> None:
    with gate(LOOPBACK, port), server(port, 3) as sockets:
        for each in [*sockets[:2], None]:
            assert reaches(LOOPBACK, port)
            assert not reaches(OTHER, port)
            if each is not None:
                each.close()


def test_nobody_comes_in_before_the_server_and_its_clients_need_not_wait_long(port: int) -> None:
    with gate(LOOPBACK, port), concurrent.futures.ThreadPoolExecutor() as pool:
        assert not reaches(OTHER, port)
        early = pool.submit(socket.create_connection, (LOOPBACK, port), 10.0)
        time.sleep(0.2)
        assert not early.done()
        with server(port) as (taking,), early.result() as client, taking.accept()[0] as taken:
            taken.sendall(b"welcome")
            assert client.recv(7) == b"welcome"


def test_those_who_are_turned_away_leave_no_room_behind(port: int) -> None:
    with gate(LOOPBACK, port), server(port):
        assert not any(reaches(OTHER, port, seconds=0.02) for _ in range(50))
        assert reaches(LOOPBACK, port)


def test_a_closed_gate_frees_the_port_for_another(port: int) -> None:
    for host, closed in ((LOOPBACK, OTHER), (OTHER, LOOPBACK)):
        with gate(host, port) as opened, server(port):
            opened.check()
            assert not reaches(closed, port)
        with socket.socket() as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(("", port))


def test_a_choice_that_has_no_effect_is_noticed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_program", lambda allowed: [(binding._RETURN, 0, 0, binding._SERVER)])
    wanted = r"cannot be kept to 127\.0\.0\.1 .*127\.0\.0\.2, too.*--replay\.host 0\.0\.0\.0"
    with gate(LOOPBACK, port) as opened, server(port), pytest.raises(UserError, match=wanted):
        opened.check()


def test_a_choice_that_shuts_everybody_out_is_noticed(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_program", lambda allowed: [(binding._RETURN, 0, 0, binding._NOBODY)])
    monkeypatch.setattr(binding, "_SERVED_SECONDS", 0.3)
    with (
        gate(LOOPBACK, port) as opened,
        server(port),
        pytest.raises(UserError, match="it does not answer there"),
    ):
        opened.check()


def test_a_kernel_that_offers_no_choice_is_an_error(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "_SO_ATTACH_REUSEPORT_CBPF", 9_999)
    with pytest.raises(UserError, match="Protocol not available"):
        binding.Gate(LOOPBACK, port)
    with socket.create_server(("", port)):
        pass  # nothing is left at the port


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


# --- without privileges ---------------------------------------------------------------------------

REHEARSED = "import sys; from replay import binding; [binding.rehearse(host) for host in sys.argv[1:]]"


def test_no_privilege_is_needed() -> None:
    words = ordinary.needed("a port kept to an address without privileges")
    hosts = (LOOPBACK, OTHER, *SIX, *OWN)
    done = subprocess.run(
        [*words, sys.executable, "-c", REHEARSED, *hosts],
        cwd=ordinary.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# --- the server itself ----------------------------------------------------------------------------


def test_a_replay_server_answers_on_loopback_alone(serve_reverb) -> None:
    server = serve_reverb()
    assert server.info().size == 0
    assert reaches(LOOPBACK, server.port)
    assert not any(reaches(host, server.port) for host in (OTHER, *OWN))


def test_a_replay_server_answers_at_one_other_address(serve_reverb) -> None:
    server = serve_reverb(host=OTHER)
    assert server.info().size == 0  # its own client, too, goes to that address
    assert [host for host in (LOOPBACK, OTHER, *OWN) if reaches(host, server.port)] == [OTHER]


IN_A_NETWORK_OF_IPV4 = """
from common.config import ReplayConfig
from common.types import ArraySpec
from replay.server import ReplayServer
from tests.network import reaches
sizes = dict(batch_length=8, train_ratio=16.0, batch_size=4, min_steps=20)
server = ReplayServer({"is_first": ArraySpec((), "bool")}, ReplayConfig(), **sizes)
print([reaches(host, server.port) for host in ("127.0.0.1", "127.0.0.2", "::1")])
server.stop()
"""


@needs_reverb
def test_a_replay_server_without_ipv6() -> None:
    namespace = ["unshare", "--map-root-user", "--net", "sh", "-ec"]
    setup = "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"
    try:
        subprocess.run([*namespace, setup], check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"NOT TESTED, a network without IPv6: none can be made here ({reason})")
    done = subprocess.run(
        [*namespace, f'{setup}; exec "$@"', "sh", sys.executable, "-c", IN_A_NETWORK_OF_IPV4],
        cwd=ordinary.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "[True, False, False]", done.stderr


def test_a_replay_server_answers_everywhere_when_asked(serve_reverb) -> None:
    server = serve_reverb(host="0.0.0.0")
    assert server.info().size == 0
    assert all(reaches(host, server.port) for host in (LOOPBACK, OTHER, *OWN))


def test_a_replay_server_refuses_the_address_of_another_machine(serve_reverb) -> None:
    with pytest.raises(UserError, match=r"replay\.host 203\.0\.113\.7 is no address of this machine"):
        serve_reverb(host="203.0.113.7")
