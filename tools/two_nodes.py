"""Trains a tiny agent on a Ray cluster of two nodes, made of two network namespaces of this machine.

    .venv/bin/python tools/two_nodes.py [OUT.json]

As root, a minute or two. The head has one CPU, so that learner and replay live on the other node. Exit code 1
when a part is not where it belongs, when steps of one node do not arrive, when a run directory that one node
alone sees is accepted, or when a run outlives the node of its learner. All processes end with it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NoReturn

import faults
import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HEAD, OTHER = "10.77.0.1", "10.77.0.2"
ADDRESS = HEAD + ":6379"
PATIENCE = 240.0
CPUS = {HEAD: 1, OTHER: 5}
FLAGS = {
    **faults.FLAGS,
    "actors.count": 2,
    "evaluation.every": 0,
    "ray-address": ADDRESS,
    "ray.placement-seconds": 60,
}


class Failed(Exception):
    """The cluster or the run is not as it should be."""


def possible() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian: iproute2)"
    name = f"sd-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], stderr=subprocess.PIPE, text=True)
    if made.returncode:
        return "network namespaces cannot be made: " + made.stderr.strip()
    pair = ["link", "add", "sd0", "netns", name, "type", "veth", "peer", "name", "sd1", "netns", name]
    paired = subprocess.run(["ip", *pair], stderr=subprocess.PIPE, text=True)
    subprocess.run(["ip", "netns", "delete", name], check=False)
    return "interfaces cannot be made: " + paired.stderr.strip() if paired.returncode else ""


class Nodes:
    """Two namespaces with a cable between them, and everything that runs in them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names = {HEAD: f"sd-{os.getpid()}-a", OTHER: f"sd-{os.getpid()}-b"}
        self.started: List[subprocess.Popen] = []

    def make(self) -> None:
        """The namespaces and the cable."""
        a, b = self._names[HEAD], self._names[OTHER]
        for name in (a, b):
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for address, name in self._names.items():
            _ip("-n", name, "address", "add", address + "/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")

    def start(self, node: str, log: str, *command: Any) -> subprocess.Popen:
        """A command on a node, its output in a file of the directory."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_"))}
        env.update(
            PYTHONPATH=str(ROOT),
            PATH=str(BIN) + os.pathsep + os.environ.get("PATH", os.defpath),
            JAX_PLATFORMS="cpu",
        )
        with open(str(self._directory / log), "w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._names[node], *map(str, command)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=str(self._directory),
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def join(self, node: str, *arguments: Any) -> None:
        """Starts Ray there. On the second node Ray's files and `hidden` lie on a disk of its own."""
        start = [BIN / "ray", "start", "--block", "--disable-usage-stats", "--node-ip-address", node]
        start += ["--num-cpus", CPUS[node], "--num-gpus", 0, "--object-store-memory", 150_000_000, *arguments]
        mounts = "mount -t tmpfs none ray && mount -t tmpfs none hidden && " if node == OTHER else ""
        self.start(node, _log(self._directory, node).name, "sh", "-c", mounts + 'exec "$@"', "sh", *start)

    def processes(self, node: str) -> List[psutil.Process]:
        """Everything that runs on a node."""
        pids = _ip("netns", "pids", self._names[node]).split()
        found = []
        for pid in map(int, pids):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def lose(self, node: str) -> None:
        """Kills whatever runs on a node, as a power cut does."""
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def end(self) -> None:
        """Nothing is left of either node."""
        for node, name in self._names.items():
            with contextlib.suppress(Failed):  # it was never made
                for _ in range(20):
                    self.lose(node)
                    if not psutil.wait_procs(self.processes(node), 1.0)[1]:
                        break
                _ip("netns", "delete", name)
        for process in self.started:
            process.wait(10)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_nodes(directory: Path) -> Iterator[Nodes]:
    """A running cluster; `directory`/hidden is not the same place on both nodes."""
    for name in ("hidden", "ray"):
        (directory / name).mkdir()
    nodes = Nodes(directory)
    try:
        nodes.make()
        temporary = ("--temp-dir", directory / "ray")
        nodes.join(HEAD, "--head", "--port", 6379, "--include-dashboard", "false", *temporary)
        head = lambda: "Ray runtime started" in _log(directory, HEAD).read_text()  # noqa: E731
        _await("the head", head, _log(directory, HEAD))
        nodes.join(OTHER, "--address", ADDRESS)
        other = _log(directory, OTHER)
        _await("the second node", lambda: "Ray runtime started" in other.read_text(), other)
        yield nodes
    finally:
        nodes.end()


def _log(directory: Path, node: str) -> Path:
    return directory / f"ray-{node}.txt"


def _await(what: str, condition: Callable[[], Any], log: Path, seconds: float = PATIENCE) -> float:
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise Failed(f"{what}: not within {seconds:.0f} s\n{log.read_text()[-4000:]}")
        time.sleep(0.2)
    return time.monotonic() - started


