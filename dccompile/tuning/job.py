"""A tuning job: trials of many tasks on many workers, until nothing is left or time is over.

Every task begins with its default configuration, the first incumbent. A candidate that is faster
beyond the noise becomes the incumbent. When a task's search is over, its best few are compared
with the default once more, longer; the winner is what is recorded. All trials go to the journal
the moment they end, so a job that was killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from .. import fingerprint, records
from ..console import Progress
from ..errors import TuningError
from . import search
from .journal import Journal
from .server import request, versions
from .tasks import Peaks, Task

TRIAL_S, FINAL_S = 0.15, 0.6  # of measuring
FINALISTS = 3
GAIN = 1.01  # the least that counts as faster
_OVERHEAD_S = 0.35  # of a trial: generating code, checking
_TURN = 16  # trials of a task in a row: a worker makes its data once
_BEAT_S = 10.0  # between signs of life where progress is plain lines


# What the journal keeps of a trial's result.
_KEPT = (
    "status", "reason", "us", "p20", "p80", "against_us", "ratio", "low", "high", "cpu", "worker",
    "seconds",
)  # fmt: skip


class Engine(Protocol):
    """Where trials run: processes of this machine, or a cluster."""

    def machines(self) -> dict[str, list[str]]: ...
    def slots(self, cpu: str) -> int: ...
    def submit(self, request: dict[str, Any], cpu: str) -> Future[dict[str, Any]]: ...


@dataclass(frozen=True)
class Decision:
    """What a task's search came to: `gain` is the default's time by that of `params`."""

    task: Task
    cpu: str
    params: Any
    gain: float
    us: float
    p20: float
    p80: float
    default_us: float
    tried: int

    @property
    def changed(self) -> bool:
        """Whether something else than the default won."""
        return bool(self.params != self.task.default())


@dataclass(eq=False)
class Subject:
    """A task on one type of machine."""

    task: Task
    cpu: str
    search: search.Search
    gains: dict[Any, float] = field(default_factory=dict)  # over the default, by params
    tried: set[Any] = field(default_factory=set)
    best: Any = None  # the incumbent
    default: dict[str, Any] | None = None  # result of the default configuration
    flying: int = 0
    finalists: list[Any] | None = None  # None: the search is not over
    finals: dict[Any, dict[str, Any]] = field(default_factory=dict)
    failed: str | None = None
    skipped: bool = False  # the budget was spent before anything but the default was tried
    decision: Decision | None = None

    @property
    def over(self) -> bool:
        return self.skipped or self.decision is not None or self.failed is not None


class Job:
    """Runs the searches of tasks.

    `seconds` and `trials` bound the search, None for no bound: tasks not begun by then are left
    out, those begun are decided by what is known. `peaks` are those of every target by name.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        engine: Engine,
        journal: Journal,
        peaks: Mapping[str, Peaks] | None,
        *,
        seconds: float | None,
        trials: int | None,
        seed: int,
        hints: Callable[[Task], list[Any]],
        progress: Progress,
    ) -> None:
        self.engine, self.journal, self.peaks = engine, journal, peaks
        self.seconds, self.limit, self.seed = seconds, trials, seed
        self.hints, self.progress = hints, progress
        self.versions = versions()
        self.stopped = False
        self.trials = 0
        self.failures: dict[str, int] = {}
        self.flying: dict[Future[dict[str, Any]], tuple[Subject, dict[str, Any], Any]] = {}
        self.turns: dict[str, tuple[Subject, int]] = {}  # whose turn it is, and its trials left
        self.subjects = [self._subject(t, cpu) for cpu in engine.machines() for t in tasks]
        self.start = time.monotonic()
        self._beat = self.start

    def stop(self) -> None:
        """Begins no more trials; `run` returns when those under way have ended."""
        self.stopped = True

    def run(self) -> list[Decision]:
        """All decisions, of tasks that were begun; fewer where the job was stopped."""
        self.start = time.monotonic()
        while True:
            self._fill()
            if not self.flying:
                break
            ended, _ = wait(self.flying, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                self._take(future)
        return [s.decision for s in self.subjects if s.decision is not None]

    # ---- asking ----

    def _subject(self, task: Task, cpu: str) -> Subject:
        default, space = task.default(), task.space()
        found = search.make(space, default, self.hints(task), seed=self.seed)
        subject = Subject(task, cpu, found, {default: 1.0}, best=default)
        schedule, tvm = fingerprint.schedule(task.kernel), self.versions["tvm"]
        done = self.journal.done(task, cpu, schedule, tvm)
        for params, trial in done.items():
            gain = trial.get("gain") if trial["status"] == "ok" else None
            subject.tried.add(params)
            if params == default:
                subject.default = trial if trial["status"] == "ok" else None
                continue
            found.tell(params, gain)
            self._learn(subject, params, gain, faster=gain is not None and gain > GAIN)
        return subject

    def _fill(self) -> None:
        if self.stopped:
            return
        for cpu in self.engine.machines():
            free = self.engine.slots(cpu) - sum(s.cpu == cpu for s, *_ in self.flying.values())
            while free > 0 and (found := self._next(cpu)) is not None:
                found[0].flying += 1
                self.flying[self.engine.submit(found[1], cpu)] = found
                free -= 1

    def _next(self, cpu: str) -> tuple[Subject, dict[str, Any], Any] | None:
        """The next trial for a machine of this type, where most is to be gained."""
        mine = [s for s in self.subjects if s.cpu == cpu and not s.over]
        mine.sort(key=self._priority, reverse=True)
        subject, left = self.turns.get(cpu, (None, 0))
        if subject is not None and left and not subject.over:
            mine.remove(subject)
            mine.insert(0, subject)
        spent = self._spent()
        for candidate in mine:
            found = self._ask(candidate, spent)
            if found is not None:
                left = left if candidate is subject and left else _TURN
                self.turns[cpu] = candidate, left - 1
                return found
        return None

    def _ask(self, subject: Subject, spent: bool) -> tuple[Subject, dict[str, Any], Any] | None:
        """The next trial of a task; None where it has none, or waits for others to end."""
        default = subject.task.default()
        if subject.default is None:
            subject.skipped = spent and not subject.flying
            if subject.flying or spent:
                return None
            return self._request(subject, default, default, TRIAL_S)
        if subject.finalists is None and not spent:
            params = subject.search.ask()
            if params is not None:
                return self._request(subject, params, subject.best, TRIAL_S)
        if subject.flying:
            return None
        if subject.finalists is None:
            subject.finalists = self._finalists(subject)
        if subject.finalists:
            return self._request(subject, subject.finalists.pop(0), default, FINAL_S)
        self._decide(subject)
        return None

    def _priority(self, subject: Subject) -> float:
        us = subject.default["us"] if subject.default else None
        peaks = self.peaks[subject.task.target.name] if self.peaks else None
        return subject.task.priority(us, peaks, len(subject.tried))

    def _spent(self) -> bool:
        """Whether the budget is used up, but for the finals of what was begun."""
        if self.limit is not None and self.trials + len(self.flying) >= self.limit:
            return True
        if self.seconds is None:
            return False
        left = sum(len(self._finalists(s)) for s in self.subjects if not s.over)
        workers = sum(self.engine.slots(cpu) for cpu in self.engine.machines())
        reserve = left * (FINAL_S + _OVERHEAD_S) / max(1, workers)
        return time.monotonic() - self.start + min(reserve, self.seconds / 4) >= self.seconds

    def _request(
        self, subject: Subject, params: Any, against: Any, seconds: float
    ) -> tuple[Subject, dict[str, Any], Any]:
        task = subject.task
        asked = request(
            task.kernel,
            task.target.name,
            task.workload,
            params,
            against,
            seconds=seconds,
            weights=task.weights,
            seed=self.seed,
        )
        return subject, asked, (params, against, seconds == FINAL_S)

    @staticmethod
    def _finalists(subject: Subject) -> list[Any]:
        default = subject.task.default()
        known = [(g, p) for p, g in subject.gains.items() if p != default and g > GAIN]
        known.sort(key=lambda row: row[0], reverse=True)
        return [p for _, p in known[:FINALISTS]]

    # ---- taking ----

    def _take(self, future: Future[dict[str, Any]]) -> None:
        subject, asked, (params, against, final) = self.flying.pop(future)
        subject.flying -= 1
        result = future.result()
        task = subject.task
        status = result["status"]
        if status == "refused":
            raise TuningError(
                f"worker {result.get('worker', '?')}: {result['reason']}. "
                "Fix: give all workers the software of this job",
                "DC7032",
            )
        ok = status == "ok"
        gain = result["ratio"] * subject.gains[against] if ok else None
        entry = {
            **{name: result.get(name) for name in _KEPT},
            **{name: asked[name] for name in ("params", "against", "schedule", "seed")},
            "key": task.key,
            "gain": None if gain is None else round(gain, 5),
            "final": final,
            "tvm": self.versions["tvm"],
            "date": records.today(),
        }
        self.journal.append(task.target.name, task.kernel.name, entry)
        self.trials += 1
        subject.tried.add(params)
        if not ok:
            self.failures[status] = self.failures.get(status, 0) + 1
            note = f"{task.label} {_text(params)}: {status}, {result['reason']}"
            self.progress.note(note)
        if final:
            subject.finals[params] = result
        elif params == task.default():
            subject.default = result if ok else None
            if not ok:
                subject.failed = f"{status}, {result['reason']}"
        else:
            subject.search.tell(params, gain)
            self._learn(subject, params, gain, ok and result["low"] > 1 and result["ratio"] > GAIN)
        self._say(subject, f"{_text(params)} {f'{gain:.3f}x' if gain else status}")

    @staticmethod
    def _learn(subject: Subject, params: Any, gain: float | None, faster: bool) -> None:
        if gain is None:
            return
        subject.gains[params] = gain
        if faster and gain > subject.gains[subject.best]:
            subject.best = params

    def _decide(self, subject: Subject) -> None:
        assert subject.default is not None
        task, default = subject.task, subject.default
        if len(subject.tried) == 1 < len(task.space()):
            subject.skipped = True
            return
        chosen, gain, figures = task.default(), 1.0, default
        default_us = default["us"]
        for params, result in subject.finals.items():
            if result["status"] != "ok" or result["low"] <= 1 or result["ratio"] < GAIN:
                continue
            if result["ratio"] > gain:
                chosen, gain, figures = params, result["ratio"], result
                default_us = result["against_us"]
        us, p20, p80 = (round(figures[k], 3) for k in ("us", "p20", "p80"))
        subject.decision = Decision(
            task,
            subject.cpu,
            chosen,
            round(gain, 4),
            us,
            p20,
            p80,
            round(default_us, 3),
            len(subject.tried),
        )
        self._say(subject, f"{_text(chosen)} {gain:.3f}x of {len(subject.tried)} tried", True)

    def _say(self, subject: Subject, text: str, always: bool = False) -> None:
        now = time.monotonic()
        if not (always or self.progress.live or now - self._beat > _BEAT_S):
            return
        self._beat = now
        over = sum(s.over for s in self.subjects)
        spent = f"{now - self.start:.0f} s, {self.trials} trials"
        self.progress.step(f"{spent}: {subject.task.label}: {text}", over, len(self.subjects))


def estimate(tasks: Iterable[tuple[Task, int]], slots: int) -> float:
    """About how many seconds the trials of tasks take; with each how many it has left."""
    trials = sum(left for _, left in tasks)
    return trials * (TRIAL_S + _OVERHEAD_S) / max(1, slots)


def _text(params: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in asdict(params).items())
