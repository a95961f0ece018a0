"""How much room a run takes on a cluster, and what it says when there is none."""

from __future__ import annotations

import pytest

from common.config import Config, from_dict
from deploy.room import bundles_of, gpus, missing, sentence


def config(count: int = 6, devices: int = 1, **ray: object) -> Config:
    return from_dict({"actors": {"count": count}, "learner": {"devices": devices}, "ray": ray}, "test")


def test_home_comes_first_then_actors_then_the_evaluator():
    assert bundles_of(config(count=2), 1) == [
        {"CPU": 2.0, "GPU": 1.0},
        {"CPU": 1.0},
        {"CPU": 1.0},
        {"CPU": 1.0},
    ]
    assert bundles_of(config(count=1, learner_cpus=4), 0)[0] == {"CPU": 4.0}


@pytest.mark.parametrize(
    ("devices", "nodes", "wait", "expected"),
    [
        (1, [{"CPU": 8}], False, 0),
        (4, [{"CPU": 8}], False, 0),
        (1, [{"CPU": 8}, {"GPU": 4}], False, 1),
        (0, [{"GPU": 2}, {"GPU": 4}], False, 4),
        (8, [{"GPU": 4}], False, 8),
        (1, [], True, 1),
        (0, [{"CPU": 8}], True, 1),
    ],
)
def test_gpus_are_asked_for_where_there_are_some(devices, nodes, wait, expected):
    assert gpus(config(devices=devices, wait_for_gpu=wait), nodes) == expected


def lack(total: list[dict], free: list[dict], learner_gpus: int = 0, count: int = 6) -> str:
    return missing(bundles_of(config(count=count), learner_gpus), total, free)


def test_what_is_missing_is_named():
    four, eight = [{"CPU": 4.0}], [{"CPU": 8.0}, {"CPU": 8.0}]
    assert lack(four, four) == "it needs 9 CPUs, the cluster has 4"
    assert lack(eight, [{"CPU": 3.0}, {"CPU": 1.0}]) == "it needs 9 CPUs, of the cluster's 16 only 4 are free"
    assert lack(eight, eight, 1) == (
        "it needs 2 CPUs and 1 GPU on one node for learner and replay, the largest has 8 CPUs"
    )
    split = [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 64.0}]
    assert lack(split, split, 1) == (
        "it needs 2 CPUs and 1 GPU on one node for learner and replay, the largest has 1 CPU and 2 GPUs"
    )
    gpu = [{"CPU": 8.0, "GPU": 1.0}]
    assert lack(gpu, [{"CPU": 8.0}], 1, count=1) == "it needs 1 GPU, of the cluster's 1 only 0 are free"
    ones = [{"CPU": 2.0}] * 5
    assert (
        lack(ones, [{"CPU": 1.0}, *ones[1:]], count=7)
        == "it needs 10 CPUs, of the cluster's 10 only 9 are free"
    )
    assert "on one node for learner and replay, the largest has 1 CPU free" in lack(
        ones, [{"CPU": 1.0}] * 5, count=1
    )


def test_places_are_told_by_address():
    assert sentence(["a", "b", "a", "b", "c"], {"a": "10.0.0.1", "b": "10.0.0.2"}) == (
        "learner and replay on 10.0.0.1, evaluator on c, actors on 10.0.0.2 (0, 2), 10.0.0.1 (1)"
    )
