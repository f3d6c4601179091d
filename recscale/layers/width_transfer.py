"""Width transfer (muP for Adam): what is tuned at a small width holds at a large one.

With the standard parametrisation ("sp") the change of the hidden states per step grows with the width, so the best
learning rate falls with it. Here ("mup") every part changes by as much at any width. A base shape fixes the constants:
at that shape both parametrisations are the same model to the bit. With m = width / base width:

    parameter                        initial deviation      Adam's learning rate    decay of a step
    matrix, reads and writes width   x m^-1/2               x 1/m                   unchanged
    matrix, writes width alone       unchanged              unchanged               unchanged
    matrix, reads width alone        x 1/m                  x 1/m                   unchanged
    vector (bias, gain), table       unchanged              unchanged               unchanged

Scores of attention fall with 1 / head_dim instead of its square root; dot products of queries and items of growing
width with 1 / embed_dim (cosines do not care). Of depth nothing is said. The heads' total width and that of the
feed-forward block are taken to grow with `width`.

Sources: arXiv 2203.03466, table 8 (Adam); arXiv 2310.17813 for matrices that change between two growing widths.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


@dataclasses.dataclass(frozen=True)
class BaseShape:
    """Where both parametrisations agree: width of the hidden states, of the item vectors, and of a head's queries."""

    width: int
    embed_dim: int
    head_dim: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(
                    f"optim.base_{name} = {value}: optim.parametrisation = 'mup' needs the shape at which the learning "
                    "rate was tuned; recscale.scaling.recipes.width_transfer(config) writes it"
                )


class Factors(NamedTuple):
    """Of one parameter: its initial deviation and its learning rate, times those of the standard parametrisation."""

    initial: float
    rate: float


def scaled(tree: Any, factors: Mapping[str, float]) -> Any:
    """The tree with the leaves named in `factors` ("layers.uvqk") multiplied; the others as they are."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # of an nnx.Param
        return leaf * factors[name] if name in factors else leaf

    return jax.tree_util.tree_map_with_path(one, tree)
