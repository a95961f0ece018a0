"""The set-up: when it does what, and what it says where it can not."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import bootstrap
import machine
import pytest
from machine import SetupError

ROOT = Path(__file__).resolve().parents[2]
PIN = re.compile(r"[a-z0-9-]+==[0-9][\w.]*")


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def python_says(path: Path, answer: str) -> Path:
    """A stand-in for an interpreter that answers the question for its version."""
    return script(path, f"echo '{answer}'")


# ---------------------------------------------------------------------------------------- the locks


@pytest.mark.parametrize("lock", bootstrap.LOCKS.values())
def test_locks_hold_pins_and_nothing_else(lock: str) -> None:
    pins = bootstrap.pins(ROOT / lock)
    assert len(pins) > 100
    assert [pin for pin in pins if not PIN.fullmatch(pin)] == []


def test_cuda_lock_only_adds_to_the_cpu_lock() -> None:
    cpu, cuda = (set(bootstrap.pins(ROOT / lock)) for lock in bootstrap.LOCKS.values())
    assert cpu < cuda
    assert {pin.split("-")[0] for pin in cuda - cpu} == {"jax", "nvidia"}


def test_everything_asked_for_is_in_the_lock() -> None:
    locked = {pin.split("==")[0]: pin for pin in bootstrap.pins(ROOT / "requirements.lock")}
    for wish in bootstrap.pins(ROOT / "requirements.in"):
        name, _, version = re.sub(r"\[.*\]", "", wish).partition("==")
        assert locked[bootstrap.canonical(name)].endswith(f"=={version}" if version else "")


@pytest.mark.parametrize("file", sorted((ROOT / "tools").glob("*.py")))
def test_tools_are_read_by_old_pythons(file: Path) -> None:
    ast.parse(file.read_text(), feature_version=(3, 6))


# ------------------------------------------------------------------------- when it does what


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A checkout whose installing is faked, and the list of what was done."""
    root, done = tmp_path / "checkout", []
    root.mkdir()
    (root / "pyproject.toml").write_text("one")
    (root / "requirements.lock").write_text("# comment\njax==0.6.2\nml-dtypes==0.5.4\n")
    (root / "requirements-cuda.lock").write_text("jax==0.6.2\njax-cuda12-plugin==0.6.2\n")

    def make_venv(python: str, venv: Path) -> None:
        done.append("venv")
        (venv / "bin").mkdir(parents=True)
        python_says(venv / "bin" / "python", "cpython True 3 11")

    def install_lock(venv: Path, lock: Path) -> None:
        done.append(lock.name)
        for pin in bootstrap.pins(lock):
            folder = pin.replace("-", "_").replace("==", "-") + ".dist-info"
            (venv / "lib" / "python3.11" / "site-packages" / folder).mkdir(parents=True)

    monkeypatch.setattr(bootstrap, "find_python", lambda venv: "python3.11")
    monkeypatch.setattr(bootstrap, "check_disk", lambda venv, needed_gb: None)
    monkeypatch.setattr(bootstrap, "make_venv", make_venv)
    monkeypatch.setattr(bootstrap, "install_lock", install_lock)
    monkeypatch.setattr(bootstrap, "install_project", lambda venv, root: done.append("project"))
    return root, done


ALL = ["venv", "requirements.lock", "project"]


def test_second_call_does_nothing(checkout: tuple[Path, list[str]]) -> None:
    root, done = checkout
    bootstrap.ensure(root)
    assert done == ALL
    bootstrap.ensure(root)
    assert done == ALL


def test_touched_files_are_not_changed_files(checkout: tuple[Path, list[str]]) -> None:
    root, done = checkout
    bootstrap.ensure(root)
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(root / name, (2e9, 2e9))
    bootstrap.ensure(root)
    assert done == ALL


def test_changed_project_is_installed_again_without_its_packages(checkout: tuple[Path, list[str]]) -> None:
    root, done = checkout
    bootstrap.ensure(root)
    (root / "pyproject.toml").write_text("two")
    bootstrap.ensure(root)
    assert done == [*ALL, "project"]
    bootstrap.ensure(root)
    assert done == [*ALL, "project"]


def change_lock(root: Path) -> Path:
    (root / "requirements.lock").write_text("jax==0.6.2\n")  # one less: what is there would do
    return root


