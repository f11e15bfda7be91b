"""Which tuning record speaks for a workload: the exact one, the nearest, one of another CPU."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import fingerprint
from .errors import UsageError
from .machine import Machine, cpu_type, resolve
from .records import (
    Entry,
    Log,
    Record,
    canonical,
    folder_name,
    key,
    legal,
    packaged,
    split,
    target_name,
)
from .workload import Conv, EmbeddingBag, Gemm, Interaction, Workload, from_json

if TYPE_CHECKING:
    from .kernel import Kernel

_Features = tuple[tuple[Any, ...], tuple[float, ...]]
LIMIT = 1.0  # of the distance of a nearest workload, see `distance`
NO_LOGS = "none"  # as a folder of logs
GAIN = 1.02  # what gains less where it was measured is within the noise elsewhere


@dataclass(frozen=True)
class Found:
    """Parameters, an instance of the kernel's Params, and the record that they come from."""

    params: Any
    source: str  # exact | nearest | family
    why: str
    record: Record

    @property
    def record_id(self) -> str:
        return self.record.id


def logs(tuning: str | os.PathLike[str] | None) -> Path | None:
    """The folder of logs that an option `tuning` means: None are the packaged ones.

    None for 'none'. Raises UsageError where there is no such folder.
    """
    if tuning is None:
        return packaged()
    if tuning == NO_LOGS:
        return None
    folder = Path(tuning).absolute()
    if tuning == "" or not folder.is_dir():
        found = "not a folder" if folder.is_file() else "no such folder"
        raise UsageError(
            f"tuning '{tuning}': {found}. Fix: name a folder of logs, or '{NO_LOGS}' for none",
            "DC2030",
        )
    return folder


def name(tuning: str | os.PathLike[str] | None) -> str:
    """What an artifact says about the option `tuning`: nothing that differs between machines."""
    return "packaged" if tuning is None else Path(tuning).absolute().name


def cpus(targets: Sequence[str]) -> dict[str, str | None]:
    """By target, in order, the kind of CPU whose records come first: this one for ``host``.

    For a target by name it is None: what is compiled then is the same on every machine. Raises
    UsageError for an unknown target.
    """
    found: dict[str, str | None] = {}
    for target in targets:
        name = resolve(target).name
        found[name] = cpu_type() if target == "host" else found.get(name)
    return found


class Tuning:
    """The logs of one target, each read when its kernel is first asked for.

    With `cpu` None the records of all kinds of CPU are as good as another, else those of others
    are the last resort. Without a folder nothing is found. `warnings` collects, as lines for
    people, what was wrong with the logs.
    """

    def __init__(self, folder: Path | None, target: str, cpu: str | None) -> None:
        self.folder, self.target, self.cpu = folder, target, cpu
        self.warnings: list[str] = []
        self._logs: dict[str, _Usable] = {}
        self._known: dict[tuple[str, Workload], Found | None] = {}

    def find(self, kernel: Kernel, workload: Workload, machine: Machine) -> Found | None:
        """The record for a workload: exact or nearest on this CPU, else exact or nearest on others.

        Raises nothing for whatever the logs hold.
        """
        work = workload.representative()
        if (kernel.name, work) not in self._known:
            found = self._find(kernel, work, machine) if self.folder else None
            self._known[kernel.name, work] = found
        return self._known[kernel.name, work]

    def _find(self, kernel: Kernel, work: Workload, machine: Machine) -> Found | None:
        assert self.folder is not None
        if kernel.name not in self._logs:
            path = self.folder / folder_name(self.target) / f"{kernel.name}.jsonl"
            self._logs[kernel.name] = _Usable(path, kernel, self.warnings)
        log = self._logs[kernel.name]
        for near in (log.exact, log.nearest):
            for record in near(work):
                if self._own(record) and (found := _use(log, record, work, machine)):
                    return found
        for record in chain(log.exact(work), log.nearest(work)):
            if not self._own(record) and (found := _use(log, record, work, machine)):
                why = f"of another CPU, {record.cpu}: {found.why}"
                return Found(found.params, "family", why, record)
        return None

    def _own(self, record: Record) -> bool:
        return self.cpu is None or record.cpu == self.cpu


def _use(log: _Usable, record: Record, work: Workload, machine: Machine) -> Found | None:
    """What a record, of this workload or a near one, says about this one."""
    kernel, exact = log.kernel, record.key == key(work)
    try:
        known = work if exact else record.workload
        its_default = kernel.default(known, machine)
        params = legal(kernel, record.params, known, machine)
    except (ValueError, ArithmeticError) as error:  # sizes of 0 divide by 0
        log.warn("illegal", f"illegal record of {_named(record)}: {error}. It is not used")
        return None
    best, won = f"best of {record.tried} tried", params != its_default
    speed = f"{record.gain:.2f}x the default's speed" if won else "the default"
    if exact:
        return Found(params, "exact", f"tuned {record.date}: {best}, {speed}", record)
    near = f"tuned for {known.describe()}, {record.date}: {best}"
    if not won or record.gain < GAIN:
        why = f"{near}, {speed}: so this one has its default"
        return Found(kernel.default(work, machine), "nearest", why, record)
    try:
        params = legal(kernel, record.params, work, machine)
    except ValueError:  # one of the values that only its default has
        return None
    return Found(params, "nearest", f"{near}, {speed}", record)


