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
import stacks
from machine import Python, SetupError
from stacks import CLASSIC, LINUX_ARM, LINUX_X86, MAC_ARM, MODERN, STACKS

from deploy import stack

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


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("cuda", [False, True])
def test_locks_hold_pins_and_nothing_else(stack: stacks.Stack, cuda: bool) -> None:
    pins = bootstrap.pins(ROOT / stack.lock(cuda))
    assert len(pins) > 100
    assert [pin for pin in pins if not PIN.fullmatch(pin)] == []


@pytest.mark.parametrize("stack", STACKS)
def test_cuda_lock_only_adds_to_the_cpu_lock(stack: stacks.Stack) -> None:
    cpu, cuda = (set(bootstrap.pins(ROOT / stack.lock(cuda))) for cuda in (False, True))
    assert cpu < cuda
    assert {pin.split("-")[0] for pin in cuda - cpu} == {"jax", "nvidia"}


@pytest.mark.parametrize("stack", STACKS)
def test_everything_asked_for_is_in_the_lock(stack: stacks.Stack) -> None:
    locked = {pin.split("==")[0]: pin for pin in bootstrap.pins(ROOT / stack.lock(False))}
    own = bootstrap.pins(ROOT / stack.wishes(False))
    assert "-r common.in" in own
    for wish in [*own, *bootstrap.pins(ROOT / "requirements" / "common.in")]:
        name, _, version = re.sub(r"\[.*\]|^-r .*", "", wish).partition("==")
        if name and ">" not in name:
            assert locked[bootstrap.canonical(name)].endswith(f"=={version}" if version else "")


def test_only_the_classic_stack_has_reverb() -> None:
    heavy = re.compile(r"(dm-reverb|tensorflow)")
    assert [stack for stack in STACKS if heavy.search((ROOT / stack.lock(False)).read_text())] == [CLASSIC]


def test_the_program_and_its_set_up_know_the_same_stacks() -> None:
    assert {tuple(version): known.name for known in STACKS for version in known.pythons} == stack.PYTHONS
    for known in STACKS:
        assert tuple(" ".join(platform) for platform in known.platforms[False]) == stack.PLATFORMS[known.name]
    assert {known.lock(cuda) for known in STACKS for cuda in (False, True)} >= {
        stack.lock(),
        stack.lock(cuda=True),
    }
    assert f"Python {machine.SUPPORTED}" == stack.SUPPORTED


@pytest.mark.parametrize("file", sorted((ROOT / "tools").glob("*.py")))
def test_tools_are_read_by_old_pythons(file: Path) -> None:
    ast.parse(file.read_text(), feature_version=(3, 6))


# ------------------------------------------------------------------------- when it does what


