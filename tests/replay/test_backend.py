import importlib.util
import platform
import subprocess
import sys

import pytest

from common.types import UserError
from replay import backend
from tests.stacks import needs_reverb

ROUND_TRIP = """
import sys
import numpy as np
from replay import backend
from replay.server import free_ports

reverb = backend.load(sys.argv[1])
assert ("tensorflow" in sys.modules) == (sys.argv[1] == "full")
table = reverb.Table(backend.TABLE, reverb.selectors.Uniform(), reverb.selectors.Fifo(), 10,
                     reverb.rate_limiters.MinSize(1))
server = reverb.Server([table], port=free_ports(1)[0])
client = backend.connect(f"localhost:{server.port}")
client.insert([np.float32(5)], {backend.TABLE: 1.0})
assert client.server_info(timeout=5)[backend.TABLE].current_size == 1
if sys.argv[1] == "lite":
    try:
        reverb.TFClient(client)
    except RuntimeError as error:
        assert "mode='full'" in str(error)
    else:
        raise AssertionError("a placeholder was usable")
# Not ru_maxrss: a child begins with that of the process which forked it.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("megabytes", int(peak.split()[1]) // 1024)
"""


def run(mode: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, mode],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **env},
    )


@needs_reverb
def test_lite_import_serves_and_is_small():
    done = run("lite")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200


@needs_reverb
@pytest.mark.slow
def test_full_import_serves():
    done = run("full")
    assert done.returncode == 0, done.stderr


@needs_reverb
def test_a_proxy_in_the_environment_is_not_used():
    done = run("lite", http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_a_platform_without_reverb_is_refused(monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(UserError, match=f"Linux x86_64.*this is {system} {machine}"):
        backend.load()


def test_a_python_without_reverb_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    with pytest.raises(UserError, match=r"CPython 3.8 to 3.11"):
        backend.load()


@needs_reverb
def test_a_missing_package_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "reverb", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reverb" else real(name))
    with pytest.raises(UserError, match=r"dm-reverb==0.14.0 is not installed"):
        backend.load()
