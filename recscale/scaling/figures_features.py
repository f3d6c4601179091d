"""Figure of a feature axis: what each feature buys over the orderings, and the loss against their number."""

from recscale.scaling.feature_orders import Answer
from recscale.scaling.figures import INK, LAW, MUTED, Diagram, Panel, band, line, points

TITLE = "What each context feature buys"


def feature_gains(found: Answer, unit: str = "nats/event", name: str = "features") -> Diagram:
    """Gains averaged over the orderings with 90 % intervals, largest on top, and the loss with 0, 1, .. features on."""
    how = "all orderings (Shapley values)" if found.exact else f"{len(found.used)} random orderings"
    caption = (
        f"Averages over {how}; bars and shading: 90 % over {found.users:,} users"
        f"{'' if found.exact else ' and orderings'}. Crosses: the least and the most in any one ordering."
    )
    if found.missing:
        caption += f" {len(found.missing)} orderings lack runs and are left out."
    return Diagram(name, TITLE, caption, (_gains(found, unit), _curve(found, unit)))


def _gains(found: Answer, unit: str) -> Panel:
    rows = found.gains[::-1]
    place = list(range(len(rows)))
    drawn = [line("", [0.0, 0.0], [-0.6, len(rows) - 0.4], MUTED)]
    for extreme in ("least", "most"):
        drawn.append(points("", [getattr(gain, extreme) for gain in rows], place, MUTED, shape="cross"))
    for flat, colour in ((False, LAW), (True, MUTED)):
        chosen = [(i, gain) for i, gain in enumerate(rows) if (gain.low <= 0 <= gain.high) == flat]
        if chosen:
            at = [i for i, _ in chosen]
            value, low, high = ([getattr(gain, side) for _, gain in chosen] for side in ("value", "low", "high"))
            drawn.append(points("", value, at, colour, low=low, high=high, across=True, shape="square"))
    names = tuple(gain.feature for gain in rows)
    return Panel("gain of a feature", f"loss saved ({unit}), above 0 is better", "", tuple(drawn), names=names)


def _curve(found: Answer, unit: str) -> Panel:
    count = list(range(len(found.saved)))
    low, value, high = ([getattr(step, side) for step in found.saved] for side in ("low", "value", "high"))
    drawn = (band("", count, low, high, framed=False), line("", count, value), points("", count, value, INK))
    label = f"loss saved against none ({unit})"
    return Panel("number of features", "features switched on", label, drawn, x_whole=True)
