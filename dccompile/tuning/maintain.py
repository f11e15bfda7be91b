"""Care of tuning logs: what state every line is in, merging folders, dropping what is of no use.

A line is `ok`, or one of

- stale: its schedule has changed since, so the figures are those of other code
- illegal: its kernel, target, workload or parameters are none that this version has
- broken: not a record at all, e.g. torn by a crash
- duplicate: another line of the file has the same task, CPU and threads, and is the better one
- unsorted: before a line that it should follow, as only a hand-edited or badly merged file has

`compile` passes over all but `ok` and unsorted ones with a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import fingerprint, records, registry
from ..errors import UsageError
from ..machine import GPUS, TARGETS, find
from ..records import Record
from .tasks import Task

STATES = ("ok", "stale", "illegal", "broken", "duplicate", "unsorted")


@dataclass
class Line:
    """A line of a log: its number from 1, its state and, unless that is ok, why."""

    number: int
    text: str
    record: Record | None
    state: str = "ok"
    reason: str = ""


@dataclass
class File:
    """One log: winners of one kernel on one target."""

    path: Path
    target: str
    kernel: str
    lines: list[Line] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def counts(self) -> dict[str, int]:
        """Lines in each state."""
        found = Counter(line.state for line in self.lines)
        return {state: found[state] for state in STATES}

    @property
    def records(self) -> list[Record]:
        """Those that `compile` uses."""
        good = ("ok", "unsorted")
        return [x.record for x in self.lines if x.record is not None and x.state in good]

    @property
    def problems(self) -> list[str]:
        """``path:line: state: reason`` of every line that is not ok."""
        bad = [x for x in self.lines if x.state != "ok"]
        return [f"{self.path}:{x.number}: {x.state}: {x.reason}" for x in bad]


def scan(folder: Path) -> list[File]:
    """Every log of a folder, each line judged. Raises UsageError where there is no such folder."""
    check(folder)
    return [_file(path) for path in sorted(folder.glob("*/*.jsonl"))]


def check(folder: Path) -> None:
    """Raises UsageError where there is no such folder."""
    if not folder.is_dir():
        raise UsageError(
            f"'{folder}': no such folder. Fix: name a folder of tuning logs, TARGET/KERNEL.jsonl",
            "DC2031",
        )


def _file(path: Path) -> File:
    found = File(path, records.target_name(path.parent.name), path.stem)
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UsageError(
            f"'{path}': {error.strerror or error}. Fix: give a folder that can be read", "DC2031"
        ) from None
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            found.lines.append(_line(number, content, found))
    _mark_duplicates(found)
    _mark_unsorted(found)
    return found


def _line(number: int, text: str, file: File) -> Line:
    try:
        record = Record.parse(text, file.kernel, file.target)
    except ValueError as error:
        return Line(number, text, None, "broken", printable(str(error)))
    state, reason = judge(record)
    return Line(number, text, record, state, printable(reason))


def printable(text: str) -> str:
    """Without the halves of characters that damaged text, or JSON, may hold."""
    return text.encode(errors="backslashreplace").decode()


def judge(record: Record) -> tuple[str, str]:
    """The state of a record by itself, and why."""
    try:
        found = task(record)
        now = fingerprint.schedule(found.kernel)
        if record.schedule != now:
            return "stale", f"tuned with schedule {record.schedule}, {record.kernel} now is {now}"
        records.legal(found.kernel, record.params, found.workload, found.target)
    except ValueError as error:
        return "illegal", str(error)
    return "ok", ""


def task(record: Record) -> Task:
    """What a record is of. Raises ValueError, with the reason, where this version has no such."""
    machine = find(record.target)
    if machine is None:
        raise ValueError(f"target '{record.target}' is none of {', '.join([*TARGETS, *GPUS])}")
    kernel = registry.named(record.kernel)
    if kernel is None:
        raise ValueError(f"no kernel is called '{record.kernel}'")
    lacks = [f for f in kernel.features if f not in machine.features]
    if lacks:
        raise ValueError(f"{kernel.name} needs {', '.join(lacks)}, {machine.name} has not")
    workload = record.workload
    if workload.op != kernel.op:
        raise ValueError(f"a workload of {workload.op}, {kernel.name} is for {kernel.op}")
    refusal = kernel.refuses(workload)
    if refusal:
        raise ValueError(f"{kernel.name} does not take {workload.describe()}: {refusal}")
    if records.key(workload) != record.key:
        raise ValueError("not the workload that stands for its like in tuning")
    return Task(kernel, machine, workload)


def identity(record: Record) -> Hashable:
    """What a folder holds one record of."""
    return record.target, record.kernel, *record.identity


def better(one: Record, other: Record, valid: Callable[[Record], bool]) -> bool:
    """Whether the first of two records of one identity is to be kept.

    The valid one, then the newer, then that of the larger gain; of equals the second.
    """

    def rank(record: Record) -> tuple[bool, str, float]:
        return valid(record), record.date, record.gain

    return rank(one) > rank(other)


def _mark_duplicates(file: File) -> None:
    best: dict[Hashable, Line] = {}
    valid = {id(x.record) for x in file.lines if x.state == "ok"}
    for line in file.lines:
        if line.record is None:
            continue
        known = best.get(identity(line.record))
        if known is None or known.record is None:
            best[identity(line.record)] = line
            continue
        wins = better(line.record, known.record, lambda r: id(r) in valid)
        kept, dropped = (line, known) if wins else (known, line)
        best[identity(line.record)] = kept
        if dropped.state == "ok":
            dropped.state, dropped.reason = "duplicate", f"line {kept.number} is of the same task"


def _mark_unsorted(file: File) -> None:
    last = None
    for line in file.lines:
        if line.record is None:
            continue
        place = line.record.order
        if last is not None and place < last:
            if line.state == "ok":
                line.state, line.reason = "unsorted", "its task comes before that of a line above"
        else:
            last = place


# ---- changes ----


@dataclass(frozen=True)
class Merged:
    """What merging did, by number of records."""

    added: int
    replaced: int
    kept: int
    skipped: list[str]  # path:line: reason


def merge(sources: Sequence[Path], folder: Path) -> Merged:
    """Takes the records of other folders into `folder`.

    Of two of the same task, CPU and threads the valid one stays, then the newer, then that of the
    larger gain. Stale records come along, as `replay` can renew them; illegal and broken ones do
    not. Raises TuningError where the folder cannot be written.
    """
    files = [file for source in sources for file in scan(source)]
    ok = {id(r) for file in files for r in file.records}
    here = {}
    for file in scan(folder) if folder.is_dir() else []:
        ok |= {id(r) for r in file.records}
        here.update({identity(x.record): x.record for x in file.lines if x.record is not None})
    before = dict(here)
    skipped = []
    for file in files:
        for line in file.lines:
            if line.record is None or line.state == "illegal":
                skipped.append(f"{file.path}:{line.number}: {line.state}: {line.reason}")
                continue
            name = identity(line.record)
            if name not in here or better(line.record, here[name], lambda r: id(r) in ok):
                here[name] = line.record
    changed = [r for name, r in here.items() if before.get(name) is not r]
    for (target, kernel), found in _by_file(changed).items():
        records.update(folder, target, kernel, found)
    replaced = sum(identity(r) in before for r in changed)
    return Merged(len(changed) - replaced, replaced, len(here) - len(changed), skipped)


def _by_file(found: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    files: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        files.setdefault((record.target, record.kernel), []).append(record)
    return files


def prune(folder: Path, dry_run: bool = False) -> list[File]:
    """Drops stale, illegal, broken and duplicate lines and sorts the rest; a log without any goes.

    Returns the logs as they were. Raises TuningError where the folder cannot be written.
    """
    files = scan(folder)
    for file in files:
        if not dry_run and file.problems:
            # read once more, under the lock: a job may have written meanwhile
            records.rewrite(folder, file.path, lambda log: _file(log.path).records, False)
            with records.locked(folder):
                if not file.path.stat().st_size:
                    file.path.unlink()
    return files
