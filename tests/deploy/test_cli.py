"""What a user meets at the command line, above all when something is wrong."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from actors import rendering
from actors.tasks import list_tasks
from common import configuration
from common.config import Config
from common.configuration import flatten, from_dict, load, presets, to_dict
from common.types import UserError
from common.yaml_file import read_yaml
from deploy import run_dir as runs
from deploy.cli import main
from tests import ordinary
from tests.deploy.conftest import meta_of
from tests.stacks import needs_reverb

ROOT = Path(__file__).resolve().parents[2]


MAIN = "from deploy.cli import main; main()"


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """`cli("train", ...)` runs a command in this process and in an empty directory."""
    home = tmp_path / "cwd"
    home.mkdir()
    monkeypatch.chdir(home)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Result(leaving.value.code, out, err)

    return run


@pytest.fixture
def refused(cli: Callable) -> Callable[..., str]:
    """Runs a command that must fail, and gives the sentence it fails with."""

    def run(*arguments: object) -> str:
        result = cli(*arguments)
        assert result.code == 2
        assert result.out == ""
        assert result.err.startswith("safedreamer: ")
        assert "Traceback" not in result.err
        sentence, _, rest = result.err.partition("\n")
        assert rest == "" or rest.startswith("usage:")
        assert not list(Path.cwd().iterdir()), "the refused command left something behind"
        return sentence.removeprefix("safedreamer: ")

    return run


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tran", "there is no command `tran` (did you mean `train`?)"),
        ("list --long", "`safedreamer list` takes no options, but got --long"),
        ("doctor now", "`safedreamer doctor` takes no options, but got now"),
        ("train --method osrp_vektor", "there is no method `osrp_vektor` (did you mean `osrp_vector`?)"),
        ("train --size tiny", "there is no size `tiny`; sizes: nano, paper, small"),
        ("train --task SafetyPointGol1-v0", "Did you mean SafetyPointGoal1-v0"),
        ("train --task SafetyPointGoal1-v1", "Unknown task 'SafetyPointGoal1-v1'. Did you mean"),
        ("train --method", "--method: expected one argument"),
        ("train --config", "--config: expected at least one argument"),
        ("train --learner.batchsize 3", "--learner.batchsize, 3 (did you mean `--learner.batch-size`?)"),
        ("train --batch-size 3", "Unrecognized options: --batch-size, 3"),
        ("train goal", "Unrecognized options: goal"),
        ("train --learner.batch-size three", "--learner.batch-size: three is not a whole number"),
        ("train --learner.batch-size", "Missing value for argument '--learner.batch-size'"),
        ("train --wandb maybe", "invalid choice 'maybe' for argument '--wandb'"),
        ("train --policy planer", "invalid choice 'planer' for argument '--policy'"),
        ("train --env-steps -5", "`env_steps` must be greater than 0, not -5"),
        ("train --planner.elites 100000", "planner.elites (100000) must not exceed planner.samples"),
        ("train --replay.capacity 1000", "learning starts only after"),
        ("train --config nowhere.yaml", "there is no configuration file nowhere.yaml"),
        ("train --resume nowhere", "nowhere is not a run directory: it has no config.yaml"),
        ("train --task SafetyHopperVelocity-v1 --env.observation coordinates", "no coordinates observation"),
        ("train --task SafetyHopperVelocity-v1 --method osrp_vector", "coordinates"),
        ("train --method osrp_vector --env.observation lidar", "geometric reads hazard positions"),
        ("train --task SafetyPointGoal0-v0 --method osrp_vector", "observes no hazards"),
        ("train --env.observation cordinates", "must be one of lidar, coordinates"),
        ("eval", "Missing from safedreamer eval: PATH"),
        ("eval nowhere", "no run or checkpoint at "),
        ("eval . --episodes 0", "--episodes must be at least 1"),
        ("eval . --seed -3", "--seed must be at least 0"),
        ("eval . --episodes many", "Error parsing --episodes"),
        ("eval . --video film.gif", "videos are written as .mp4, not '.gif'"),
        ("eval . --video film", "videos are written as .mp4, not 'film'"),
        ("eval . --video nowhere/film.mp4", "there is no directory nowhere for the video"),
        ("eval . --prediction-video film.avi", "videos are written as .mp4, not '.avi'"),
        ("eval . --prediction-plot plot.pdf", "plots are written as .png, not '.pdf'"),
        ("eval . --prediction-plot nowhere/plot.png", "there is no directory nowhere for the plot"),
        (
            "eval . --video film.mp4 --prediction-video film.mp4",
            "--video and --prediction-video both name film.mp4",
        ),
        ("eval . --vide film.mp4", "did you mean `--video`?"),
        ("plot", "name at least one run directory"),
        ("plot nowhere", "nowhere is not a run directory"),
        ("eval .", "holds no complete checkpoint; give a run directory"),
    ],
)
def test_user_errors_are_one_sentence_and_leave_nothing_behind(refused, arguments, sentence):
    assert sentence in refused(*arguments.split())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("seed: [1", "cannot be read as YAML"),
        ("sede: 1", "there is no setting `sede` (did you mean `seed`?)"),
        ("learner: {batch_size: big}", "`learner.batch_size` must be a int, not 'big'"),
        ("method: osrb", "there is no method `osrb` (did you mean `osrp`?)"),
        ("- 1", "must hold `name: value` lines"),
    ],
)
def test_bad_files_are_named(refused, tmp_path, content, sentence):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    answer = refused("train", "--config", path)
    assert sentence in answer
    assert "mine.yaml" in answer or "osrb" in answer


def test_on_a_terminal_the_sentence_is_as_plain():
    """tyro colours what it says as soon as standard output is a terminal."""
    controller, terminal = pty.openpty()
    env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", MAIN, "train", "--sede", "3"]
    try:
        answer = subprocess.run(
            command, stdout=terminal, stderr=subprocess.PIPE, env=env, text=True, timeout=60, check=False
        )
    finally:
        os.close(terminal)
        os.close(controller)
    assert answer.returncode == 2
    assert answer.stderr.startswith("safedreamer: Unrecognized options: --sede, 3 (did you mean `--seed`?);")
    assert "\x1b" not in answer.stderr


def test_no_arguments_show_the_commands(cli):
    result = cli()
    assert (result.code, result.err) == (2, "")
    assert result.out.startswith("usage: safedreamer COMMAND")


def test_a_new_run_needs_a_directory_of_its_own(refused, tmp_path, tiny_config):
    run = runs.create(tmp_path / "run", tiny_config())
    before = (run / runs.CONFIG).read_text()
    answer = refused("train", "--run-dir", run)
    assert (
        answer == f"{run} holds a run already; continue it with --resume {run}, or choose another --run-dir"
    )
    assert (run / runs.CONFIG).read_text() == before


def test_a_run_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        assert f"the run directory {path} cannot be written" in refused("train", "--run-dir", path)
    assert (tmp_path / "file").is_file()


@pytest.mark.parametrize("place", ["nowhere/jax", "there"])
def test_what_is_compiled_is_kept_where_this_user_can_write(cli, tmp_path, monkeypatch, place):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).is_relative_to(tmp_path / "there"))
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    assert cli("list").code == 0
    expected = str(tmp_path / "there/safedreamer/jax") if place == "there" else None
    assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == expected


def test_a_user_without_a_home_keeps_nothing(cli, monkeypatch):
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as under a user id without a name
    assert cli("list").code == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_run_directory_without_permission():
    words = ordinary.needed("a run directory without permission")
    with tempfile.TemporaryDirectory(dir="/tmp") as locked:  # others cannot look into pytest's own
        os.chmod(locked, 0o555)
        done = subprocess.run(
            [*words, sys.executable, "-c", MAIN, "train", "--run-dir", f"{locked}/run"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert "cannot be written (Permission denied)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("server", [pytest.param("reverb", marks=needs_reverb), "memory"])
def test_a_run_that_cannot_start_leaves_no_directory(cli, tmp_path, monkeypatch, server):
    """Its name is free for the next try."""
    run = tmp_path / "run"

    def no_server(*args: object, **kwargs: object) -> None:
        (run / "replay.log").write_text("what the server said")
        raise UserError("Port 1 for the replay server can not be used")

    monkeypatch.setattr("deploy.inline.spawn_server", no_server)
    monkeypatch.setattr("deploy.inline.ReplayInMemory", no_server)
    result = cli("train", "--backend", "inline", "--replay.server", server, "--run-dir", run)
    assert result.code == 2
    assert result.err.splitlines()[-1] == "safedreamer: Port 1 for the replay server can not be used"
    assert not run.exists()


# --- what can be asked --------------------------------------------------------------------------


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command, and prints last of all which heavy packages it has imported."""
    code = (
        "import sys\nfrom deploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        "heavy = 'jax ray reverb tensorflow mujoco gymnasium orbax matplotlib wandb imageio'.split()\n"
        "print('imported:', *[name for name in heavy if name in sys.modules])\nsys.exit(code)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=env, timeout=60
    )


