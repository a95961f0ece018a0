"""How the driver of a run joins a Ray cluster that is there already."""

from __future__ import annotations

import os
import sys

import grpc
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from common.config import RayConfig
from common.types import UserError
from deploy import shipping, signals
from deploy.stack import lock

_PROBE_SECONDS = 10.0


def connect(cfg: RayConfig) -> None:
    """Makes this process a driver of the cluster, for which it ships its own code.

    The workers of a job get the same shipment: what the job itself came with may hold secrets.

    Raises UserError in bounded time when there is no such cluster, or this machine is not part of it.
    """
    address = _resolve(cfg.address)
    _probe(address, cfg.address)
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        with shipping.program() as directory, signals.held_back():
            ray.init(
                address=address,
                logging_level="error",
                log_to_driver=True,
                runtime_env={"working_dir": str(directory), "env_vars": shipping.everywhere(os.environ)},
            )
    except Exception as error:
        raise UserError(
            f"this machine cannot drive the Ray cluster at {address} ({' '.join(str(error).split())[:300]}); "
            "start the run on one of its nodes, or from anywhere with `safedreamer submit`"
        ) from error


def _resolve(address: str) -> str:
    from ray._private import services

    if address == "auto":
        # Not what Ray finds by itself: that may be the private Ray of another run on this machine.
        found = os.environ.get("RAY_ADDRESS") or services.find_bootstrap_address(None)
        if not found or found == "auto":
            raise UserError(
                "no Ray cluster was started on this machine (`ray start`); give --ray-address HOST:PORT, or "
                "leave it empty for a Ray of the run's own"
            )
        address = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--ray-address must be HOST:PORT of the cluster's head or auto, not {address}")
    return services.canonicalize_bootstrap_address(address) or address


def _probe(address: str, given: str) -> None:
    """Ray itself would try for minutes, and deaf to signals, to reach what is not there."""
    request = gcs_service_pb2.CheckAliveRequest()
    try:
        with grpc.insecure_channel(address) as channel:
            stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            version = stub.CheckAlive(request, timeout=_PROBE_SECONDS).ray_version
    except grpc.RpcError:
        raise UserError(
            f"there is no Ray cluster at {address} (--ray-address {given}); give HOST:PORT of its head as "
            "`ray start --head` prints it, or --ray-address '' for a Ray of the run's own"
        ) from None
    if version != ray.__version__:
        raise UserError(
            f"the cluster at {address} runs Ray {version}, this is {ray.__version__}: install the versions "
            f"of {lock()} on its nodes"
        )
