"""Calls on a GPU one after the other, timed by the device's own clock.

The host needs some 10 us to start a kernel from Python. Calls that take less go into graphs, which
the device runs back to back; a graph holds about as many as fill a sample. Every measurement begins
with calls that are not timed: while they run the host gets ahead of the device, so that none of
its own time is in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..runtime.device import Device
from ..runtime.driver import LEGACY_STREAM
from .loose import Watch

LONG_NS = 30_000.0  # of a call: longer ones are started one by one
SAMPLE_NS = 100_000.0  # of a graph's calls together
MOST = 64  # calls of a graph

Call = Callable[[int], object]  # starts something on a stream, given by the driver's handle
Step = Callable[[], object]  # starts some calls on the legacy stream


class Replay:
    """Steps in turns, each of them `calls` calls on the legacy default stream."""

    def __init__(self, gpu: Device, steps: Sequence[Step], calls: int = 1) -> None:
        self._gpu, self._steps, self._calls = gpu, steps, calls
        self._next = 0
        with gpu:
            self._watch = Watch(gpu)

    def run(self, calls: int, place: int = 0) -> float:
        """Nanoseconds of the device for so many calls; waits. `place` means nothing here.

        Raises Error where a call fails, now or on the device.
        """
        steps = math.ceil(calls / self._calls)
        with self._gpu:
            self._step()
            self._watch.start(LEGACY_STREAM)
            for _ in range(steps):
                self._step()
            return self._watch.stop(LEGACY_STREAM) * calls / (steps * self._calls)

    def _step(self) -> None:
        self._steps[self._next]()
        self._next = (self._next + 1) % len(self._steps)


def replay(
    gpu: Device,
    calls: Sequence[Call],
    capture: Callable[[Sequence[Call]], Step | None] | None = None,
) -> Replay:
    """The calls in turns, in graphs where they are short.

    `capture` makes a step of calls, or None where they cannot be captured; by default by the
    driver, which is for calls of compiled functions.
    """
    plain = Replay(gpu, [_on_legacy(call) for call in calls])
    plain.run(1)  # the first call is like no other
    each = plain.run(3) / 3
    if each >= LONG_NS:
        return plain
    count = min(MOST, math.ceil(SAMPLE_NS / max(each, 1.0)))
    steps = []
    for first in range(0, len(calls), count):
        chunk = [calls[(first + i) % len(calls)] for i in range(count)]
        step = capture(chunk) if capture is not None else _captured(gpu, chunk)
        if step is None:
            return plain
        steps.append(step)
    return Replay(gpu, steps, count)


def _on_legacy(call: Call) -> Step:
    return lambda: call(LEGACY_STREAM)


def _captured(gpu: Device, calls: Sequence[Call]) -> Step | None:
    """The calls as one graph."""
    with gpu:
        aside = gpu.stream()

        def body() -> None:
            for call in calls:
                call(aside.handle)

        graph = gpu.capture(aside.handle, body)
    return None if graph is None else lambda: graph.launch(LEGACY_STREAM)
