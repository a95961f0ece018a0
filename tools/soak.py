"""Kills a random part of a running training every half minute, then checks that nothing is wrong with it.

    .venv/bin/python tools/soak.py OUT.json [--minutes 20] [--replay memory]

At the end SIGTERM saves the run, and --resume brings it to a regular end. Exit code 1 when a check fails.
"""

import collections
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import faults

EVERY_SECONDS = 30.0
MORE_ENV_STEPS = 60_000  # after the resume
PARTS = ("actor", "actor", "learner", "replay", "inference", "evaluator", "metrics", "holder")
RATIO_TOLERANCE = 0.2


def soak(
    directory: Path, seconds: float, every: float = EVERY_SECONDS, replay: str = "auto"
) -> Dict[str, Any]:
    """What was killed, and what is wrong afterwards. Raises `faults.Lost` when training does not go on."""
    run = directory / "run"
    killed: List[str] = []
    choose = random.Random(0)
    with faults.victim(run, **{"replay.server": replay}) as victim:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            killed.append(choose.choice(PARTS))
            with contextlib.suppress(faults.psutil.NoSuchProcess):
                victim.part(killed[-1]).kill()
            # What waits too long for its next life is not spared.
            victim.let_be(every)
        quiet = victim.newest("env_steps")
        victim.await_training(100)
        victim.process.send_signal(signal.SIGTERM)
        stopped = victim.wait(faults.PATIENCE)
        victim.orphans_gone(30.0)
    done = victim.newest("env_steps")
    with faults.resumed(run, done + MORE_ENV_STEPS) as again:
        ended = again.wait(3 * faults.PATIENCE)
    rows = again.rows()
    ratio = faults.train_ratio([row for row in rows if row["env_steps"] > quiet])
    wrong = faults.problems(rows)
    if abs(ratio / faults.TRAIN_RATIO - 1) > RATIO_TOLERANCE:
        wrong.append("train ratio")
    if (stopped, ended) != (128 + signal.SIGTERM, 0):
        wrong.append("exit code")
    recovered: Dict[str, List[float]] = collections.defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if name.startswith("recovered/"):
                recovered[name[len("recovered/") :].rstrip("0123456789")].append(value)
    return {
        "minutes": round(seconds / 60, 1),
        "kills": dict(collections.Counter(killed)),
        "longest_recovery_seconds": {name: round(max(values), 1) for name, values in recovered.items()},
        "env_steps": rows[-1]["env_steps"],
        "updates": victim.newest("train/updates"),
        "lost_updates": victim.newest("train/lost_updates"),
        "lost_steps": victim.newest("replay/lost_steps"),
        "train_ratio_after": round(ratio, 2),
        "train_ratio_target": faults.TRAIN_RATIO,
        "exit_codes": [stopped, ended],
        "problems": wrong,
    }


def main() -> None:
    """Entry point."""
    parser = faults.arguments("Kills a random part of a training every half minute.")
    parser.add_argument("--minutes", type=float, default=20.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        try:
            result = soak(Path(directory), 60 * args.minutes, replay=args.replay)
        except faults.Lost as loss:
            sys.exit(f"FAILED: {loss}")
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["problems"] else 0)


if __name__ == "__main__":
    main()
