"""Replay: do the winners of a log still beat the defaults, here and with the schedules of now?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .. import fingerprint, records
from ..machine import Gpu, missing_features
from ..records import Record
from . import maintain
from .job import Engine
from .maintain import printable, scan
from .server import request, versions
from .tasks import Task

STATES = ("holds", "level", "lost", "failed", "skipped")
_LIMIT_S = 120.0  # for a measurement altogether


@dataclass(frozen=True)
class Verdict:
    """What became of a record: `ratio` is the default's time by the winner's of now, with bounds.

    `state` is one of

    - holds: at least as fast as the default; a default that won is measured alone
    - level: no faster than the default, but the difference is within the noise
    - lost: slower than the default beyond the noise, twice
    - failed: wrong, crashed, hung, or its parameters are illegal
    - skipped: not measured

    `renewed` is the record to have instead, with the figures and the schedule of now: of the winner
    where it holds, else of the default. None where there are no figures.
    """

    record: Record
    label: str
    state: str
    reason: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    renewed: Record | None = None


@dataclass
class _Subject:
    """A record under way; `params` None: none that the kernel has."""

    record: Record
    task: Task
    params: Any
    reason: str = ""
    slower: bool = False  # as a first measurement said
    verdict: Verdict | None = None  # all but the figures of the default are known


def replay(
    folder: Path,
    engine: Engine,
    *,
    targets: Sequence[str] = (),
    pattern: str = "*",
    seconds: float = 0.3,
    seed: int = 0,
    update: bool = False,
    done: Callable[[Verdict, int, int], None] = lambda verdict, number, total: None,
) -> list[Verdict]:
    """Measures records anew, in turns with the default, on machines of the type they are for.

    `targets` and `pattern`, a glob of kernels or of labels of tasks, select records; `seconds` are
    those of one measurement. With `update` the log is renewed as soon as a verdict falls. `done` is
    told each verdict, its number and of how many. Raises TuningError where the folder cannot be
    written, UsageError where there is none.
    """
    verdicts: list[Verdict] = []
    subjects: list[_Subject] = []
    for file in scan(folder):
        for line in file.lines:
            if line.record is None or line.state == "duplicate":
                continue
            if targets and file.target not in targets:
                continue
            found = _subject(line.record, engine)
            label = found.label if isinstance(found, Verdict) else found.task.label
            if not any(fnmatchcase(text, pattern) for text in (file.kernel, label)):
                continue
            if isinstance(found, Verdict):
                verdicts.append(found)
            else:
                subjects.append(found)
    total = len(verdicts) + len(subjects)
    for number, verdict in enumerate(verdicts, 1):
        done(verdict, number, total)
    for verdict in _measured(subjects, engine, seconds, seed):
        verdicts.append(verdict)
        if update and verdict.renewed is not None:
            record = verdict.renewed
            records.update(folder, record.target, record.kernel, [record])
        done(verdict, len(verdicts), total)
    return sorted(verdicts, key=lambda v: (v.record.target, v.record.kernel, v.record.order))


def _subject(record: Record, engine: Engine) -> _Subject | Verdict:
    """What to measure, or why not."""
    try:
        task = maintain.task(record)
    except ValueError as error:
        label = f"{record.kernel} {records.canonical(record.shape)}"
        return Verdict(record, label, "skipped", printable(str(error)))
    if elsewhere := _elsewhere(record, task, engine):
        return Verdict(record, task.label, "skipped", elsewhere)
    try:
        params = records.legal(task.kernel, record.params, task.workload, task.target)
    except ValueError as error:
        return _Subject(record, task, None, printable(f"illegal: {error}"))
    return _Subject(record, task, params)


def _elsewhere(record: Record, task: Task, engine: Engine) -> str | None:
    """Why the machines at hand cannot measure a record."""
    types, gpu = engine.machines(), isinstance(task.target, Gpu)
    if record.cpu not in types:
        found = f"of {'GPU' if gpu else 'CPU'} {record.cpu}, measured on {', '.join(types)}"
        return f"{found}; name the GPU's target with --target" if gpu else found
    if record.threads != 1:
        return f"with {record.threads} threads, measured with 1"
    lacks = [] if gpu else missing_features(task.target.features)
    return f"this host lacks {', '.join(lacks)}" if lacks else None


# ---- measuring ----


def _measured(
    subjects: Sequence[_Subject], engine: Engine, seconds: float, seed: int
) -> Iterator[Verdict]:
    waiting = list(reversed(subjects))
    flying: dict[Future[dict[str, Any]], _Subject] = {}
    while waiting or flying:
        while waiting and len(flying) < sum(engine.slots(cpu) for cpu in engine.machines()):
            subject = waiting.pop()
            asked = _request(subject, seconds * (2 if subject.slower else 1), seed)
            flying[engine.submit(asked, subject.record.cpu)] = subject
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            subject = flying.pop(future)
            verdict = _judge(subject, future.result())
            if verdict is None:
                waiting.append(subject)
            else:
                yield verdict


def _request(subject: _Subject, seconds: float, seed: int) -> dict[str, Any]:
    """The next measurement: of the winner, or of the default where the winner is out."""
    task, default = subject.task, subject.task.default()
    out = subject.params is None or subject.verdict is not None
    return request(
        task.kernel,
        task.target.name,
        task.workload,
        default if out else subject.params,
        default,
        seconds=seconds,
        limit=_LIMIT_S,
        weights=subject.record.weights_mib << 20,
        seed=seed,
    )


def _judge(subject: _Subject, result: dict[str, Any]) -> Verdict | None:
    """None: measure once more."""
    record, label, default = subject.record, subject.task.label, subject.task.default()
    ok = result["status"] == "ok"
    failure = f"{result['status']}: {result.get('reason')}"
    if result["status"] == "refused":
        return Verdict(record, label, "skipped", failure)
    if subject.params is None and subject.verdict is None:
        subject.verdict = Verdict(record, label, "failed", subject.reason)
    if subject.verdict is not None:  # that was the default, whose figures were wanted
        if ok:
            return replace(subject.verdict, renewed=_renewed(subject, default, result))
        reason = f"{subject.verdict.reason}; the default: {failure}"
        return replace(subject.verdict, reason=reason)
    if not ok:
        subject.verdict = Verdict(record, label, "failed", failure)
        return None
    if subject.params == default:
        renewed = _renewed(subject, default, result)
        return Verdict(record, label, "holds", "the default won", renewed=renewed)
    ratio, low, high = (float(result[name]) for name in ("ratio", "low", "high"))
    if high < 1 and not subject.slower:
        subject.slower = True
        return None
    state = "holds" if ratio >= 1 else "level" if high >= 1 else "lost"
    if state == "holds":
        renewed = _renewed(subject, subject.params, result, ratio)
    else:
        times = dict.fromkeys(("us", "p20", "p80"), result["against_us"])
        renewed = _renewed(subject, default, {**result, **times})
    return Verdict(record, label, state, "", ratio, low, high, renewed)


def _renewed(
    subject: _Subject, params: Any, result: dict[str, Any], gain: float | None = None
) -> Record:
    """The record with figures of now; without a `gain` those of the default."""
    us, p20, p80 = (round(result[name], 3) for name in ("us", "p20", "p80"))
    return replace(
        subject.record,
        params=asdict(params),
        us=us,
        p20=p20,
        p80=p80,
        default_us=us if gain is None else round(result["against_us"], 3),
        gain=1.0 if gain is None else round(gain, 4),
        tvm=versions()["tvm"],
        schedule=fingerprint.schedule(subject.task.kernel),
        date=records.today(),
    )