@pytest.mark.parametrize(
    "arguments", ["--help", "-h", "train --help", "eval --help", "list", "train --print-config"]
)
def test_questions_are_answered_without_importing_anything_heavy(arguments):
    answer = in_a_process(*arguments.split())
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr == ""
    assert answer.stdout.splitlines()[-1].rstrip() == "imported:"


def test_help_explains_every_setting_with_its_default():
    text = in_a_process("train", "--help", "--method", "osrp").stdout
    for name, value in flatten(to_dict(load("osrp"))).items():
        flag = f"--{re.sub('_(?=.)', '-', name)}"
        explained = re.search(rf"{re.escape(flag)}[ ,][^─]*?\(default:\s+([^)]*)\)", text)
        assert explained, flag
        assert explained[1].replace("│", "").split()[0] == (str(value) or "''"), flag
    for flag in ("--run-dir", "--resume", "--config", "--wandb", "--print-config"):
        assert flag in text


def test_list_names_every_method_size_and_task(cli):
    result = cli("list")
    assert result.code == 0
    for name in [*presets("method"), *presets("size"), *list_tasks()]:
        assert re.search(rf"^  {name}\b", result.out, re.MULTILINE), name
    for kind, name in [("method", name) for name in presets("method")]:
        assert configuration.describe(kind, name) in result.out


