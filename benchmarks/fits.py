"""Fitting a two-axis law: seconds, and how far each fitter ends from the optimum, beside the `chinchilla` package.

    python -m benchmarks.fits [--peer-python=PYTHON] [--draws=1000]

The points are the 240 runs of the Epoch replication where RECSCALE_DATA names a folder that has them
(scaling/chinchilla_epoch.csv), else 240 runs drawn from a known surface. E + A/N^alpha + B/D^beta, Huber loss of the
logarithms, delta 1e-3. "fit" is ours with its certificate; "bootstrap" refits it to 1,000 case resamples; "law" is all
that `fits.fit` makes (both, and the profiles). chinchilla 0.2.0 (`pip install chinchilla==0.2.0` in an environment of
its own, interpreter named by --peer-python or CHINCHILLA_PYTHON) searches its README's grid of 3,125 starts on all
cores in the same run; it is timed without its start-up. "excess" is the loss it ends at over the smallest known. About
four minutes on two idle cores. Writes benchmarks/results/fits.json.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from pyarrow import csv

from recscale.scaling import fits, intervals
from recscale.scaling.estimate import certificate
from recscale.scaling.points import Points

RESULTS = Path(__file__).parent / "results" / "fits.json"
PEER = Path(__file__).parent / "_fits_peer.py"
REPEATS = 5


def runs() -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """(name of the data, N, D, loss), 240 of each."""
    path = (
        Path(os.environ["RECSCALE_DATA"]) / "scaling" / "chinchilla_epoch.csv"
        if "RECSCALE_DATA" in os.environ
        else None
    )
    if path is None or not path.exists():
        rng = np.random.default_rng(11)
        size = np.exp(rng.uniform(np.log(6e7), np.log(1.6e10), 240))
        tokens = np.exp(rng.uniform(np.log(2e9), np.log(3e11), 240))
        loss = (1.82 + 478 * size**-0.347 + 2143 * tokens**-0.367) * np.exp(0.004 * rng.standard_t(3, 240))
        return "synthetic twin", size, tokens, loss
    table = csv.read_csv(path)
    size, tokens, loss = (table[name].to_numpy() for name in ("params", "tokens", "loss"))
    kept = loss < np.sort(loss)[-5]
    return "240 Epoch points", size[kept], tokens[kept], loss[kept]


def ours(points: Points, draws: int) -> dict[str, Any]:
    """Medians over repeats of the fit; one bootstrap and one whole law."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        goal, theta_Q, losses, start_CQ = fits.minimum(points, "additive", "log", 1e-3)
        params = dict(
            zip(("E", "A", "B", "alpha", "beta"), goal.form.natural(theta_Q[None], goal.centre_K)[0], strict=True)
        )
        proof = certificate(goal, points, theta_Q, params, losses)
        seconds.append(time.perf_counter() - began)
    residual_N = goal.residuals(theta_Q[None], goal.y_N[None])[0][0]
    noise = intervals.noise_scale(goal, residual_N, 5, False, np.inf)
    began = time.perf_counter()
    intervals.bootstrap(goal, points, theta_Q, start_CQ[[0, 4]], noise, "case", draws, 0)
    refits = time.perf_counter() - began
    began = time.perf_counter()
    law = fits.fit(points, "additive", delta=1e-3, draws=draws)
    return {
        "fit_seconds": float(np.median(seconds)),
        "bootstrap_seconds": refits,
        "law_seconds": time.perf_counter() - began,
        "draws": draws,
        "params": {name: float(value) for name, value in params.items()},
        "objective": goal.at(theta_Q),
        "certified": not proof.reasons and law.certified,
        "scaled_gradient": proof.gradient,
    }


def theirs(python: str, size: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> dict[str, Any]:
    """The peer on the same points; raises RuntimeError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        table = np.stack([6 * size * tokens, size, tokens, loss], -1)
        path = Path(folder) / "points.csv"
        np.savetxt(path, table, "%.12f", ",", header="C,N,D,loss", comments="")
        done = subprocess.run([python, str(PEER), str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{PEER.name} ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Command line of the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=os.environ.get("CHINCHILLA_PYTHON", ""))
    parser.add_argument("--draws", type=int, default=1000)
    arguments = parser.parse_args()
    name, size, tokens, loss = runs()
    points = Points.of({"N": size, "D": tokens}, loss)
    found = ours(points, arguments.draws)
    result = {
        "data": name,
        "points": len(points),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "recscale": found,
    }
    print(f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':24}{'seconds':>10}{'excess':>12}   E, A, B, alpha, beta")
    values = ", ".join(f"{value:.6g}" for value in found["params"].values())
    print(f"{'recscale fit':24}{found['fit_seconds']:>10.3f}{0.0:>12.1e}   {values}")
    print(f"{f'{arguments.draws} bootstrap refits':24}{found['bootstrap_seconds']:>10.2f}")
    print(f"{'whole law':24}{found['law_seconds']:>10.2f}")
    if not arguments.peer_python:
        print("chinchilla: not measured, name an interpreter that has it with --peer-python")
    else:
        peer = theirs(arguments.peer_python, size, tokens, loss)
        goal, *_ = fits.minimum(points, "additive", "log", 1e-3)
        theta_Q = goal.form.inner(np.array([[*peer["params"].values()]]), goal.centre_K)[0]
        peer["excess"] = goal.at(theta_Q) / found["objective"] - 1
        peer["times_ours"] = peer["seconds"] / found["fit_seconds"]
        result["chinchilla"] = peer
        values = ", ".join(f"{value:.6g}" for value in peer["params"].values())
        print(f"{'chinchilla ' + peer['version']:24}{peer['seconds']:>10.1f}{peer['excess']:>12.1e}   {values}")
        print(f"chinchilla / recscale: {peer['times_ours']:.0f} times the seconds")
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
