"""What travels to a cluster, and what must not."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deploy import shipping


def test_the_program_travels_whole_and_alone():
    names = tomllib.loads((shipping.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {name.partition(".")[0] for name in names}
    with shipping.program() as directory:
        assert {path.name for path in directory.iterdir()} == {*packages, "configs"}
        size = sum(path.stat().st_size for path in directory.rglob("*"))
        assert size < 5e6
        assert not list(directory.rglob("__pycache__"))
        done = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "train", "--print-config"],
            cwd=directory,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "method: osrp_tracked" in done.stdout
    assert not directory.exists()


def test_secrets_of_wandb_are_kept_apart():
    environ = {
        "WANDB_API_KEY": "k",
        "WANDB_IDENTITY_TOKEN": "t",
        "WANDB_PROJECT": "p",
        "WANDB_BASE_URL": "https://me:word@wandb.example",
        "WANDB_MODE": "",
        "WANDB_DIR": "/here",
        "WANDB_SERVICE": "socket",
        "AWS_SECRET": "x",
    }
    open_, secret = shipping.wandb(environ)
    assert open_ == {"WANDB_PROJECT": "p"}
    assert secret.keys() == {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN", "WANDB_BASE_URL"}


def test_secrets_are_for_the_owner_and_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", "another")
    shipping.take_secrets(tmp_path)  # where there are none
    shipping.hide_secrets(tmp_path, {"WANDB_API_KEY": "k"}, "job-1")
    file = tmp_path / shipping.SECRETS
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["nonce"] == "job-1"
    shipping.take_secrets(tmp_path)
    assert os.environ["WANDB_API_KEY"] == "k"
    assert not file.exists()
