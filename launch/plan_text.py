"""The report of launch.plan as text: one block per question; every number has its unit."""

from typing import Any

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def text(found: dict[str, Any]) -> str:
    """The whole report."""
    blocks = (_head, _parameters, _memory, _flops, _collectives, _roofline, _run, _sources)
    return "\n\n".join("\n".join(block(found)) for block in blocks) + "\n"


def amount(value: float, unit: str) -> str:
    """1.5e9, "B" -> "1.50 GB"."""
    for size, letter in UNITS:
        if abs(value) >= size:
            return f"{value / size:.2f} {letter}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _rows(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [title, *(f"  {name:{width}}  {value}" for name, value in rows)]


def _head(f: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{name} {f['mesh'][name]}" for name in ("replica", "data", "model") if name in f["mesh"])
    rest = ", ".join(f"{key} {f['mesh'][key]}" for key in ("accumulate", "remat") if key in f["mesh"])
    how = f"compiled in {f['compile_seconds']} s" if f["compiled"] else "NOT compiled"
    versions = ", ".join(f"{name} {value}" for name, value in f["versions"].items())
    rows = [
        ("config", f["config"]),
        ("chips", f"{f['topology']['chips']} x {f['chip']['title']} ({f['topology']['name']})"),
        ("mesh", f"{mesh}; {rest}"),
        ("step", f"{how} ({versions})"),
    ]
    return _rows("Plan", rows)


def _parameters(f: dict[str, Any]) -> list[str]:
    rows = [(name, f"{count:,}") for name, count in f["parameters"].items() if count]
    return _rows("Parameters, total", rows)


def _memory(f: dict[str, Any]) -> list[str]:
    m = f["memory"]
    share = 100 * m["total"] / m["limit"]
    rows = [(name, amount(size, "B")) for name, size in m["parts"].items()]
    verdict = "FITS" if m["fits"] else "DOES NOT FIT"
    rows.append(("total", f"{amount(m['total'], 'B')} of {amount(m['limit'], 'B')} ({share:.0f} %): {verdict}"))
    state = {name: size for name, size in m["state"].items() if size >= 1e6}
    rows.append(("of the state", ", ".join(f"{name} {amount(size, 'B')}" for name, size in state.items()) or "< 1 MB"))
    rows += [("to change", line) for line in f["advice"]]
    return _rows(f"Bytes per device ({m['from']})", rows)


def _flops(f: dict[str, Any]) -> list[str]:
    c = f["flops"]
    rows = [(part, amount(value, "FLOP")) for part, value in c["by_part"].items()]
    rows += [("total", amount(c["total"], "FLOP")), ("per device", amount(c["per_device"], "FLOP"))]
    if c["compiler_per_device"] is not None:
        ratio = c["compiler_per_device"] / c["per_device"] if c["per_device"] else float("nan")
        rows.append(
            (
                "in the program",
                f"{amount(c['compiler_per_device'], 'FLOP')} per device, loops counted in full: {ratio:.2f} of the "
                "analytic (recomputation, masked scores)",
            )
        )
    if c["compiler_loops_once_per_device"] is not None:
        once = amount(c["compiler_loops_once_per_device"], "FLOP")
        rows.append(("compiler's own", f"{once} per device; it counts the body of a loop once, so not comparable"))
    return _rows("Training FLOPs per step by part (analytic, forward and backward, all devices)", rows)


def _collectives(f: dict[str, Any]) -> list[str]:
    rows = [
        (
            kind,
            f"{amount(c['bytes'], 'B')} in {c['count']:,}, largest {amount(c['largest'], 'B')} among "
            f"{c['largest_group']} ({_tail(c['largest_source'])})",
        )
        for kind, c in f["collectives"].items()
    ]
    if f["open_loops"]:
        names = ", ".join(_tail(name) for name in f["open_loops"])
        rows.append(("open loops", f"{names}: trips depend on data, counted as one"))
    how = "" if f["compiled"] else " (estimate)"
    return _rows(f"Collectives per step and device{how}", rows or [("none", "")])


def _tail(source: str) -> str:
    return "/".join(source.split("/")[-3:]) or "no name"


def _roofline(f: dict[str, Any]) -> list[str]:
    r, t = f["roofline"], f["traffic"]
    rows = [(name, duration(seconds)) for name, seconds in r["seconds"].items()]
    rows += [
        ("bound", f"{r['bound']}: at least {duration(r['step_seconds'])} a step"),
        ("HBM moves", f"{amount(t['bytes'], 'B')} ({t['from']})"),
        ("at the least", ", ".join(f"{name} {amount(size, 'B')}" for name, size in t["least"].items())),
        ("throughput", f"at most {f['events_per_second']:,.0f} events/s ({f['events_per_step']:,} events a step)"),
        ("MFU", f"at most {100 * f['mfu_bound']:.1f} % of {amount(r['peak_flops'], 'FLOP/s')} ({r['dtype']})"),
    ]
    return _rows("Time per step at the peaks of the chip, everything overlapped (roofline)", rows)


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _run(f: dict[str, Any]) -> list[str]:
    r = f["run"]
    cost = "give --per_chip_price for the cost" if r["cost"] is None else f"cost at least {r['cost']:,.2f}"
    rows = [
        ("events", f"{r['events']:,} in {r['steps']:,} steps"),
        ("time", f"at least {_hours(r['hours'])} hours, {_hours(r['chip_hours'])} chip-hours; {cost}"),
    ]
    return _rows("The whole run", rows + [("note", line) for line in f["notes"]])


def _sources(f: dict[str, Any]) -> list[str]:
    return ["Peaks of the chip", *(f"  {source}" for source in f["chip"]["sources"])]
