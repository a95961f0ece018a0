"""Where the parts of a run live: all on this machine, or placed on the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private.state import available_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from common.config import Config
from common.types import UserError
from deploy import wiring
from deploy.accelerators import shares
from deploy.room import Resources, bundles_of, gpus_of, missing, sentence
from deploy.stack import lock
from replay.server import free_ports

logger = logging.getLogger(__name__)

_SCOUT_SECONDS = 300.0  # the program has to arrive on the node first
_SHARED_SECONDS = 5.0  # until a file that was just written is seen on another node
_PATIENT_SECONDS = 3.0  # of waiting without a word

Options = dict[str, Any]  # of a Ray actor


class Placement(Protocol):
    """Where each part goes. The options are for `ActorClass.options`; their CPUs are set aside elsewhere."""

    host: str  # the address of replay's node, as the others reach it
    central: bool  # whether one server decides for all actors

    def learner(self) -> Options: ...

    def replay(self) -> Options:
        """Beside the learner; for as many servers as there are."""
        ...

    def actor(self, index: int) -> Options: ...

    def evaluator(self) -> Options: ...

    def inference(self) -> Options: ...

    def beside_driver(self) -> Options:
        """Parts that need little: the metrics writer, which writes the run directory, the holder."""
        ...

    def free_ports(self, count: int) -> list[int]:
        """Different ports on `host` that nobody listens on now."""
        ...

    def close(self) -> None: ...


class ThisMachine:
    """All parts under a Ray of this process.

    CPUs are oversubscribed on purpose: the rate limiter shares them out better than Ray can.
    """

    def __init__(self, cfg: Config):
        self.host = ray.util.get_node_ip_address()
        there = int(ray.cluster_resources().get("GPU", 0))
        self.central = wiring.central_inference(cfg, there)
        self._gpus = shares(there, cfg.learner.devices, self.central)

    def learner(self) -> Options:
        return {"num_cpus": 0, "num_gpus": self._gpus.learner}

    def replay(self) -> Options:
        return {"num_cpus": 0}

    def actor(self, index: int) -> Options:
        return {"num_cpus": 0}

    def evaluator(self) -> Options:
        return {"num_cpus": 0, "num_gpus": self._gpus.evaluator}

    def inference(self) -> Options:
        return {"num_cpus": 0, "num_gpus": self._gpus.inference}

    def beside_driver(self) -> Options:
        return {"num_cpus": 0}

    def free_ports(self, count: int) -> list[int]:
        return free_ports(count)

    def close(self) -> None:
        pass


class Cluster:
    """One placement group: learner and replay on one node (its home), actors spread, the evaluator anywhere.

    The group holds the CPUs, the parts within take none of their own: one that was killed a moment ago
    cannot keep its successor waiting.

    Raises UserError when the cluster has no room in time, and when home does not see the run directory.
    """

    def __init__(self, cfg: Config, run: Path):
        self._run = run
        nodes = [node["Resources"] for node in _alive()]
        self._gpus, self.central = gpus_of(cfg, nodes, partial(wiring.central_inference, cfg))
        bundles = bundles_of(cfg, self._gpus, self.central)
        self._evaluator = 1 + cfg.actors.count
        self._group = placement_group(bundles, strategy="SPREAD")
        try:
            _await_room(self._group, bundles, cfg.ray.placement_seconds)
            nodes = _bundle_nodes(self._group)
            self._home = nodes[0]
            with _marked(run) as mark:
                self.host = self._visit(_shares, run, mark)
        except BaseException:
            self.close()
            raise
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _alive()}
        logger.info(sentence(nodes, addresses, cfg.actors.count))

    def learner(self) -> Options:
        self._check_home()
        return self._bundle(0) | {"num_gpus": self._gpus.learner}

    def replay(self) -> Options:
        # Not by its bundle, which may move to another node: the others would look for it in vain.
        self._check_home()
        return _on(self._home)

    def actor(self, index: int) -> Options:
        return self._bundle(1 + index)

    def evaluator(self) -> Options:
        return self._bundle(self._evaluator) | {"num_gpus": self._gpus.evaluator}

    def inference(self) -> Options:
        return self._bundle(self._evaluator + 1) | {"num_gpus": self._gpus.inference}

    def beside_driver(self) -> Options:
        return _on(ray.get_runtime_context().get_node_id())

    def free_ports(self, count: int) -> list[int]:
        return self._visit(free_ports, count)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # of a cluster that has gone
            remove_placement_group(self._group)

    def _bundle(self, index: int) -> Options:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return {"num_cpus": 0, "scheduling_strategy": strategy}

    def _check_home(self) -> None:
        if self._home not in {node["NodeID"] for node in _alive()}:
            raise UserError(
                "the node of learner and replay has left the cluster; go on from the last checkpoint with "
                f"--resume {self._run}"
            )

    def _visit(self, function: Any, *args: Any) -> Any:
        """What the function returns on home. Raises UserError also when our code does not run there."""
        task = ray.remote(function).options(**_on(self._home), max_retries=0)
        answer = task.remote(*args)
        deadline = time.monotonic() + _SCOUT_SECONDS
        while not ray.wait([answer], timeout=1.0)[0]:  # in short steps: a signal shall be heard
            if time.monotonic() > deadline:
                raise UserError(f"the node of the learner has not answered for {_SCOUT_SECONDS:.0f} s")
        try:
            return ray.get(answer)
        except Exception as error:
            cause = getattr(error, "cause", None)  # without Ray's traceback around it
            if isinstance(cause, UserError):
                raise cause from error
            text = " ".join(str(error).split())[-300:]
            raise UserError(
                f"the program does not run on the node of the learner (... {text}); install "
                f"{lock()} with --no-deps for the Python that starts Ray there"
            ) from error


def _await_room(group: PlacementGroup, bundles: Sequence[Resources], seconds: float) -> None:
    started, said = time.monotonic(), False
    while not group.wait(timeout_seconds=1):
        waited = time.monotonic() - started
        total = [node["Resources"] for node in _alive()]
        lack = missing(bundles, total, list(available_resources_per_node().values()))
        if waited >= seconds:
            raise UserError(
                f"the cluster had no room for this run within {seconds:g} s: {lack}. Start more nodes, lower "
                "--actors.count, or wait longer with --ray.placement-seconds"
            )
        if waited >= _PATIENT_SECONDS and not said:
            said = True
            logger.info("waits up to %g s for room on the cluster: %s", seconds, lack)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _bundle_nodes(group: PlacementGroup) -> list[str]:
    found = ray.util.placement_group_table(group)["bundles_to_node_id"]
    return [found[index] for index in sorted(found)]


def _on(node: str) -> Options:
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


@contextmanager
def _marked(run: Path) -> Iterator[Path]:
    """A new file in the run directory meanwhile, for another node to find."""
    mark = run / f".seen-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _shares(run: Path, mark: Path) -> str:
    """The address of this node. Raises UserError unless it sees the driver's run directory."""
    address = ray.util.get_node_ip_address()
    deadline = time.monotonic() + _SHARED_SECONDS
    while not mark.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"the learner's node {address} does not see the run directory {run}: choose a --run-dir on "
                "storage that all nodes share"
            )
        time.sleep(0.2)
    try:
        mark.unlink()
    except OSError as error:
        raise UserError(
            f"the learner's node {address} cannot write in the run directory {run} ({error.strerror})"
        ) from None
    return address
