"""What a train step would send, from its layout alone: for chips whose compiler is not installed, or refuses."""

import numpy as np

from launch.hlo import Collective, Program


def program(
    mesh: dict[str, int], flops: float, dense_shard: int, weights: float, dense: float, passes: int, rows: float
) -> Program:
    """The collectives that the layout of a step asks for, as recscale/mesh.py and the tables lay it out.

    Touched rows go to the devices that asked and their gradients back (all-to-all among all). Gradients of dense
    parameters are summed over the devices that hold the same shard (all-reduce); where "model" spreads the matrices,
    each pass gathers them first, and their gradients are summed and scattered. flops: of a device. dense_shard: bytes
    of a device's dense parameters. weights, dense: bytes of all of them at the type of the compute, and stored.
    passes: how often a step reads the weights. rows: bytes that a device looks up.
    """
    places = np.arange(mesh["replica"] * mesh["data"] * mesh["model"]).reshape(-1, mesh["model"])
    found = [
        Collective("all-to-all", int(rows), 2, True, None, "rows and their gradients"),
        Collective("all-reduce", dense_shard, 1, True, places.T, "gradients of dense parameters"),
    ]
    if mesh["model"] > 1:
        found += [
            Collective("all-gather", int(weights), passes, True, places, "dense weights"),
            Collective("reduce-scatter", int(dense), mesh["accumulate"], True, places, "gradients of dense weights"),
        ]
    return Program(places.size, tuple(found), flops, 0.0, ())
