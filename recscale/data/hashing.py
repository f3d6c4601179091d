"""Random numbers by hashing: the same for the same numbers, whatever batch, process or order they are asked in."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(*parts: int | np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) by a hash of all parts (integers or arrays [n]; the mixer of SplitMix64 over each)."""
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    with np.errstate(over="ignore"):
        state = np.full(shape, np.uint64(int(parts[0]) % 2**64)) if np.ndim(parts[0]) == 0 else _bits(parts[0])
        for part in parts[1:]:
            state = _mixed((state ^ _bits(part)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _bits(part: int | np.ndarray) -> np.ndarray:
    return np.asarray(part).astype(np.uint64)


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