def train(nodes: Nodes, log: str, run: Path) -> subprocess.Popen:
    """`safedreamer train` by hand on the head."""
    words = [word for name, value in FLAGS.items() for word in ("--" + name, value)]
    command = (sys.executable, "-m", "deploy.cli", "train", "--run-dir", run, "--logging.no-tensorboard")
    return nodes.start(HEAD, log, *command, *words)


def check_places(output: str) -> Dict[str, Any]:
    """Where the program says its parts are. Raises Failed when that is not as asked."""
    names = r"learner and replay on (\S+), evaluator on (\S+), inference server on \S+, actors on (.*)"
    found = re.search(names, output)
    if found is None:
        raise Failed("it does not say where its parts are\n" + output[-4000:])
    actors = {
        host: [int(index) for index in indices.split(", ")]
        for host, indices in re.findall(r"([\d.]+) \(([\d, ]+)\)", found.group(3))
    }
    if found.group(1) != OTHER or set(actors) != {HEAD, OTHER}:
        raise Failed("the parts are not where they belong: " + found.group(0))
    return {"learner and replay": found.group(1), "evaluator": found.group(2), "actors": actors}


def parts_on(nodes: Nodes) -> Dict[str, List[str]]:
    """The parts whose processes run on each node."""
    titles = {node: [" ".join(p.cmdline()) for p in nodes.processes(node)] for node in CPUS}
    return {
        node: [part for part, title in faults.TITLES.items() if any(title in line for line in lines)]
        for node, lines in titles.items()
    }


def story(directory: Path, say: Callable[[str], None] = lambda _: None) -> Dict[str, Any]:
    """The whole of it. Returns what was seen; raises Failed."""
    figures: Dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        figures[name] = value
        say(f"{name}: {value}")

    with two_nodes(directory) as nodes:
        note("refused", _refused(nodes, directory))
        run, log = directory / "run", directory / "train.txt"
        process = train(nodes, log.name, run)

        def await_(what: str, condition: Callable[[], Any]) -> float:
            seconds = _await(what, lambda: process.poll() is not None or condition(), log)
            if process.poll() is not None:
                raise Failed(f"{what}: the run ended with {process.returncode}\n{log.read_text()[-4000:]}")
            return round(seconds, 1)

        note("seconds until training", await_("training", lambda: _newest(run, "train/updates") > 0))
        places = check_places(log.read_text())
        note("places", places)
        note("processes", parts_on(nodes))
        steps = lambda: _episode_steps(run, places["actors"])  # noqa: E731
        await_("episodes of both nodes", lambda: all(steps().values()))
        note("env steps of whole episodes", steps())
        nodes.lose(OTHER)
        seconds = _await("the end of the run", lambda: process.poll() is not None, log)
        sentence = log.read_text().strip().splitlines()[-1]
        if process.returncode != 2 or "has left the cluster" not in sentence:
            raise Failed(f"ended with {process.returncode}: {log.read_text()[-4000:]}")
        note("lost node", {"seconds": round(seconds, 1), "sentence": sentence})
    return figures


def _refused(nodes: Nodes, directory: Path) -> str:
    """What is said about a run directory that the learner's node does not see."""
    log = directory / "hidden.txt"
    process = train(nodes, log.name, directory / "hidden" / "run")
    _await("the refusal", lambda: process.poll() is not None, log)
    sentence = log.read_text().strip().splitlines()[-1]
    if process.returncode != 2 or "storage that all nodes share" not in sentence:
        raise Failed(f"ended with {process.returncode}: {log.read_text()[-4000:]}")
    if (directory / "hidden" / "run").exists():
        raise Failed("the refused run has left its directory")
    return sentence


def _newest(run: Path, name: str) -> float:
    return next((row[name] for row in reversed(_rows(run / "metrics.jsonl")) if name in row), 0)


def _episode_steps(run: Path, actors: Dict[str, List[int]]) -> Dict[str, int]:
    """Env steps of the whole episodes that came from each node."""
    episodes = [
        (int(row["source"].partition("/")[0][len("actor") :]), row["length"])
        for row in _rows(run / "episodes.jsonl")
    ]
    return {
        host: sum(length for actor, length in episodes if actor in indices)
        for host, indices in actors.items()
    }


def _rows(file: Path) -> List[Dict[str, Any]]:
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):  # half-written
            rows.append(json.loads(line))
    return rows


def _interrupted(number: int, _: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point."""
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        sys.exit("usage: python tools/two_nodes.py [OUT.json]")
    reason = possible()
    if reason:
        sys.exit(reason + "; run it as root")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    # Sockets of Unix have short names only.
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/tmp") as directory:
        try:
            figures = story(Path(directory), lambda line: print(line, flush=True))
        except Failed as failure:
            sys.exit(f"FAILED: {failure}")
    if len(sys.argv) == 2:
        Path(sys.argv[1]).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
