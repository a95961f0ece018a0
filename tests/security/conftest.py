from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.cli import main
from tests.deploy.conftest import tiny_config, trained  # noqa: F401 (fixtures)

SECONDS = 30.0  # on a machine that does much else; the slowest takes about two
KILOBYTES = 1_000_000


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must end with one sentence and exit code 2, soon and in little memory."""
    home = tmp_path / "cwd"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(*arguments: object) -> str:
        capsys.readouterr()
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert leaving.value.code == 2, out + err
        assert time.monotonic() - started < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
        assert err.startswith("safedreamer: ")
        assert "Traceback" not in err
        assert len(err) < 2_000
        assert err.count("\n") <= 3
        assert err.replace("\n", "").isprintable()
        return err

    return run
