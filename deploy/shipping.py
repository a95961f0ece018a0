"""What travels to a cluster: the program itself, and with a job the secrets of whoever submits it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("learner", "actors", "replay", "common", "deploy", "configs")
SECRETS = ".secrets.json"

# Settings that every process of a run must have alike, wherever it lives.
_EVERYWHERE = ("JAX_", "XLA_", "MUJOCO_", "PYOPENGL_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_HERE_ONLY = ("_DIR", "_FILE", "_SERVICE", "_EXECUTABLE")  # paths and sockets of this machine


@contextmanager
def program() -> Iterator[Path]:
    """A temporary directory with packages and presets alone: no history, no runs, no checkpoints."""
    with tempfile.TemporaryDirectory(prefix="safedreamer-") as directory:
        for part in PARTS:
            shutil.copytree(
                ROOT / part,
                Path(directory) / part,
                ignore=shutil.ignore_patterns("__pycache__", ".*"),
            )
        yield Path(directory)


def everywhere(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the driver that hold for every part of its run."""
    return {name: value for name, value in environ.items() if name.startswith(_EVERYWHERE)}


def wandb(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(open, secret) W&B variables that another machine can use."""
    ours = {
        name: value
        for name, value in environ.items()
        if name.startswith("WANDB_") and not name.endswith(_HERE_ONLY) and value
    }
    secret = {
        name: value
        for name, value in ours.items()
        if any(word in name for word in _SECRET) or "@" in value  # https://user:password@host
    }
    return {name: ours[name] for name in ours.keys() - secret.keys()}, secret


def hide_secrets(directory: Path, secrets: Mapping[str, str], nonce: str) -> None:
    """Puts them into a shipped program, for its owner's eyes only.

    The nonce keeps two jobs from sharing one copy, from which the first one would take the file away.
    """
    handle = os.open(directory / SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(handle, "w") as file:
        json.dump({"nonce": nonce, "secrets": dict(secrets)}, file)


def take_secrets(directory: Path = ROOT) -> None:
    """Moves the secrets that came with a shipped program, if any, into the environment."""
    file = directory / SECRETS
    with contextlib.suppress(FileNotFoundError):
        text = file.read_text()
        file.unlink()
        os.environ.update(json.loads(text)["secrets"])
