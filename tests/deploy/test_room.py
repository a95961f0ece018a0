"""How much room a run takes on a cluster, and what it says when there is none."""

from __future__ import annotations

import pytest

from common.config import Config
from common.configuration import from_dict
from deploy.accelerators import Shares
from deploy.room import bundles_of, gpus_of, missing, sentence


def config(count: int = 6, devices: int = 1, **ray: object) -> Config:
    return from_dict({"actors": {"count": count}, "learner": {"devices": devices}, "ray": ray}, "test")


def test_home_comes_first_then_actors_then_the_evaluator():
    assert bundles_of(config(count=2), Shares(1), central=False) == [
        {"CPU": 2.0, "GPU": 1.0},
        {"CPU": 1.0},
        {"CPU": 1.0},
        {"CPU": 1.0},
    ]
    assert bundles_of(config(count=1, learner_cpus=4), Shares(0), central=False)[0] == {"CPU": 4.0}


def test_an_inference_server_has_a_place_of_its_own_at_the_end():
    *_, evaluator, server = bundles_of(config(count=2), Shares(1, 0.6, 0.4), central=True)
    assert evaluator == {"CPU": 1.0, "GPU": 0.4}
    assert server == {"CPU": 1.0, "GPU": 0.6}


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
    found = gpus_of(config(devices=devices, wait_for_gpu=wait), nodes, central=lambda there: False)
    assert found == (Shares(expected), False)


@pytest.mark.parametrize(
    ("devices", "nodes", "expected"),
    [
        (1, [{"CPU": 8}], (0, 0, 0)),
        (1, [{"GPU": 1}], (0.4, 0.4, 0.2)),
        (1, [{"GPU": 1}, {"GPU": 1}], (1, 0.6, 0.4)),
        (0, [{"GPU": 2}, {"GPU": 4}], (4, 0.6, 0.4)),
        (0, [{"GPU": 4}], (3, 0.6, 0.4)),
    ],
)
def test_an_inference_server_shares_the_gpus(devices, nodes, expected):
    found = gpus_of(config(devices=devices), nodes, central=lambda there: True)
    assert found == (Shares(*expected), True)


def lack(total: list[dict], free: list[dict], learner_gpus: int = 0, count: int = 6) -> str:
    return missing(bundles_of(config(count=count), Shares(learner_gpus), central=False), total, free)


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
    addresses = {"a": "10.0.0.1", "b": "10.0.0.2"}
    assert sentence(["a", "b", "a", "b", "c"], addresses, actors=3) == (
        "learner and replay on 10.0.0.1, evaluator on c, actors on 10.0.0.2 (0, 2), 10.0.0.1 (1)"
    )
    assert sentence(["a", "b", "a", "b"], addresses, actors=1) == (
        "learner and replay on 10.0.0.1, evaluator on 10.0.0.1, inference server on 10.0.0.2, "
        "actors on 10.0.0.2 (0)"
    )
