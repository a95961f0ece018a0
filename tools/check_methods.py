"""Trains every method on vectors and on vision for 2,000 env steps: a tiny model, two actors, real Ray.

    .venv/bin/python tools/check_methods.py [METHOD ...]

Takes about a minute per run on two cores. Exit code 1 when one of them fails; its output is shown.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List

TINY = {
    "env-steps": 2_000,
    "actors.count": 2,
    "actors.envs": 2,
    "learner.batch-size": 4,
    "learner.batch-length": 8,
    "learner.train-ratio": 4,
    "learner.prefill": 200,
    "world-model.deter": 16,
    "world-model.units": 16,
    "world-model.stoch": 4,
    "world-model.classes": 4,
    "world-model.encoder-layers": 1,
    "world-model.encoder-units": 16,
    "world-model.cnn-depth": 2,
    "behavior.units": 16,
    "behavior.horizon": 3,
    "planner.samples": 8,
    "planner.elites": 2,
    "planner.iterations": 1,
    "planner.horizon": 3,
    "evaluation.every": 0,
    "evaluation.final-episodes": 1,
}
OBSERVATIONS: Dict[str, List[str]] = {  # of methods that read where things are
    "osrp_vector": ["coordinates", "vision+coordinates"],
    "osrp_tracked": ["coordinates", "lidar", "vision+coordinates", "vision+lidar"],
}
ANY = ["lidar", "coordinates", "vision"]


def methods() -> List[str]:
    """All method presets."""
    return sorted(path.stem for path in Path("configs/methods").glob("*.yaml"))


def check(method: str, observation: str, directory: str) -> bool:
    """Whether one run ends well; says so in one line."""
    run = str(Path(directory) / (method + "-" + observation))
    program = str(Path(sys.executable).parent / "safedreamer")
    command = [program, "train", "--method", method, "--run-dir", run]
    command += ["--task", "SafetyPointGoal1-v0", "--size", "nano", "--env.observation", observation]
    for name, value in TINY.items():
        command += ["--" + name, str(value)]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    well = done.returncode == 0 and "realised train ratio" in done.stdout
    seconds = time.monotonic() - started
    print(f"{'ok' if well else 'FAILED':<8}{method:<14}{observation:<20}{seconds:.0f} s", flush=True)
    if not well:
        print(done.stdout)
    return well


def main() -> None:
    """Entry point."""
    with tempfile.TemporaryDirectory() as directory:
        results = [
            check(method, observation, directory)
            for method in sys.argv[1:] or methods()
            for observation in OBSERVATIONS.get(method, ANY)
        ]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
