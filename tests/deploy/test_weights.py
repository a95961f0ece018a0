"""Versions of parameters over several lives of a learner."""

from __future__ import annotations

from deploy import wiring
from deploy.weights import Holder
from learner.learner import Learner


def test_only_newer_versions_are_taken_and_handed_out():
    holder = Holder()
    assert holder.version() == 0
    assert holder.get(0) is None
    for version in (1, 3, 2):
        holder.put(version, f"parameters {version}")
    assert holder.version() == 3
    assert holder.get(2) == (3, "parameters 3")
    assert holder.get(3) is None


def test_a_learner_that_starts_anew_hands_out_newer_versions_than_before(tiny_config, tmp_path):
    cfg = tiny_config()
    holder = Holder()
    train = wiring.train_step(cfg, wiring.spec_of(cfg))
    for expected in ([1, 2], [3, 4]):
        learner = Learner(train, lambda timeout: None, holder.put, tmp_path)
        learner.number_versions_from(holder.version())
        assert [learner.publish(), learner.publish()] == expected
    assert holder.version() == 4
