"""Examples cut anew from those of a view: runs of bounded length, or one example per target."""

import dataclasses

import numpy as np

from recscale.data.event_log import EventLogError
from recscale.data.splits import View, runs


def in_windows(view: View, length: int) -> View:
    """Cut each example into runs of at most `length` inputs, so that one pass trains on every target at any length.

    Every target of the view is a target of exactly one run; the event between two runs is the last target of one and
    the first input of the next. For training: the history of a target is cut at its run's beginning.
    """
    if length < 1:
        raise EventLogError(f"in_windows: length={length}, expected at least 1.")
    view = first_apart(view)
    begin = view.start - (view.start == view.target_start)  # an empty history takes a slot
    counts = -(-(view.stop - 1 - begin) // length)
    example = np.repeat(np.arange(len(view)), counts)
    place = np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = begin[example] + place * length
    stop = np.minimum(start + length + 1, view.stop[example])
    target_start = np.maximum(view.target_start[example], start + 1)
    start = np.maximum(start, view.start[example])
    kept = target_start < stop  # a run of history only has nothing to train on
    return dataclasses.replace(
        view, user=view.user[example][kept], start=start[kept], target_start=target_start[kept], stop=stop[kept]
    )


def first_apart(view: View) -> View:
    """A target of an empty history as an example of its own, the others of its user as one that begins with the event.

    Else the blank slot would stand before all events and move them one position on, which `prefixes` does not.
    """
    divided = (view.start == view.target_start) & (view.stop > view.target_start + 1)
    example = np.repeat(np.arange(len(view)), 1 + divided)
    first = np.append(example[:-1] == example[1:], [False])[: len(example)]
    rest = divided[example] & ~first
    target_start = view.target_start[example] + rest
    stop = np.where(first, target_start + 1, view.stop[example])
    return dataclasses.replace(
        view, user=view.user[example], start=view.start[example], target_start=target_start, stop=stop
    )


def prefixes(view: View, length: int = 0) -> View:
    """One example per target, with the last `length` events before it (0: all of them): a window that slides.

    Every example is predicted from its whole history at once; `dropped` and the number of targets stay.
    """
    counts = view.stop - view.target_start
    example, target = np.repeat(np.arange(len(view)), counts), runs(view.target_start, counts)
    start = view.start[example]
    start = np.maximum(start, target - length) if length else start
    return dataclasses.replace(view, user=view.user[example], start=start, target_start=target, stop=target + 1)
