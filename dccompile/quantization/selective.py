"""Which layers to leave in float so that a metric falls by no more than allowed.

Layers are ranked, the worst first. A prefix of the ranks is left in float: none, then 1, 2, 4, 8 ..
until the metric holds, then bisection between the last that did not and the first that did. What
was in the prefix only because something worse stood behind it goes back to integers, the cheapest
first: all of it at once, then halves. About 3 log2(n) evaluations.

Every evaluation is a line of the journal, on the disk before the next one begins; the same search
does not repeat it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import ModelProto

from dccompile import lines
from dccompile.errors import Error, UsageError

_SHOWN = 3  # names in a line of the log
Build = Callable[[frozenset[str]], ModelProto]
Evaluate = Callable[[ModelProto], float]


@dataclass(frozen=True)
class Decision:
    """What leaving these layers in float does. `drop` is relative to the float model's metric."""

    excluded: tuple[str, ...]
    metric: float
    drop: float
    holds: bool


@dataclass(frozen=True)
class Chosen:
    """The layers to leave in float, the worst first, and what is left of the metric then.

    `reached`: the drop is no more than allowed; else this is the best that was found.
    `evaluations` were made, what the journal knew not counted; `decisions` are all, in order.
    """

    excluded: tuple[str, ...]
    metric: float
    drop: float
    evaluations: int
    reached: bool
    decisions: list[Decision]


def search(
    ranked: Sequence[str],
    build: Build,
    evaluate: Evaluate,
    float_metric: float,
    max_drop: float,
    journal: Path | None,
    key: str,
    log: Callable[[str], None],
) -> Chosen:
    """Searches layers to leave in float until (float_metric - metric) / |float_metric| <= max_drop.

    `ranked`: names, the worst first. `build` makes the model with these layers in float,
    `evaluate` its metric, larger is better. `key` stands for the model, data and settings: lines of
    the journal with another are not used. `log` gets a line for every decision.

    Raises UsageError: DC2043 where `evaluate` raises or returns no finite number, DC2047 where the
    float metric is 0 or no finite number, DC2048 where the journal cannot be written.
    """
    if not _is_number(float_metric) or float_metric == 0:
        raise UsageError(
            f"metric: {float_metric} for the float model, a drop relative to that is not defined. "
            "Fix: correct the function or the data, so that it is a finite number other than 0",
            "DC2047",
        )
    known = _Journal(journal, key)
    run = _Search([*dict.fromkeys(ranked)], build, evaluate, float_metric, max_drop, known, log)
    return run.chosen()


@dataclass
class _Search:
    ranked: list[str]
    build: Build
    evaluate: Evaluate
    float_metric: float
    max_drop: float
    journal: _Journal
    log: Callable[[str], None]
    evaluations: int = 0
    decided: dict[frozenset[str], Decision] = field(default_factory=dict)

    def chosen(self) -> Chosen:
        count = self._prefix()
        if count is None:
            best = max(self.decided.values(), key=lambda d: (d.metric, -len(d.excluded)))
        else:
            best = self._put_back(self._try(self.ranked[:count]))
        decisions = [*self.decided.values()]
        return Chosen(
            best.excluded, best.metric, best.drop, self.evaluations, best.holds, decisions
        )

    def _prefix(self) -> int | None:
        """The shortest prefix that holds as far as bisection finds it; None if all are too few."""
        fails, count, most = -1, 0, len(self.ranked)
        while not self._try(self.ranked[:count]).holds:
            if count == most:
                return None
            fails, count = count, min(most, max(1, 2 * count))
        while count - fails > 1:
            middle = (fails + count) // 2
            if self._try(self.ranked[:middle]).holds:
                count = middle
            else:
                fails = middle
        return count

    def _put_back(self, best: Decision) -> Decision:
        """The decision without the layers that integers can compute after all.

        The last of a prefix is needed: the one without it does not hold.
        """
        budget = self.evaluations + len(self.ranked).bit_length() + 2
        groups = [best.excluded[:-1]] if len(best.excluded) > 1 else []
        while groups and self.evaluations < budget:
            group = groups.pop()
            found = self._try([name for name in best.excluded if name not in group])
            if found.holds:
                best = found
            elif len(group) > 1:
                half = len(group) // 2
                groups += [group[:half], group[half:]]  # the later, cheaper half is tried first
        return best

    def _try(self, names: Sequence[str]) -> Decision:
        excluded = frozenset(names)
        if excluded in self.decided:
            return self.decided[excluded]
        metric = self.journal.known.get(excluded)
        noted = "" if metric is None else ", from the journal"
        if metric is None:
            metric = self._measure(excluded)
            self.evaluations += 1
            self.journal.append(names, metric)
        drop = (self.float_metric - metric) / abs(self.float_metric)
        found = Decision(tuple(names), metric, drop, drop <= self.max_drop)
        self.decided[excluded] = found
        shown = ", ".join(names[:_SHOWN]) + (" .." if len(names) > _SHOWN else "")
        what = f"{len(names)} layers{f' ({shown})' if names else ''}"
        says = "holds" if found.holds else "does not hold"
        self.log(f"left in float: {what}: metric {metric:.6g}, drop {drop:.3%}, {says}{noted}")
        return found

    def _measure(self, excluded: frozenset[str]) -> float:
        model = self.build(excluded)
        try:
            metric = self.evaluate(model)
        except Error:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"metric: raised {type(error).__name__}{f': {reason}' if reason else ''}. "
                "Fix: correct the function",
                "DC2043",
            ) from error
        if not _is_number(metric):
            raise UsageError(
                f"metric: returned {metric!r}, a finite number is allowed. "
                "Fix: correct the function",
                "DC2043",
            )
        return float(metric)


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


class _Journal:
    """Metrics by the set of layers left in float, in a file of JSON lines if there is a path.

    A line torn by a crash is ended by the next one, and skipped by readers.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.known: dict[frozenset[str], float] = {}
        if path is None:
            return
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise self._error(error, "read") from error
        for line in lines:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # torn, or nested a thousand times
            return
        if not isinstance(entry, dict) or entry.get("key") != self.key:
            return
        names, metric = entry.get("excluded"), entry.get("metric")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return
        if isinstance(metric, (int, float)) and _is_number(metric):
            self.known[frozenset(names)] = float(metric)

    def append(self, names: Sequence[str], metric: float) -> None:
        """Adds a line; it is on the disk when this returns."""
        if self.path is None:
            return
        entry = {"excluded": [*names], "key": self.key, "metric": metric}
        line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        try:
            number = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(number, fcntl.LOCK_EX)
                lines.append(number, line)
            finally:
                os.close(number)
        except OSError as error:
            raise self._error(error, "written") from error

    def _error(self, error: OSError, what: str) -> UsageError:
        return UsageError(
            f"journal '{self.path}': cannot be {what} ({error.strerror or error}), it keeps what "
            "was evaluated. Fix: name a file that can be written",
            "DC2048",
        )
