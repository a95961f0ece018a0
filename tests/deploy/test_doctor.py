"""The doctor: what it concludes from what it finds, and that nothing it asks can hang or kill it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from deploy import doctor, probes, stack
from deploy.probes import Check

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str]]]:
    """Sets what the next probes find: (facts, why not). Returns the list that records their calls."""

    def prepare(*found: tuple[dict, str]) -> list[tuple[str, str]]:
        asked, rest = [], list(found)

        def probe(code: str, argument: str = "", *, seconds: float, env=None) -> tuple[dict, str]:
            asked.append((argument, (env or {}).get("MUJOCO_GL", "")))
            return rest.pop(0)

        monkeypatch.setattr(probes, "probe", probe)
        return asked

    return prepare


def report(width: int = 100) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=width)
    code = doctor.run_doctor(console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


# ------------------------------------------------------------------------------------- the report


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_only_failures_count(monkeypatch: pytest.MonkeyPatch, status, code: int) -> None:
    found = Check("colour", status, "[red]", "paint it")
    monkeypatch.setattr(doctor, "CHECKS", (("colour", lambda name: found),))
    result, text = report()
    assert result == code
    assert text.splitlines()[0].split() == [status, "colour", "[red]"]
    assert "-> paint it" in text
    assert ("Failed: colour." in text) == bool(code)


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (("broken", lambda name: 1 / 0), ("next", lambda name: Check(name, "ok", "fine")))
    monkeypatch.setattr(doctor, "CHECKS", checks)
    heard = []
    broken, after = doctor.checks(announce=heard.append)
    assert (broken.status, after.status) == ("fail", "ok")
    assert "ZeroDivisionError" in broken.detail
    assert heard == ["broken", "next"]


def test_importing_the_doctor_is_cheap() -> None:
    code = "import sys, deploy.doctor; print({'jax', 'ray', 'reverb', 'mujoco', 'wandb'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=probes.ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------ the probes


def test_probe_brings_facts() -> None:
    code = (
        "import os, sys; print('noise'); facts = {'sum': 1 + 1, 'env': os.environ['A'], 'arg': sys.argv[2]}"
    )
    assert probes.probe(code, "x", seconds=20, env={"A": "b"}) == ({"sum": 2, "env": "b", "arg": "x"}, "")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import os; os._exit(3)", "ended with exit code 3"),
        ("raise SystemExit(4)", "SystemExit: 4"),
    ],
)
def test_probe_says_why_not(code: str, why: str) -> None:
    assert probes.probe(code, seconds=20) == ({}, why)


def test_probe_ends_in_time_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        "open(sys.argv[2], 'w').write(str(child.pid)); child.wait()"
    )
    start = time.monotonic()
    assert probes.probe(code, str(tmp_path / "pid"), seconds=2) == ({}, "no answer within 2 s")
    assert time.monotonic() - start < 20
    child = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail("the probe's child is still running")


@pytest.mark.parametrize(
    ("facts", "cards", "platforms", "status", "hint"),
    [
        ({"backend": "cpu", "kinds": ["cpu"]}, [], None, "ok", ""),
        ({"backend": "gpu", "kinds": ["A card"]}, ["A card"], None, "ok", ""),
        ({"backend": "cpu", "kinds": ["cpu"]}, ["A card"], None, "warn", "run `make setup CUDA=1`"),
        (
            {"backend": "cpu", "kinds": ["cpu"]},
            ["A card"],
            "cpu",
            "warn",
            "unset JAX_PLATFORMS, which is 'cpu'",
        ),
    ],
)
def test_accelerator(answers, monkeypatch, facts, cards, platforms, status, hint) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(probes, "cuda_cards", lambda: cards)
    answers(({"version": "0.6.2", **facts}, ""))
    check = probes.accelerator("accelerator")
    assert (check.status, check.hint) == (status, hint)
    assert facts["kinds"][0] in check.detail


def test_broken_jax(answers) -> None:
    answers(({}, "ImportError: jaxlib"))
    check = probes.accelerator("accelerator")
    assert (check.status, check.hint) == ("fail", "run `make setup`")
    assert "ImportError: jaxlib" in check.detail


@pytest.mark.parametrize(
    ("body", "cards"),
    [("echo 'A card'; echo 'B card'", ["A card", "B card"]), ("echo no driver; exit 9", []), (None, [])],
)
def test_cuda_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str | None, cards: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if body is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert probes.cuda_cards() == cards


@pytest.mark.parametrize(
    ("found", "status", "modes"),
    [
        ([({"mb": 80.0}, "")], "ok", ["lite"]),
        ([({}, "lite broke"), ({"mb": 500.0}, "")], "warn", ["lite", "full"]),
        ([({}, "lite broke"), ({}, "full broke")], "fail", ["lite", "full"]),
    ],
)
def test_reverb(answers, monkeypatch: pytest.MonkeyPatch, found, status: str, modes: list[str]) -> None:
    monkeypatch.setattr(probes, "stack", lambda: "classic")
    monkeypatch.setattr(probes.importlib.metadata, "version", lambda package: "0.14.0")
    asked = answers(*found)
    check = probes.reverb("reverb")
    assert check.status == status
    assert [argument for argument, _ in asked] == modes


def test_reverb_that_was_lost(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(probes, "stack", lambda: "classic")
    monkeypatch.setattr(probes.importlib.metadata, "version", lost)
    assert probes.reverb("reverb") == Check(
        "reverb", "fail", "dm-reverb is not installed", "run `make setup`"
    )


def test_no_reverb_is_no_failure_where_none_exists(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack.sys, "version_info", (3, 13, 0))
    asked = answers()
    check = probes.reverb("reverb")
    assert (check.status, check.hint) == ("ok", "")
    assert check.detail == "replay in memory: there is no Reverb for Python 3.13"
    assert not asked


@pytest.mark.parametrize(
    ("found", "status", "detail"),
    [
        ([({"contrast": 9}, "")], "ok", "MUJOCO_GL=egl"),
        ([({}, "no EGL"), ({"contrast": 9}, "")], "ok", "MUJOCO_GL=osmesa"),
        ([({"contrast": 0}, ""), ({"contrast": 9}, "")], "ok", "MUJOCO_GL=osmesa"),
        ([({}, "no EGL"), ({}, "no OSMesa")], "warn", "no EGL; osmesa: no OSMesa"),
    ],
)
def test_rendering(answers, found, status: str, detail: str) -> None:
    asked = answers(*found)
    check = probes.rendering("rendering")
    assert check.status == status
    assert detail in check.detail
    assert [backend for _, backend in asked] == ["egl", "osmesa"][: len(found)]


def test_missing_debian_packages_are_named(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"GLESv2": "libGLESv2.so.2"}
    monkeypatch.setattr("ctypes.util.find_library", there.get)
    answers(({}, "no"), ({}, "no"))
    assert probes.rendering("rendering").hint == "Debian, Ubuntu: apt-get install libegl1 libosmesa6"


def test_macos_is_asked_for_its_own_opengl(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    asked = answers(({}, "no context"))
    check = probes.rendering("rendering")
    assert check.detail == "no videos, no camera observations (cgl: no context)"
    assert "apt-get" not in check.hint
    assert [backend for _, backend in asked] == ["cgl"]


def test_ray_leaves_no_files(answers) -> None:
    asked = answers(({}, "no answer within 120 s"))
    check = probes.ray("ray")
    assert (check.status, check.detail) == ("fail", "does not start: no answer within 120 s")
    assert not os.path.exists(asked[0][0])


def test_ray_needs_a_folder_to_write_in(answers) -> None:
    answers(({"version": "2", "seconds": 1.0, "place": "/tmp/ray", "writable": False}, ""))
    check = probes.ray("ray")
    assert (check.status, check.detail) == ("fail", "this user cannot write in /tmp/ray")
    assert "RAY_TMPDIR" in check.hint


REFUSED = "Port 7 cannot be kept to 127.0.0.1 (Not allowed): run it elsewhere, or: not at all."


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (({"refused": ""}, ""), ("ok", "can be kept to 127.0.0.1 by this user", "")),
        (({"refused": REFUSED}, ""), ("fail", *REFUSED.split(": ", 1))),
        (
            ({}, "it crashed"),
            ("fail", "whether one can be kept cannot be tried: it crashed", "run `make setup`"),
        ),
    ],
)
def test_replay_port(answers, monkeypatch: pytest.MonkeyPatch, found, expected) -> None:
    monkeypatch.setattr(probes, "reverb_exists", lambda: True)
    answers(found)
    check = probes.port("replay port")
    assert (check.status, check.detail, check.hint) == expected


def test_a_port_that_cannot_be_kept_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from replay import binding; binding._SO_ATTACH_REUSEPORT_CBPF = 9_999\n"
    monkeypatch.setattr(probes, "reverb_exists", lambda: True)
    monkeypatch.setattr(probes, "_PORT", code + probes._PORT)
    check = probes.port("replay port")
    assert check.status == "fail"
    assert re.fullmatch(r"Port \d+ cannot be kept to 127\.0\.0\.1 \(Protocol not available\)", check.detail)
    assert "--replay.server memory" in check.hint


def test_without_reverb_no_port_is_needed(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "reverb_exists", lambda: False)
    asked = answers()
    assert probes.port("replay port") == Check("replay port", "ok", "replay in memory opens no port")
    assert not asked


def test_this_machine_can_train() -> None:
    assert probes.accelerator("accelerator").status != "fail"
    assert probes.reverb("reverb").status == "ok"
    assert probes.port("replay port").status == "ok"
    assert probes.rendering("rendering").status in ("ok", "warn")


@pytest.mark.slow
def test_ray_starts_here() -> None:
    check = probes.ray("ray")
    assert check.status == "ok", check.detail


# ----------------------------------------------------------------------------- what there is


@pytest.mark.parametrize(("amount", "status"), [(0.4, "fail"), (0.5, "warn"), (4.9, "warn"), (5.0, "ok")])
def test_bounds(amount: float, status: str) -> None:
    check = doctor.rated("disk", amount, "GB", warn=5, fail=0.5, hint="free some space")
    assert check.status == status
    assert bool(check.hint) == (status != "ok")


@pytest.mark.parametrize(
    ("version", "status", "detail"),
    [
        ((3, 11), "ok", "classic packages"),
        ((3, 12), "ok", "modern packages"),
        ((3, 13), "ok", "modern packages"),
        ((3, 10), "fail", ""),
        ((3, 14), "fail", ""),
    ],
)
def test_python(monkeypatch: pytest.MonkeyPatch, version, status: str, detail: str) -> None:
    monkeypatch.setattr(stack.sys, "version_info", (*version, 0))
    check = doctor.python("python")
    assert check.status == status
    assert check.detail.endswith(detail)
    assert ("Python 3.11, 3.12 or 3.13" in check.hint) == (status == "fail")


@pytest.mark.parametrize(
    ("version", "place", "status", "hint"),
    [
        ((3, 11), ("Linux", "x86_64"), "ok", ""),
        ((3, 12), ("Linux", "aarch64"), "ok", ""),
        ((3, 13), ("Darwin", "arm64"), "ok", ""),
        ((3, 11), ("Linux", "aarch64"), "fail", "`make setup PYTHON=modern` does without it"),
        ((3, 13), ("Darwin", "x86_64"), "fail", "packages for Linux x86_64, Linux aarch64, Darwin arm64"),
        ((3, 11), ("Windows", "AMD64"), "fail", "use such a machine or container"),
    ],
)
def test_platform(monkeypatch: pytest.MonkeyPatch, version, place, status: str, hint: str) -> None:
    monkeypatch.setattr(stack.sys, "version_info", (*version, 0))
    monkeypatch.setattr(doctor.platform, "system", lambda: place[0])
    monkeypatch.setattr(doctor.platform, "machine", lambda: place[1])
    check = doctor.system("platform")
    assert check.status == status
    assert check.detail.startswith(" ".join(place))
    assert hint in check.hint


@pytest.mark.parametrize("version", [(3, 11), (3, 13)])
@pytest.mark.parametrize("cuda", [False, True])
def test_packages_are_compared_with_their_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version, cuda: bool
) -> None:
    Package = namedtuple("Package", "name version")
    there = [Package("jax", "1.2"), Package("pyyaml", "6.0"), *([Package("jax-cuda13-pjrt", "1")] * cuda)]
    monkeypatch.setattr(doctor.importlib.metadata, "distributions", lambda: there)
    monkeypatch.setattr(stack.sys, "version_info", (*version, 0))
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    lock = tmp_path / stack.lock(cuda=cuda)
    lock.parent.mkdir()
    lock.write_text("# made by\njax==1.2\nPyYAML==0.1\nno-such==1.0\n")
    check = doctor.packages("packages")
    assert (check.status, check.hint) == ("warn", "run `make setup`")
    kind = {(3, 11): "classic", (3, 13): "modern"}[version] + ("-cuda" if cuda else "")
    assert check.detail == f"2 of 3 not as in requirements/{kind}.lock: PyYAML 6.0, no-such missing"
    lock.write_text("jax==1.2\n")
    assert doctor.packages("packages").status == "ok"


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    available = namedtuple("memory", "available")(64_000_000_000)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: available)
    assert doctor.memory("memory").detail == "64 GB free"
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("3500000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1500000000\nactive_file 7\n")
    check = doctor.memory("memory")
    assert (check.status, check.detail) == ("warn", "2 GB free")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory("memory").detail == "64 GB free"


def test_cores_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert doctor.cores("cores").detail == "3 usable"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    check = doctor.cores("cores")
    assert (check.status, check.detail) == ("warn", "1.5 usable")


def test_what_only_linux_has_is_not_missed_elsewhere(
    answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    monkeypatch.delattr(doctor.os, "sched_getaffinity")
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(probes.sys, "platform", "darwin")
    assert doctor.cores("cores") == Check("cores", "ok", "8 usable")
    assert doctor.shared_memory("/dev/shm") == Check("/dev/shm", "ok", "not used on Darwin")
    asked = answers(({"contrast": 9}, ""))
    assert probes.rendering("rendering") == Check("rendering", "ok", "MUJOCO_GL=cgl")
    assert asked == [("", "cgl")]


def test_fullest_disk_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {os.getcwd(): 50e9, "/elsewhere": 1e9}
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/elsewhere")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: USAGE(0, 0, free[path]))
    check = doctor.disk("disk")
    assert (check.status, check.detail) == ("warn", "1 GB free in /elsewhere")


@pytest.mark.parametrize(("size", "status"), [(64e6, "warn"), (2e9, "ok")])
def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch, size: float, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: USAGE(size, 0, size))
    assert doctor.shared_memory("/dev/shm").status == status


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


SECRET = "0123456789abcdef"


def login_by_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return "logged in by WANDB_API_KEY"


def login_by_netrc(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {SECRET}\n")
    (home / ".netrc").chmod(0o600)
    return f"logged in by {home}/.netrc"


def login_by_named_netrc(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (home / "other").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    monkeypatch.setenv("NETRC", str(home / "other"))
    return f"logged in by {home}/other"


def login_by_settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"[default]\napi_key = {SECRET}\n")
    return f"logged in by {home}/.config/wandb/settings"


def login_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    login_by_netrc(home, monkeypatch)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    return "not logged in"


def no_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return "not logged in"


@pytest.mark.parametrize(
    "login",
    [
        login_by_environment,
        login_by_netrc,
        login_by_named_netrc,
        login_by_settings,
        login_elsewhere,
        no_login,
    ],
)
def test_wandb_login(home: Path, monkeypatch: pytest.MonkeyPatch, login) -> None:
    expected = login(home, monkeypatch)
    check = doctor.wandb("wandb")
    assert check.status == "ok"
    assert check.detail.startswith(expected)
    assert SECRET not in check.detail + check.hint


def test_a_user_without_a_home_is_not_logged_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as under a user id without a name
    monkeypatch.delenv("HOME")
    assert doctor.wandb("wandb").detail.startswith("not logged in")


def test_broken_wandb_settings(home: Path) -> None:
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"api_key = {SECRET}\n")
    check = doctor.wandb("wandb")
    assert check.status == "warn"
    assert SECRET not in check.detail + check.hint