def test_list_into_a_pipe_that_closes():
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-u", "-c", MAIN, "list"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 0


def printed(result: Result, tmp_path: Path) -> Config:
    assert result.code == 0, result.err
    path = tmp_path / "printed.yaml"
    path.write_text(result.out)
    return from_dict(read_yaml(path), "printed")


@pytest.mark.parametrize(("given", "number"), [("1e6", 1_000_000), ("2_000", 2_000), ("3.0", 3)])
def test_whole_numbers_may_be_written_as_in_a_file(cli, tmp_path, given, number):
    config = printed(cli("train", "--env-steps", given, "--print-config"), tmp_path)
    assert config.env_steps == number


@pytest.mark.parametrize("given", ["1.5", "many", "inf", "nan"])
def test_other_numbers_are_refused_where_a_whole_one_belongs(refused, given):
    assert f"--env-steps: {given} is not a whole number" in refused("train", "--env-steps", given)


def test_print_config_resolves_presets_files_and_flags(cli, tmp_path):
    assert printed(cli("train", "--print-config"), tmp_path) == load()
    (tmp_path / "a.yaml").write_text("{method: osrp, seed: 1, env_steps: 1e5}")
    (tmp_path / "b.yaml").write_text("seed: 2")
    flags = ["--config", tmp_path / "a.yaml", tmp_path / "b.yaml", "--learner.batch-size", "4", "--seed", "3"]
    config = printed(
        cli("train", *flags, "--wandb", "offline", "--size", "small", "--print-config"), tmp_path
    )
    assert (config.method, config.size, config.seed, config.env_steps) == ("osrp", "small", 3, 100_000)
    assert config.learner.batch_size == 4
    assert config.logging.wandb == "offline"
    assert config.world_model.deter == load("osrp", "small").world_model.deter
    twice = ["--config", tmp_path / "a.yaml", "--config", tmp_path / "b.yaml", "--print-config"]
    config = printed(cli("train", *twice), tmp_path)
    assert (config.method, config.seed) == ("osrp", 2)
    assert not list(Path.cwd().iterdir())