def _named(record: Record) -> str:
    try:
        return record.workload.describe()
    except ValueError:
        return canonical(record.shape)


class _Usable:
    """The records of one log that are of the present version of the kernel's schedule."""

    def __init__(self, path: Path, kernel: Kernel, warnings: list[str]) -> None:
        self.kernel, self._warnings = kernel, warnings
        self._told: set[str] = set()
        self._name = f"{path.parent.name}/{path.name}"
        self._forms: dict[str, dict[str, list[Entry]]] = {}
        self._near: dict[str, list[tuple[Workload, _Features, list[Entry]]]] = {}
        self._parsed: dict[str, Record | None] = {}
        try:
            self._log = Log.read(path)
        except OSError as error:
            self._log = Log(path, path.stem, target_name(path.parent.name), "")
            fix = "make it a file that can be read"
            self.warn("unreadable", f"{error.strerror or error}. None of its records is used", fix)
        version, stale = fingerprint.schedule(kernel), 0
        for entry in self._log.entries:
            if entry.schedule == version:
                self._forms.setdefault(entry.form, {}).setdefault(entry.shape, []).append(entry)
            else:
                stale += 1
        if stale:
            of = f"{stale} of {len(self._log.entries)} records are of another version of the "
            found = f"{of}schedule, this one is {version}. They are not used"
            self.warn("stale", found, "dccompile records replay --update")
        if unlike := self._log.unlike:
            more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
            self._broken(unlike[0].line, unlike[0].reason, more)

    def warn(self, kind: str, found: str, fix: str = "dccompile records prune") -> None:
        """A warning, the first of its kind: `records verify` lists all."""
        if kind not in self._told:
            self._told.add(kind)
            self._warnings.append(f"tuning log {self._name}: {found}. Fix: {fix}")

    def _broken(self, number: int, reason: str, more: str = "") -> None:
        self.warn("broken", f"line {number} is no record{more}: {reason}. It is not used")

    def exact(self, work: Workload) -> list[Record]:
        """Records of a representative workload, the best first."""
        shape, form = map(canonical, split(work))
        return self._records(self._forms.get(form, {}).get(shape, []))

    def nearest(self, work: Workload) -> Iterator[Record]:
        """Records of workloads that differ in sizes alone and not by much, the nearest first."""
        form = canonical(split(work)[1])
        if form not in self._near:
            self._near[form] = list(self._workloads(work, form))
        own = _features(work)
        others = [(_apart(own, f), entries) for w, f, entries in self._near[form] if w != work]
        for _, entries in sorted((r for r in others if r[0] <= LIMIT), key=lambda r: r[0]):
            yield from self._records(entries)

    def _workloads(
        self, work: Workload, form: str
    ) -> Iterator[tuple[Workload, _Features, list[Entry]]]:
        head = {"op": work.op, **json.loads(form)}
        for shape, entries in self._forms.get(form, {}).items():
            try:
                other = from_json({**head, **json.loads(shape)})
                features = _features(other)
                if min(features[1]) < 1:
                    raise ValueError(f"sizes below 1 in {shape}")
                yield other, features, entries
            except (ValueError, ArithmeticError) as error:  # sizes of 0 divide by 0
                self._broken(self._log.number(entries[0]), str(error))

    def _records(self, entries: Iterable[Entry]) -> list[Record]:
        """Those of few threads first, then by CPU, the latest of each."""
        found = [r for e in entries if (r := self._parse(e))]
        found.sort(key=lambda r: (r.date, r.gain), reverse=True)
        return sorted(found, key=lambda r: (r.threads, r.cpu))

    def _parse(self, entry: Entry) -> Record | None:
        if entry.line not in self._parsed:
            self._parsed[entry.line] = None
            try:
                self._parsed[entry.line] = self._log.parse(entry.line)
            except ValueError as error:
                self._broken(self._log.number(entry), str(error))
        return self._parsed[entry.line]


# ---- how near two workloads are ----


def _apart(a: _Features, b: _Features) -> float:
    """The sum of |log2| of the ratios of the sizes; infinite where more than sizes differs.

    Both are of workloads of the same operator and form.
    """
    if a[0] != b[0]:
        return float("inf")
    return sum(abs(log2(x / y)) for x, y in zip(a[1], b[1], strict=True))


def _features(work: Workload) -> _Features:
    """What must be equal, and the sizes, which need not. Dims that are open must be in both."""
    alike: tuple[Any, ...]
    if isinstance(work, Gemm):
        return (work.m is None,), _sizes(work.m, work.n, work.k)
    if isinstance(work, Conv):
        pattern = "depthwise" if work.depthwise else "grouped" if work.groups > 1 else "dense"
        alike = (work.batch is None, work.kernel, work.strides, work.dilations, pattern)
        if work.depthwise:
            return alike, _sizes(work.batch, *work.outputs, work.channels)
        inner = (work.group_channels, work.filters // work.groups, work.groups)
        return alike, _sizes(work.batch, *work.outputs, *inner)
    if isinstance(work, EmbeddingBag):
        alike = (work.bags is None, work.pooling is None, work.tables > 1)
        return alike, _sizes(work.bags, work.pooling, work.tables, max(work.rows), work.dim)
    assert isinstance(work, Interaction)
    return (work.bags is None,), _sizes(work.bags, work.vectors, work.dim)


def _sizes(*dims: int | None) -> tuple[float, ...]:
    return tuple(float(dim or 1) for dim in dims)
