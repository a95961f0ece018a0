"""Writes tests/parity/data from the recordings of the published implementation, numbers only.

    python -m tests.parity.make_data FOLDER

Keeps what the tests read, of long arrays every 17th number, and of `osrp_lag` what differs from `bsrp_lag`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.parity.recorded import DATA, INIT_FIELDS, thinned

_WHOLE = ("var/", "data/", "policy/obs/", "policy/noise", "lagrange/", "pid/", "moments/", "elite/")
_DROPPED = re.compile(
    r"dec_sum/|pid/diff_norm|report/|traj/logit|wm_mets/|actor_mets/|policy/obs/(?!is_first|image|observation|lagrange_penalty)"
    r"|data/(reset|lagrange)|head/.*/logits|initial/(logit|prev)|img_step/out/stoch|policy/out/log|prior/(deter|stoch)"
    r"|prior_sampled/(deter|stoch)|train_mets/(?!.*(_loss_mean|grad_norm|opt_loss"
    r"|_return_raw_mean|lagrange_multiplier|penalty_multiplier)$)|elite/.*/elite_"
)


def read(path: Path) -> dict[str, np.ndarray]:
    """A method's recorded arrays that tests need, thinned, and the statistics of its initial variables."""
    with np.load(path) as file:
        arrays = {
            key: file[key] if key.startswith(_WHOLE) else thinned(file[key])
            for key in file.files
            if not _DROPPED.match(key)
        }
    statistics = json.loads(path.with_suffix(".json").read_text())["init_stats"]
    for name, entry in statistics.items():
        if "mean" in entry:
            arrays[f"init/{name}"] = np.array([entry[field] for field in INIT_FIELDS])
    return arrays


def without(arrays: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays that are not among the known ones, bit for bit."""
    return {
        key: value
        for key, value in arrays.items()
        if key not in known or not np.array_equal(value, known[key], equal_nan=value.dtype.kind == "f")
    }


def main(folder: Path) -> None:
    arrays = {method: read(folder / f"{method}.npz") for method in ("bsrp_lag", "osrp_lag", "osrp_vector")}
    arrays["osrp_lag"] = without(arrays["osrp_lag"], arrays["bsrp_lag"])
    for method, kept in arrays.items():
        np.savez_compressed(DATA / f"{method}.npz", **kept)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