class Checkout:
    """A checkout whose installing is faked: `ensure` as `make` calls it, and what it did, in `done`."""

    def __init__(self, root: Path) -> None:
        self.root, self.done = root, []

    def ensure(self, cuda: bool | None = None, python: str = "", venv: str = ".venv") -> list[str]:
        """Sets up; returns what was done this time."""
        self.done.clear()
        bootstrap.ensure(self.root, self.root / venv, cuda, python)
        return list(self.done)

    def make_venv(self, python: Python, venv: Path) -> None:
        self.done.append("venv")
        (venv / "bin").mkdir(parents=True)
        python_says(venv / "bin" / "python", f"cpython True 3 {python.version[1]}")

    def install_lock(self, venv: Path, lock: Path) -> None:
        self.done.append(lock.name)
        version = machine.version_of(str(venv / "bin" / "python"))
        assert version is not None
        for pin in bootstrap.pins(lock):
            folder = pin.replace("-", "_").replace("==", "-") + ".dist-info"
            (venv / "lib" / f"python{stacks.dotted(version)}" / "site-packages" / folder).mkdir(parents=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout on Linux x86_64 with Python 3.11 and 3.13."""
    made = Checkout(tmp_path / "checkout")
    (made.root / "requirements").mkdir(parents=True)
    (made.root / "pyproject.toml").write_text("one")
    for known in STACKS:
        (made.root / known.lock(False)).write_text("# comment\njax==0.6.2\nml-dtypes==0.5.4\n")
        (made.root / known.lock(True)).write_text("jax==0.6.2\njax-cuda12-plugin==0.6.2\n")
    for minor in (11, 13):
        python_says(tmp_path / f"bin/python3.{minor}", f"cpython True 3 {minor}")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{tmp_path}/more")
    monkeypatch.setattr(machine, "here", lambda: LINUX_X86)
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(bootstrap, "check_disk", lambda venv, needed_gb: None)
    monkeypatch.setattr(bootstrap, "make_venv", made.make_venv)
    monkeypatch.setattr(bootstrap, "install_lock", made.install_lock)
    monkeypatch.setattr(bootstrap, "install_project", lambda venv, root: made.done.append("project"))
    return made


ALL = ["venv", "classic.lock", "project"]
ALL_MODERN = ["venv", "modern.lock", "project"]


def test_second_call_does_nothing(checkout: Checkout) -> None:
    assert checkout.ensure() == ALL
    assert checkout.ensure() == []


def test_touched_files_are_not_changed_files(checkout: Checkout) -> None:
    checkout.ensure()
    for name in ("requirements/classic.lock", "pyproject.toml"):
        os.utime(checkout.root / name, (2e9, 2e9))
    assert checkout.ensure() == []


def test_changed_project_is_installed_again_without_its_packages(checkout: Checkout) -> None:
    checkout.ensure()
    (checkout.root / "pyproject.toml").write_text("two")
    assert checkout.ensure() == ["project"]
    assert checkout.ensure() == []
    shutil.rmtree(next((checkout.root / ".venv").rglob("ml_dtypes-*")))
    assert checkout.ensure() == ALL, "the packages are still known"


def change_lock(root: Path) -> Path:
    (root / "requirements/classic.lock").write_text("jax==0.6.2\n")  # one less: what is there would do
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
def test_damaged_environment_is_made_anew(checkout: Checkout, damage) -> None:
    checkout.ensure()
    checkout.root = damage(checkout.root)
    assert checkout.ensure() == ALL
    assert checkout.ensure() == []


def test_interrupted_set_up_is_made_anew(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(venv: Path, root: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "install_project", interrupt)
        assert bootstrap.guarded(checkout.ensure) == 130
    assert checkout.ensure() == ALL


def test_kind_of_packages_stays_until_it_is_changed(checkout: Checkout) -> None:
    did = [checkout.ensure(cuda) for cuda in (None, True, None, False, None)]
    assert [steps[1:2] for steps in did] == [
        ["classic.lock"],
        ["classic-cuda.lock"],
        [],
        ["classic.lock"],
        [],
    ]


def test_python_stays_until_it_is_changed(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    wishes = ("", "python3.13", "", "3.13", "modern", "3.11", "")
    did = [checkout.ensure(python=wish) for wish in wishes]
    assert [steps[1:2] for steps in did] == [
        ["classic.lock"],
        ["modern.lock"],
        [],
        [],
        [],
        ["classic.lock"],
        [],
    ]
    assert (
        ".venv has Python 3.11: installing modern.lock into .venv, with Python 3.13"
        in capsys.readouterr().err
    )


def test_python_that_was_chosen_by_its_path_is_found_again(checkout: Checkout, tmp_path: Path) -> None:
    python_says(tmp_path / "opt/python", "cpython True 3 12")
    assert checkout.ensure(python=str(tmp_path / "opt/python")) == ALL_MODERN
    (checkout.root / "requirements/modern.lock").write_text("jax==0.12.0.1\n")
    assert checkout.ensure() == ALL_MODERN
    assert bootstrap.read_stamp(checkout.root / ".venv")["python"] == "3.12"


def test_python_that_was_removed_is_replaced_by_another(checkout: Checkout, tmp_path: Path) -> None:
    checkout.ensure()
    (tmp_path / "bin/python3.11").unlink()
    assert checkout.ensure() == ALL_MODERN


def test_two_environments_live_beside_each_other(checkout: Checkout) -> None:
    assert checkout.ensure() == ALL
    assert checkout.ensure(python="modern", venv=".venv-modern") == ALL_MODERN
    assert checkout.ensure() == checkout.ensure(venv=".venv-modern") == []


def test_machine_without_reverb_takes_the_newest_python(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "here", lambda: MAC_ARM)
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    assert checkout.ensure() == ALL_MODERN
    with pytest.raises(SetupError, match=r"Use Python 3\.13 or 3\.12, as in: make train PYTHON=python3\.13"):
        checkout.ensure(python="3.11")


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
    (tmp_path / "some.lock").write_text("jax==0.6.2\nuv==0.13.9\n")
    return tmp_path / "some.lock"


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


@pytest.mark.parametrize("version", stacks.PYTHONS)
def test_missing_venv_module_names_the_debian_package(
    commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: stacks.Version
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    commands[1].add("venv")
    with pytest.raises(SetupError, match=rf"apt-get install python{stacks.dotted(version)}-venv\) or uv"):
        bootstrap.make_venv(Python("/usr/bin/python3", version), tmp_path / ".venv")


def test_uv_makes_the_environment_where_python_can_not(
    commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/uv")
    commands[1].add("-m venv")
    bootstrap.make_venv(Python("python3.11", (3, 11)), tmp_path / ".venv")
    assert commands[0][-1].startswith("/bin/uv venv")


# -------------------------------------------------------------------- what the machine must have


GLIBC = ("glibc", "2.28")


@pytest.mark.parametrize(
    ("stack", "cuda", "place", "libc", "said"),
    [
        (
            CLASSIC,
            False,
            MAC_ARM,
            ("", ""),
            r"Darwin arm64, but Reverb exists for .* Use Python 3\.13 or 3\.12",
        ),
        (CLASSIC, False, LINUX_ARM, GLIBC, "Linux aarch64, but Reverb exists for Linux x86_64 only"),
        (CLASSIC, True, LINUX_ARM, GLIBC, r"PYTHON=python3\.13"),
        (MODERN, False, ("Darwin", "x86_64"), ("", ""), "Darwin x86_64, but JAX and Ray have packages for"),
        (MODERN, True, MAC_ARM, ("", ""), "JAX has no CUDA packages for it. Use CUDA=0"),
        (CLASSIC, False, LINUX_X86, ("", ""), "another C library"),
        (MODERN, False, LINUX_X86, ("glibc", "2.17"), r"here is glibc 2\.17"),
    ],
)
def test_wrong_platform(monkeypatch: pytest.MonkeyPatch, stack, cuda, place, libc, said) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: place[0])
    monkeypatch.setattr(machine.platform, "machine", lambda: place[1])
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: libc)
    with pytest.raises(SetupError, match=said):
        machine.check_platform(stack, cuda)


@pytest.mark.parametrize(
    ("stack", "place", "libc"),
    [(CLASSIC, LINUX_X86, GLIBC), (MODERN, LINUX_ARM, GLIBC), (MODERN, MAC_ARM, ("", ""))],
)
def test_right_platform(monkeypatch: pytest.MonkeyPatch, stack, place, libc) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: place[0])
    monkeypatch.setattr(machine.platform, "machine", lambda: place[1])
    monkeypatch.setattr(machine.platform, "libc_ver", lambda: libc)
    machine.check_platform(stack, False)


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
    def find() -> str:
        return machine.find_python(tmp_path / "venv", [(3, 11)]).path

    monkeypatch.setenv("PATH", f"{tmp_path}/venv/bin:{tmp_path}/a:{tmp_path}/b")
    python_says(tmp_path / "venv/bin/python3.11", "cpython True 3 11")
    script(tmp_path / "a/python3.11", "exit 127")  # as pyenv's, with no such version chosen
    python_says(tmp_path / "a/python3", "cpython True 3 12")
    python_says(tmp_path / "a/python", "pypy True 3 11")
    kept = python_says(tmp_path / "kept/bin/python", "cpython True 3 11")
    pyenv = script(tmp_path / "b/pyenv", f"echo {tmp_path}/kept")
    assert find() == str(kept)
    uv = script(tmp_path / "b/uv", f"echo {tmp_path}/managed/python")
    managed = python_says(tmp_path / "managed/python", "cpython True 3 11")
    assert find() == str(managed)
    uv.unlink()
    pyenv.unlink()
    with pytest.raises(
        SetupError, match=r"Python 3\.11 is needed .*python3 is 3\.12\. Install it \(Debian 12"
    ):
        find()
    right = python_says(tmp_path / "b/python", "cpython True 3 11")
    assert find() == str(right)


@pytest.mark.parametrize(
    ("there", "place", "taken"),
    [
        ((9, 11, 12, 13), LINUX_X86, "3.11"),
        ((9, 12, 13, 14), LINUX_X86, "3.13"),
        ((12,), LINUX_X86, "3.12"),
        ((11, 12), LINUX_ARM, "3.12"),
        ((11, 13), MAC_ARM, "3.13"),
    ],
)
def test_first_supported_python_is_taken(tmp_path: Path, monkeypatch, there, place, taken: str) -> None:
    monkeypatch.setattr(machine, "here", lambda: place)
    monkeypatch.setenv("PATH", str(tmp_path))
    for minor in there:
        python_says(tmp_path / f"python3.{minor}", f"cpython True 3 {minor}")
    found = machine.choose_python("", tmp_path / "venv", cuda=False)
    assert found == (str(tmp_path / f"python{taken}"), machine.version_of(found.path))


def test_only_unsupported_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "here", lambda: LINUX_ARM)
    monkeypatch.setenv("PATH", str(tmp_path))
    python_says(tmp_path / "python3", "cpython True 3 14")
    said = r"Python 3\.13 or 3\.12 is needed and was not found; .*python3 is 3\.14\. Install it \(Debian 13"
    with pytest.raises(SetupError, match=said):
        machine.choose_python("", tmp_path / "venv", cuda=False)


@pytest.mark.parametrize(
    ("wish", "taken"),
    [
        ("3.12", "a/python3.12"),
        ("python3.12", "a/python3.12"),
        ("python3", "b/python3"),
        ("{}/b/python3", "b/python3"),
        ("modern", "a/python3.12"),
        ("classic", "b/python3"),
    ],
)
def test_chosen_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, taken: str) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/venv/bin:{tmp_path}/a:{tmp_path}/b")
    python_says(tmp_path / "venv/bin/python3", "cpython True 3 12")  # about to be removed
    python_says(tmp_path / "a/python3.12", "cpython True 3 12")
    script(tmp_path / "a/python3", "exit 127")
    python_says(tmp_path / "b/python3", "cpython True 3 11")
    found = machine.choose_python(wish.format(tmp_path), tmp_path / "venv", cuda=False)
    assert found.path == str(tmp_path / taken)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (
            "python3.14",
            r"PYTHON=python3\.14 is Python 3\.14, but there are packages for 3\.11, 3\.12 or 3\.13 only",
        ),
        ("old", r"PYTHON=old is Python 3\.9, but there are packages"),
        ("3.12", r"Python 3\.12 is needed and was not found.*\(Ubuntu 24\.04: apt-get install python3\.12"),
        ("nonsense", r"PYTHON=nonsense is no 64-bit CPython that runs here\. Choose another \(3\.11, "),
        ("/nowhere/python", r"PYTHON=/nowhere/python is no 64-bit CPython"),
    ],
)
def test_python_that_can_not_be_chosen(tmp_path: Path, monkeypatch, wish: str, said: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    python_says(tmp_path / "old", "cpython True 3 9")
    with pytest.raises(SetupError, match=said):
        machine.choose_python(wish, tmp_path / "venv", cuda=False)


def test_failures_are_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "/x")

    monkeypatch.setattr(bootstrap, "ensure", full)
    assert bootstrap.main([]) == 2
    text = capsys.readouterr().err
    assert text.startswith("[setup] failed: [Errno 28] No space left on device: '/x'.")
    assert text.count("\n") == 1


# ----------------------------------------------------------------------------------- as a user


def copy_set_up(to: Path) -> None:
    """What `make` needs of the checkout."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, to)
    for name in ("tools", "requirements"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize(
    ("there", "python", "said"),
    [
        (True, "", r"Python 3\.1.* is needed and was not found; .*/python3 is 3\.9\. Install it"),
        (True, "python3.12", r"Python 3\.12 is needed and was not found"),
        (True, "python3", r"PYTHON=python3 is Python 3\.9, but there are packages for"),
        (False, "", r"no Python here\. Install 3\.11, 3\.12 or 3\.13"),
    ],
)
def test_make_train_without_a_supported_python(tmp_path: Path, there: bool, python: str, said: str) -> None:
    copy_set_up(tmp_path)
    tools = tmp_path / "bin"
    if there:  # it runs the set-up, but says of itself that it is another version
        question = (
            f'case "$2" in *implementation*) echo cpython True 3 9;; *) exec {sys.executable} "$@";; esac'
        )
        script(tools / "python3", question)
    make = shutil.which("make")
    assert make is not None, "these tests are started by make"
    env = {"PATH": str(tools), **({"PYTHON": python} if python else {})}
    done = subprocess.run([make, "train"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert re.search(said, first)
    assert [re.sub(r"\[.*\]", "", line) for line in rest] == ["make: ***  Error 2"]
    assert done.stdout == ""
    assert not (tmp_path / ".venv").exists()


def test_make_says_which_python_it_would_take(tmp_path: Path) -> None:
    copy_set_up(tmp_path)
    question = 'case "$2" in *implementation*) echo cpython True 3 12;; *) exec {} "$@";; esac'
    script(tmp_path / "bin/python3", question.format(sys.executable))
    make = shutil.which("make")
    assert make is not None, "these tests are started by make"
    done = subprocess.run(
        [make, "python", "PYTHON=modern"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "bin/python3")), done.stderr
    assert not (tmp_path / ".venv").exists()
