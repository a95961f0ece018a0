"""Breaks the parts of a running training, one after another, and measures how each comes back.

    .venv/bin/python tools/faults.py OUT.json [--replay memory]

The run is tiny: two actors, real Ray, about three minutes on two cores. Exit code 1 when something does
not come back.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import psutil

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240.0  # seconds for one recovery, on a machine that does much else
GRACE = 20.0
TRAIN_RATIO = 8.0
BATCH_STEPS = 4 * 8
ACTION_REPEAT = 20
FLAGS: Dict[str, Any] = {
    "task": "SafetyPointGoal1-v0",
    "size": "nano",
    "env-steps": 10**9,
    "env.action-repeat": ACTION_REPEAT,
    "actors.count": 2,
    "actors.envs": 2,
    "actors.slice-seconds": 0.3,
    "inference.mode": "server",
    "world-model.deter": 16,
    "world-model.units": 16,
    "world-model.stoch": 2,
    "world-model.classes": 4,
    "world-model.encoder-layers": 1,
    "world-model.encoder-units": 16,
    "world-model.bins": 11,
    "behavior.layers": 1,
    "behavior.units": 16,
    "behavior.horizon": 3,
    "behavior.imagine-starts": 8,
    "planner.samples": 8,
    "planner.elites": 2,
    "planner.iterations": 1,
    "planner.horizon": 3,
    "learner.batch-size": 4,
    "learner.batch-length": 8,
    "learner.train-ratio": TRAIN_RATIO,
    "learner.prefill": 200,
    "learner.publish-every": 2,
    "replay.capacity": 4_000,
    "replay.stride": 2,
    "evaluation.every": 4_000,
    "evaluation.episodes": 1,
    "evaluation.final-episodes": 1,
    "checkpoint.every-seconds": 10,
    "supervision.grace-seconds": GRACE,
    "logging.every-seconds": 0.5,
}
# What Ray calls the process of a part, by the part's name in metrics.
TITLES = {
    "actor": "ray::_Actor",
    "learner": "ray::_Learner",
    "replay": "ray::Replay",
    "inference": "ray::_Inference",
    "evaluator": "ray::_Evaluator",
    "metrics": "ray::Metrics",
    "holder": "ray::Holder",
}


class Lost(Exception):
    """Something did not come back."""


class Victim:
    """`safedreamer train` as a process of its own, with everything that it starts."""

    def __init__(self, run: Path, *arguments: Any) -> None:
        self.run = run
        self._log = run.parent / "output.txt"
        self.family: List[psutil.Process] = []
        command = [sys.executable, "-c", "from deploy.cli import main; main()", "train", *map(str, arguments)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with open(str(self._log), "a") as file:
            self.process = psutil.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What all of its lives have said."""
        return self._log.read_text()

    def rows(self) -> List[Dict[str, Any]]:
        """The complete rows of its metrics."""
        file = self.run / "metrics.jsonl"
        rows = []
        for line in file.read_text().splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):  # half-written
                rows.append(json.loads(line))
        return rows

    def newest(self, name: str) -> float:
        """The last value of a metric, 0 where there is none yet."""
        return next((row[name] for row in reversed(self.rows()) if name in row), 0)

    def number(self, name: str) -> int:
        """How many rows hold a metric whose name begins so."""
        return sum(any(key.startswith(name) for key in row) for row in self.rows())

    def await_(self, what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> float:
        """Waits and returns the seconds. Raises Lost when it takes too long or the run ends."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds:
                raise Lost(f"{what}: not within {seconds:.0f} s\n{self.output[-4000:]}")
            if self.process.poll() is not None:
                raise Lost(f"{what}: the run has ended\n{self.output[-4000:]}")
            time.sleep(0.1)
        return time.monotonic() - started

    def let_be(self, seconds: float) -> None:
        """Waits. Raises Lost when the run ends meanwhile."""
        end = time.monotonic() + seconds
        self.await_("nothing", lambda: time.monotonic() > end, 2 * seconds)

    def await_training(self, updates: int = 30) -> float:
        """Waits until that many more updates are done."""
        goal = self.newest("train/updates") + updates
        return self.await_("training", lambda: self.newest("train/updates") >= goal)

    def await_something_to_lose(self) -> None:
        """Waits until the newest checkpoint is older than some slices whose reports have arrived."""
        self.await_training(updates=5)  # these may have been done before it, and be told only now
        self.let_be(2.0)

    def await_checkpoint(self) -> None:
        """Waits for a new complete checkpoint of learner and replay."""
        for directory in ("checkpoints", "replay"):
            before = self._checkpoints(directory)
            self.await_("checkpoint", lambda d=directory, b=before: self._checkpoints(d) - b)

    def part(self, name: str) -> psutil.Process:
        """The process of a part (of any actor); waits until there is one."""
        found: List[psutil.Process] = []

        def look() -> bool:
            found[:] = [p for p in self.descendants() if TITLES[name] in _title(p)]
            return bool(found)

        self.await_(name, look)
        return found[0]

    def descendants(self) -> List[psutil.Process]:
        """Everything below it now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family += [p for p in self.process.children(recursive=True) if p not in self.family]
        return [process for process in self.family if process.is_running()]

    def recover(self, name: str, signal_: int = signal.SIGKILL) -> float:
        """Sends a signal to a part; seconds until it works again."""
        before = self.number("recovered/" + name)
        self.part(name).send_signal(signal_)
        return self.await_(name + " is back", lambda: self.number("recovered/" + name) > before)

    def orphans_gone(self, seconds: float, title: str = "") -> float:
        """Seconds until nothing of what it started (under such a title) is left. Raises Lost."""
        started = time.monotonic()
        _, alive = psutil.wait_procs([p for p in self.family if title in _title(p)], seconds)
        if alive:
            raise Lost(f"left behind: {[_title(process) for process in alive]}")
        return time.monotonic() - started

    def wait(self, seconds: float) -> int:
        """Its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.descendants()
            time.sleep(0.2)
        return self.process.wait(1)

    def end(self) -> None:
        """Whatever is left of it."""
        self.descendants()
        for process in [self.process, *self.family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _checkpoints(self, directory: str) -> set:
        return {
            path.name for path in (self.run / directory).glob("[s0]*") if (path / "manifest.json").exists()
        }


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


@contextlib.contextmanager
def victim(run: Path, **flags: Any) -> Iterator[Victim]:
    """A new tiny run that trains already; it is ended with the block."""
    words = [word for name, value in {**FLAGS, **flags}.items() for word in ("--" + name, value)]
    started = Victim(run, "--run-dir", run, "--logging.no-tensorboard", *words)
    try:
        started.await_("the first updates", lambda: started.newest("train/updates") > 20)
        yield started
    finally:
        started.end()


@contextlib.contextmanager
def resumed(run: Path, env_steps: float) -> Iterator[Victim]:
    """The run goes on up to `env_steps`."""
    started = Victim(run, "--resume", run, "--env-steps", int(env_steps))
    try:
        yield started
    finally:
        started.end()


def problems(rows: List[Dict[str, Any]]) -> List[str]:
    """What must hold however often parts died: counters never fall, windows are never mixed."""
    found = []
    progress = [row for row in rows if "train/updates" in row]
    for name in ("env_steps", "train/updates", "wall_seconds"):
        values = [row[name] for row in progress]
        if values != sorted(values):
            found.append(name + " falls")
    if any(row.get("replay/mixed") for row in rows):
        found.append("windows of two streams were replayed")
    return found


def train_ratio(rows: List[Dict[str, Any]]) -> float:
    """Realised between the first and the last of these rows, but for the row after the actors have stopped.

    What waits in writers and limiter is a constant: the more steps there are, the less it weighs.
    """
    progress = [row for row in rows if "train/updates" in row]
    first, last = progress[0], progress[-2]
    agent_steps = (last["env_steps"] - first["env_steps"]) / ACTION_REPEAT
    return (last["train/updates"] - first["train/updates"]) * BATCH_STEPS / max(1.0, agent_steps)


def full_disk(run: Victim) -> float:
    """The learner's files may not grow beyond 1 kB, as on a full disk, until a save has failed."""
    learner = run.part("learner")
    limits = learner.rlimit(psutil.RLIMIT_FSIZE)
    learner.rlimit(psutil.RLIMIT_FSIZE, (1000, limits[1]))
    before = run.newest("time/failed_saves")
    run.await_("a failed save", lambda: run.newest("time/failed_saves") > before)
    run.await_training()
    learner.rlimit(psutil.RLIMIT_FSIZE, limits)
    started = time.monotonic()
    run.await_checkpoint()
    return time.monotonic() - started


def killed_driver(run: Victim) -> float:
    """Seconds until all parts are gone that a killed driver had started."""
    run.descendants()
    run.process.kill()
    run.process.wait()
    return run.orphans_gone(PATIENCE, "ray::")


def truncate_newest_checkpoint(run: Path) -> None:
    """As a crash of the whole machine may leave it."""
    newest = max((run / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime)
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    with open(str(largest), "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def story(
    directory: Path, say: Callable[[str], None] = lambda _: None, replay: str = "auto"
) -> Dict[str, Any]:
    """Every fault once, with a `replay.server`. Returns what the README's table says; raises Lost."""
    run = directory / "run"
    figures: Dict[str, Any] = {}

    def note(name: str, seconds: float, **more: Any) -> None:
        figures[name] = dict(more, seconds=round(seconds, 1))
        say(f"{name}: {figures[name]}")

    with victim(run, **{"replay.server": replay}) as broken, ThreadPoolExecutor(1) as pool:
        for name in ("actor", "inference", "evaluator", "metrics"):
            note("killed " + name, broken.recover(name))
        broken.part("holder").kill()
        note("killed holder", broken.await_training())
        note("stuck actor", broken.recover("actor", signal.SIGSTOP))
        broken.await_checkpoint()
        broken.await_something_to_lose()
        note("killed replay", broken.recover("replay"), lost_steps=broken.newest("replay/lost_steps"))
        broken.await_training()
        broken.await_checkpoint()
        broken.await_something_to_lose()
        acted = broken.newest("env_steps")
        seconds = broken.recover("learner")
        acted = broken.newest("env_steps") - acted
        lost = broken.newest("train/lost_updates")
        note("killed learner", seconds, lost_updates=lost, env_steps_meanwhile=acted)
        note("full disk", full_disk(broken))
        lost = broken.newest("replay/lost_steps")
        seconds = broken.recover("replay", signal.SIGSTOP)
        note("stuck replay", seconds, lost_steps=broken.newest("replay/lost_steps") - lost)
        broken.await_training()
        before = broken.rows()
        note("killed driver", killed_driver(broken))
        rest = pool.submit(broken.orphans_gone, PATIENCE)  # of Ray's own processes
        truncate_newest_checkpoint(run)
        done = before[-1]["env_steps"]
        started = time.monotonic()
        with resumed(run, done + 60_000) as second:
            code = second.wait(3 * PATIENCE)
            rows = [row for row in second.rows() if row["env_steps"] > done]
            ratio = round(train_ratio(rows), 2)
            note("resumed", time.monotonic() - started, exit_code=code, train_ratio=ratio)
            figures["passed over"] = "checkpoint passed over" in second.output
            second.orphans_gone(20.0)
        note("killed driver, all of Ray", rest.result())
        figures["problems"] = problems(before) + problems(second.rows())
    return figures


def arguments(purpose: str) -> argparse.ArgumentParser:
    """What this tool and the soak take."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("out", type=Path, metavar="OUT.json", help="where the figures go")
    servers = ("auto", "reverb", "memory")
    parser.add_argument("--replay", choices=servers, default="auto", help="replay.server of the training")
    return parser


def main() -> None:
    """Entry point."""
    args = arguments("Breaks every part of a training once, and measures how it comes back.").parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            figures = story(Path(directory), lambda line: print(line, flush=True), args.replay)
        except Lost as loss:
            sys.exit(f"FAILED: {loss}")
    args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if figures["problems"] else 0)


if __name__ == "__main__":
    main()
