"""How much room a run takes on a cluster, and what is missing there: arithmetic over nodes' resources."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from common.config import Config
from deploy.accelerators import Shares, shares

Resources = Mapping[str, float]  # of a node or a bundle, by Ray's names


class _Need(NamedTuple):
    cpus: float
    gpus: float


def bundles_of(cfg: Config, gpus: Shares, central: bool) -> list[dict[str, float]]:
    """What a run sets aside: home, every actor, the evaluator, and the inference server if it is central.

    Ray spreads the first ones first.
    """
    server = [_bundle(1, gpus.inference)] * central
    actors = [_bundle(1, 0)] * cfg.actors.count
    return [_bundle(cfg.ray.learner_cpus, gpus.learner), *actors, _bundle(1, gpus.evaluator), *server]


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})


def gpus_of(cfg: Config, nodes: Sequence[Resources], central: Callable[[int], bool]) -> tuple[Shares, bool]:
    """How a run divides the cluster's GPUs, and whether one server decides for all actors.

    The learner gets none where there are none, all of a node for 0 devices.

    Args:
        central: tells the latter by the number of GPUs.
    """
    each = [int(node.get("GPU", 0)) for node in nodes]
    most, there = max(each, default=0), sum(each)
    if cfg.ray.wait_for_gpu or most:
        most = max(most, cfg.learner.devices, 1)  # what is not there yet is waited for
    there = max(there, most)
    return shares(there, cfg.learner.devices, central(there), most), central(there)


def missing(bundles: Sequence[Resources], total: Sequence[Resources], free: Sequence[Resources]) -> str:
    """What a cluster lacks for these bundles, of which the first is home.

    Args:
        total: resources of every node.
        free: of them, what nobody holds.
    """
    home, wanted = _need(bundles[:1]), _need(bundles)
    there, left = _need(total), _need(free)
    names = f"{_amount(home)} on one node for learner and replay"
    if not _any_holds(total, home):
        return f"it needs {names}, the largest has {_amount(_largest(total, home))}"
    for kind in ("cpus", "gpus"):
        need, has, rest = (getattr(sums, kind) for sums in (wanted, there, left))
        unit = kind[:-1].upper()
        if need > has:
            return f"it needs {_count(need, unit)}, the cluster has {has:g}"
        if need > rest:
            return f"it needs {_count(need, unit)}, of the cluster's {has:g} only {rest:g} are free"
    if not _any_holds(free, home):
        return f"it needs {names}, the largest has {_amount(_largest(free, home))} free"
    return f"it needs {_amount(wanted)}, {names}, and what is free lies too scattered"


def sentence(bundle_nodes: Sequence[str], addresses: Mapping[str, str], actors: int) -> str:
    """Who lives where: 'learner and replay on 10.0.0.2, evaluator on ..., actors on 10.0.0.1 (0, 2)'."""
    hosts = [addresses.get(node, node) for node in bundle_nodes]
    home, acting, others = hosts[0], hosts[1 : 1 + actors], hosts[1 + actors :]
    shares = [
        f"{host} ({', '.join(str(i) for i, at in enumerate(acting) if at == host)})"
        for host in dict.fromkeys(acting)
    ]
    after = zip(("evaluator", "inference server"), others, strict=False)  # the latter is not in every run
    named = ", ".join(f"{name} on {host}" for name, host in after)
    return f"learner and replay on {home}, {named}, actors on {', '.join(shares)}"


def _need(resources: Iterable[Resources]) -> _Need:
    listed = list(resources)
    return _Need(sum(each.get("CPU", 0) for each in listed), sum(each.get("GPU", 0) for each in listed))


def _any_holds(nodes: Sequence[Resources], need: _Need) -> bool:
    return any(_holds(_need([node]), need) for node in nodes)


def _holds(has: _Need, need: _Need) -> bool:
    return has.cpus >= need.cpus and has.gpus >= need.gpus


def _largest(nodes: Sequence[Resources], need: _Need) -> _Need:
    """The node that comes nearest to the need: GPUs first."""
    each = [_need([node]) for node in nodes] or [_Need(0, 0)]
    return max(each, key=lambda has: (min(has.gpus, need.gpus), min(has.cpus, need.cpus)))


def _amount(need: _Need) -> str:
    return _count(need.cpus, "CPU") + (f" and {_count(need.gpus, 'GPU')}" if need.gpus else "")


def _count(number: float, unit: str) -> str:
    return f"{number:g} {unit}" + ("" if number == 1 else "s")
