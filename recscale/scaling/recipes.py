"""Named recipes: numbers that follow from other numbers, each with its formula and where it comes from."""

HEAD_WIDTH = 32


def heads(width: int) -> int:
    """Heads of width 32, at least one: max(1, width // 32). HSTU's released shapes use 25 to 64."""
    return max(1, width // HEAD_WIDTH)


def learning_rate(base: float, base_width: int, width: int) -> float:
    """base * sqrt(base_width / width): Adam's learning rate falls with width, more gently than muP's 1 / width.

    A choice, not a law: the square root keeps small models fast and large ones stable over one decade of width.
    """
    return base * (base_width / width) ** 0.5
