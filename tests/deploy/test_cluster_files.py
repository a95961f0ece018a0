"""The examples for the cluster launcher and for KubeRay."""

from __future__ import annotations

import copy
import shlex
from typing import Any

import pytest
import yaml

from common.config_checks import check
from deploy.flags import parse_train
from deploy.jobs import STOP_SECONDS
from deploy.shipping import ROOT
from deploy.stack import lock


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / name).read_text())


def test_the_launcher_takes_the_cluster():
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = read("cluster.yaml")
    validate_config(prepare_config(copy.deepcopy(cluster)))
    for local in cluster["file_mounts"].values():
        assert (ROOT / local).is_file()
    install = next(line for line in cluster["setup_commands"] if "pip install" in line)
    assert "--no-deps -r ~/safedreamer/classic-cuda.lock" in install
    assert len(cluster["provider"]["worker_ips"]) == cluster["max_workers"]
    assert any("--dashboard-host=127.0.0.1" in line for line in cluster["head_start_ray_commands"])


def test_the_launcher_refuses_a_wrong_key():
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config(prepare_config(read("cluster.yaml") | {"setup_comands": []}))


def test_the_ray_job_fits_its_training():
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    _, _, command = spec["entrypoint"].partition("exec python -m deploy.cli train ")
    args = parse_train(shlex.split(command)).args
    cfg = args.settings
    check(cfg)
    assert args.ray_address == "auto"
    assert args.run_dir is not None
    assert args.run_dir.is_absolute()
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)
    }
    cluster = spec["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}" in (ROOT / lock()).read_text().splitlines()
    learner, actors = cluster["workerGroupSpecs"]
    for group in (cluster["headGroupSpec"], learner, actors):
        (container,) = group["template"]["spec"]["containers"]
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert any(args.run_dir.is_relative_to(path) for path in paths)
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["name"] == container["volumeMounts"][0]["name"]

    def limit(group: dict[str, Any], kind: str) -> int:
        (container,) = group["template"]["spec"]["containers"]
        return int(container["resources"]["limits"][kind]) * group["replicas"]

    assert limit(learner, "nvidia.com/gpu") == cfg.learner.devices
    assert limit(learner, "cpu") >= cfg.ray.learner_cpus
    spare = limit(learner, "cpu") - cfg.ray.learner_cpus
    assert limit(actors, "cpu") + spare >= cfg.actors.count + 1