def test_plot_draws_several_runs(cli, trained, tmp_path):
    result = cli("plot", trained, trained, "--mean", "--out", "both.png")
    assert (result.code, result.out) == (0, "plot: both.png\n")
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_plot_wants_a_png(cli, trained):
    result = cli("plot", trained, "--out", "curves.txt")
    assert result.code == 2
    assert "--out must be a .png file" in result.err


# --- resuming -----------------------------------------------------------------------------------


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run (2,000 env steps) with two checkpoints."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--seed 7", "seed"),
        ("--method osrp", "method"),
        ("--size paper", "size"),
        ("--task SafetyCarGoal1-v0", "task"),
        ("--learner.batch-size 8", "learner.batch_size"),
        ("--world-model.deter 8", "world_model.deter"),
        ("--safety.cost-limit 9", "safety.cost_limit"),
        ("--actors.envs 9", "actors.envs"),
        ("--replay.capacity 9999", "replay.capacity"),
        ("--env.action-repeat 2", "env.action_repeat"),
    ],
)
def test_a_change_that_makes_it_another_run_is_refused_by_name(refused, run, flags, name):
    before = (run / runs.CONFIG).read_text()
    answer = refused("train", "--resume", run, "--env-steps", 9_000, *flags.split())
    assert answer.startswith(f"`{name}` cannot change when a run is resumed (saved: ")
    assert "these can: env_steps, backend, actors.count" in answer
    assert (run / runs.CONFIG).read_text() == before


def test_what_may_change_is_taken_over(cli, run, tmp_path, tiny_config):
    flags = "--env-steps 1e4 --actors.count 3 --wandb offline --backend local --evaluation.every 500"
    arguments = flags.replace("1e4", "10000").split()
    config = printed(cli("train", "--resume", run, *arguments, "--print-config"), tmp_path)
    expected = tiny_config(
        env_steps=10_000,
        actors={"count": 3},
        logging={"wandb": "offline"},
        backend="local",
        evaluation={"every": 500},
    )
    assert config == expected  # and the rest is what was saved, not what presets say now
    assert from_dict(read_yaml(run / runs.CONFIG), "saved") == tiny_config()  # printing changes nothing


def test_a_finished_run_is_not_resumed(refused, run):
    sentence = "this run has its 2000 env steps already; to go on, give --env-steps more than that"
    assert refused("train", "--resume", run) == sentence
    assert refused("train", "--resume", run, "--env-steps", 1_500) == sentence


def test_resume_and_run_dir_exclude_each_other(refused, run, tmp_path):
    answer = refused("train", "--resume", run, "--run-dir", tmp_path / "other")
    assert "leave out --run-dir" in answer
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_being_trained_is_not_resumed(cli, run):
    with runs.lock(run):
        result = cli("train", "--resume", run, "--env-steps", 9_000)
    assert result.code == 2
    assert f"safedreamer: another process trains in {run} right now" in result.err
    assert from_dict(read_yaml(run / runs.CONFIG), "saved").env_steps == 2_000


def test_a_run_with_a_broken_configuration_is_named(refused, run):
    (run / runs.CONFIG).write_text("seed: {a: 1}")
    assert str(run / runs.CONFIG) in refused("train", "--resume", run)


# --- evaluating ---------------------------------------------------------------------------------


def damage(checkpoint: Path) -> None:
    victim = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0xFF
    victim.write_bytes(bytes(content))


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / runs.CHECKPOINTS).iterdir())