def lose_package(root: Path) -> Path:
    shutil.rmtree(next((root / ".venv").rglob("ml_dtypes-*")))
    return root


def break_python(root: Path) -> Path:
    (root / ".venv/bin/python").unlink()
    return root


def newer_python(root: Path) -> Path:
    python_says(root / ".venv/bin/python", "cpython True 3 12")
    return root


def half_a_stamp(root: Path) -> Path:
    (root / ".venv" / bootstrap.STAMP).write_text('{"cuda": fal')
    return root


def move(root: Path) -> Path:
    return root.rename(root.with_name("moved"))


@pytest.mark.parametrize(
    "damage", [change_lock, lose_package, break_python, newer_python, half_a_stamp, move]
)
def test_damaged_environment_is_made_anew(checkout: tuple[Path, list[str]], damage) -> None:
    root, done = checkout
    bootstrap.ensure(root)
    root = damage(root)
    bootstrap.ensure(root)
    assert done == [*ALL, *ALL]
    bootstrap.ensure(root)
    assert done == [*ALL, *ALL]


def test_interrupted_set_up_is_made_anew(
    checkout: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, done = checkout

    def interrupt(venv: Path, root: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "install_project", interrupt)
        assert bootstrap.guarded(lambda: bootstrap.ensure(root)) == 130
    bootstrap.ensure(root)
    assert done == [*ALL[:2], *ALL]


def test_kind_of_packages_stays_until_it_is_changed(checkout: tuple[Path, list[str]]) -> None:
    root, done = checkout
    kinds = []
    for cuda in (None, True, None, False, None):
        bootstrap.ensure(root, cuda)
        kinds.append(bootstrap.read_stamp(root / ".venv")["cuda"])
    assert kinds == [False, True, True, False, False]
    assert done.count("venv") == 3


def test_two_at_once_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with bootstrap.one_at_a_time(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with bootstrap.one_at_a_time(tmp_path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "waiting" in capsys.readouterr().err


def test_foreign_folder_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").write_text("precious")
    with pytest.raises(SetupError, match="no Python environment"):
        bootstrap.remove(tmp_path / ".venv")
    assert (tmp_path / ".venv" / "thesis.txt").exists()


# ---------------------------------------------------------------------------------- installing


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[str]]:
    """Commands that were run, as text, and words that make a command fail."""
    ran, failing = [], set()

    def run(command: list[str], quiet: bool = False) -> bool:
        ran.append(" ".join(command))
        return not any(word in ran[-1] for word in failing)

    monkeypatch.setattr(bootstrap, "run", run)
    monkeypatch.setattr(bootstrap, "output_of", lambda command: "uv 1.0")
    return ran, failing


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "requirements.lock").write_text("jax==0.6.2\nuv==0.13.9\n")
    return tmp_path / "requirements.lock"


def test_uv_of_the_machine_installs_the_lock(commands, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    bootstrap.install_lock(Path("v"), lock)
    assert len(commands[0]) == 1
    assert re.fullmatch(
        rf"/bin/uv pip install --compile-bytecode .*--python v/bin/python --no-deps -r {lock}", commands[0][0]
    )


def test_uv_is_fetched_where_there_is_none(commands, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    bootstrap.install_lock(Path("v"), lock)
    fetch, install = commands[0]
    assert fetch.endswith("uv==0.13.9")
    assert install.startswith("v/bin/uv pip install")


@pytest.mark.parametrize(("fails", "said"), [("uv pip", "uv could not"), ("uv==", "uv is not to be had")])
def test_pip_takes_over(commands, lock: Path, monkeypatch, capsys, fails: str, said: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    commands[1].add(fails)
    bootstrap.install_lock(Path("v"), lock)
    assert re.fullmatch(rf"v/bin/python -m pip .*install .*--no-deps -r {lock}", commands[0][-1])
    assert said in capsys.readouterr().err


def test_no_index_is_said_clearly(commands, lock: Path) -> None:
    commands[1].add("install")
    with pytest.raises(SetupError, match="package index"):
        bootstrap.install_lock(Path("v"), lock)


def test_missing_venv_module_names_the_debian_package(
    commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    commands[1].add("venv")
    with pytest.raises(SetupError, match=r"python3\.11-venv"):
        bootstrap.make_venv("python3.11", tmp_path / ".venv")


def test_uv_makes_the_environment_where_python_can_not(
    commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    commands[1].add("-m venv")
    bootstrap.make_venv("python3.11", tmp_path / ".venv")
    assert commands[0][-1].startswith("/bin/uv venv")


# -------------------------------------------------------------------- what the machine must have


@pytest.mark.parametrize(
    ("system", "processor", "libc", "said"),
    [
        ("Darwin", "arm64", ("", ""), "Darwin arm64, but Reverb exists for Linux x86_64 only"),
        ("Linux", "aarch64", ("glibc", "2.36"), "Linux aarch64, but"),
        ("Linux", "x86_64", ("", ""), "another C library"),
        ("Linux", "x86_64", ("glibc", "2.17"), r"here is glibc 2\.17"),
    ],
)
def test_wrong_platform(monkeypatch: pytest.MonkeyPatch, system, processor, libc, said) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: system)
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: libc)
    with pytest.raises(SetupError, match=said):
        machine.check_platform()


def test_right_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.28"))
    machine.check_platform()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(10e9, 6.5e9, 3.5e9))
    machine.check_disk(tmp_path / ".venv", 3.5)
    with pytest.raises(SetupError, match=r"3\.5 GB are free for .*\.venv, but the packages need 4 GB"):
        machine.check_disk(tmp_path / ".venv", 4.0)


def test_replaced_environment_counts_as_room(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 100_000)
    (tmp_path / "two").write_bytes(b"x" * 500_000)
    os.link(tmp_path / "two", tmp_path.with_name(tmp_path.name + "-elsewhere"))
    assert 100_000 <= machine.size_of(tmp_path) < 200_000


def test_no_right_to_write() -> None:
    with pytest.raises(SetupError, match="cannot write to /proc/self"):
        machine.check_writable(Path("/proc/self"))


def test_python_is_looked_for_by_all_its_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/venv/bin:{tmp_path}/a:{tmp_path}/b")
    python_says(tmp_path / "venv/bin/python3.11", "cpython True 3 11")
    script(tmp_path / "a/python3.11", "exit 127")  # as pyenv's, with no such version chosen
    python_says(tmp_path / "a/python3", "cpython True 3 12")
    python_says(tmp_path / "a/python", "pypy True 3 11")
    uv = script(tmp_path / "b/uv", f"echo {tmp_path}/managed/python")
    managed = python_says(tmp_path / "managed/python", "cpython True 3 11")
    assert machine.find_python(tmp_path / "venv") == str(managed)
    uv.unlink()
    with pytest.raises(SetupError, match=r"python3 is 3\.12\. Install it"):
        machine.find_python(tmp_path / "venv")
    right = python_says(tmp_path / "b/python", "cpython True 3 11")
    assert machine.find_python(tmp_path / "venv") == str(right)


def test_failures_are_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(root: Path, cuda: bool | None) -> None:
        raise OSError(28, "No space left on device", "/x")

    monkeypatch.setattr(bootstrap, "ensure", full)
    assert bootstrap.main([]) == 2
    text = capsys.readouterr().err
    assert text.startswith("[setup] failed: [Errno 28] No space left on device: '/x'.")
    assert text.count("\n") == 1


# ----------------------------------------------------------------------------------- as a user


@pytest.mark.parametrize(
    ("there", "said"), [(True, "Python 3.11 is needed"), (False, "no Python here. Install Python 3.11")]
)
def test_make_train_without_python_311(tmp_path: Path, there: bool, said: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-cuda.lock"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    tools = tmp_path / "bin"
    if there:  # it runs the set-up, but says of itself that it is another version
        question = (
            f'case "$2" in *implementation*) echo cpython True 3 12;; *) exec {sys.executable} "$@";; esac'
        )
        script(tools / "python3", question)
    make = shutil.which("make")
    assert make is not None, "these tests are started by make"
    done = subprocess.run(
        [make, "train"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert said in first
    assert [re.sub(r"\[.*\]", "", line) for line in rest] == ["make: ***  Error 2"]
    assert done.stdout == ""
    assert not (tmp_path / ".venv").exists()