def test_eval_of_a_run_and_of_a_checkpoint(cli, run):
    result = cli("eval", run, "--episodes", 1, "--json")
    assert (result.code, result.err) == (0, "")
    summary = json.loads(result.out)
    assert summary["env_steps"] == 2_000
    assert (summary["task"], summary["episodes"], summary["length"]) == ("SafetyPointGoal1-v0", 1, 1000)
    assert set(summary) >= {"return", "return_std", "cost", "cost_std", "cost_rate", "method", "seed"}

    older = cli("eval", checkpoints(run)[0], "--episodes", 1, "--json")
    assert json.loads(older.out) == summary | {"env_steps": 1_000}  # the same parameters, the same layouts
    table = cli("eval", run / runs.CHECKPOINTS, "--episodes", 1)
    assert table.code == 0
    assert "osrp_tracked on SafetyPointGoal1-v0, 2,000 env steps" in " ".join(table.out.split())
    assert f"{summary['return']:.2f} ± 0.00" in table.out

    random = json.loads(cli("eval", run, "--episodes", 1, "--json", "--random").out)
    assert (random["method"], random["length"]) == ("random actions", 1000)
    assert random["return"] != summary["return"]


def test_eval_passes_over_a_damaged_checkpoint_and_says_so(cli, run):
    newest = checkpoints(run)[-1]
    damage(newest)
    result = cli("eval", run, "--episodes", 1, "--json")
    assert result.code == 0
    assert json.loads(result.out)["env_steps"] == 1_000
    assert result.err.count("\n") == 1
    assert f"checkpoint {newest} is damaged" in result.err
    assert "an older one is used" in result.err


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(refused, run):
    newest = checkpoints(run)[-1]
    damage(newest)
    assert f"checkpoint {newest} is damaged" in refused("eval", newest)
    damage(checkpoints(run)[0])
    assert "no usable checkpoint in" in refused("eval", run)


def test_eval_refuses_what_the_checkpoint_is_not(refused, run, tmp_path):
    answer = refused("eval", run, "--task", "SafetyCarGoal1-v0")
    assert answer == (
        "this checkpoint was trained on SafetyPointGoal1-v0; it cannot be evaluated on SafetyCarGoal1-v0"
    )
    answer = refused("eval", run, "--observation", "lidar")
    assert answer == "this checkpoint observes coordinates; it cannot be evaluated on lidar"


def test_eval_of_somebody_elses_checkpoint(refused, run, tmp_path, tiny_config):
    from common import checkpoint

    foreign = checkpoint.save(tmp_path / "foreign", 1, {"x": np.zeros(3)}, {})
    assert "is not a checkpoint of `safedreamer train`" in refused("eval", foreign)
    meta = meta_of(tiny_config(), 1) | {"updates": 1, "version": 1}
    other = checkpoint.save(tmp_path / "other", 1, {"x": np.zeros(3)}, meta)
    assert "was made by another configuration" in refused("eval", other)


def test_eval_writes_a_video(cli, run, tmp_path):
    try:
        rendering.require_gl()
    except UserError as error:
        pytest.skip(str(error))
    film = tmp_path / "film.mp4"
    result = cli("eval", run, "--episodes", 1, "--video", film)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"video: {film}"
    assert film.stat().st_size > 10_000


def test_eval_of_vectors_predicts_curves_without_opengl(cli, refused, run, tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "_loads", lambda library: False)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert refused("eval", run, "--prediction-video", tmp_path / "film.mp4") == (
        "this checkpoint observes coordinates, which has no pictures to predict; ask for the curves: "
        f"--prediction-plot {tmp_path / 'film.png'}"
    )
    assert "Rendering needs OpenGL" in refused("eval", run, "--video", tmp_path / "film.mp4")
    assert not list(tmp_path.glob("film.*"))
    plot = tmp_path / "plot.png"
    result = cli("eval", run, "--episodes", 1, "--prediction-plot", plot)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"prediction plot: {plot}"
    assert plot.stat().st_size > 10_000
