"""Tuning records: which parameters were the fastest for a workload on a machine.

A folder of logs holds ``<target>/<kernel>.jsonl`` (of a GPU ``cuda_sm_90/``), one winner a line,
sorted, so that git shows what changed. `Log` reads one file, `update` rewrites one; `lookup.Tuning`
chooses for the compiler. Lines that cannot be read are warnings there, and are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import TuningError
from .workload import Conv, EmbeddingBag, Gemm, Interaction, Workload, from_json, tuples

if TYPE_CHECKING:
    from .kernel import Kernel
    from .machine import Machine

LOSERS = "losers"  # below a folder of logs: every trial, and the lock; git ignores it

# ---- one record ----

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("shape", "form", "params"), (dict,)),
    **dict.fromkeys(("us", "p20", "p80", "default_us", "gain"), (int, float)),
    **dict.fromkeys(("threads", "tried"), (int,)),
    **dict.fromkeys(("cpu", "tvm", "schedule", "date"), (str,)),
}
_SHAPES = {
    frozenset("m n k".split()): Gemm.op,
    frozenset("batch size channels filters kernel strides dilations pads groups".split()): Conv.op,
    frozenset("rows dim bags pooling".split()): EmbeddingBag.op,
    frozenset("bags vectors dim".split()): Interaction.op,
}


def folder_name(target: str) -> str:
    """What the folder of a target's logs is called: ``cuda_sm_90`` for ``cuda:sm_90``."""
    return target.replace(":", "_")


def target_name(folder: str) -> str:
    """The inverse of `folder_name`."""
    return folder.replace("_", ":", 1) if folder.startswith("cuda_") else folder


def canonical(value: Any) -> str:
    """JSON with sorted keys and without blanks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def split(workload: Workload) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shape and form, as JSON: the form is what is neither shape nor default."""
    shape, form = workload.shape, {}
    for known in fields(workload):
        value = getattr(workload, known.name)
        if known.name not in shape and (known.default is MISSING or value != known.default):
            form[known.name] = value
    found: tuple[dict[str, Any], dict[str, Any]] = tuple(
        json.loads(json.dumps([shape, form], default=asdict))
    )
    return found


def key(workload: Workload) -> str:
    """What all workloads that share records have in common: op, shape and form as JSON."""
    work = workload.representative()
    shape, form = split(work)
    return canonical({"op": work.op, "shape": shape, "form": form})


@dataclass(frozen=True)
class Record:
    """The fastest parameters found for a workload, and how that is known.

    Times are microseconds a call: median, 20th and 80th percentile of the winner, and the median
    of the default; `gain` is the median ratio of the default's time to the winner's, measured in
    turns; `weights_mib` of weights in copies passed through the caches meanwhile. `tried` counts
    configurations, `schedule` is `fingerprint.schedule`, `date` is ISO 8601, `cpu` the type of
    CPU or GPU that measured, `extra` keeps the fields that this version does not know.
    """

    kernel: str
    target: str
    shape: dict[str, Any]
    form: dict[str, Any]
    params: dict[str, Any]
    us: float
    p20: float
    p80: float
    default_us: float
    gain: float
    threads: int
    tried: int
    cpu: str
    tvm: str
    schedule: str
    date: str
    weights_mib: int = 8
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        """The operator that has such a shape, "" if none has."""
        return _SHAPES.get(frozenset(self.shape), "")

    @property
    def key(self) -> str:
        """As `records.key` of the workload."""
        return canonical({"op": self.op, "shape": self.shape, "form": self.form})

    @property
    def identity(self) -> tuple[str, str, int]:
        """What one file has one record for: key, cpu, threads."""
        return self.key, self.cpu, self.threads

    @property
    def workload(self) -> Workload:
        """Raises ValueError, with the reason, where shape and form are not those of a workload."""
        if not self.op:
            raise ValueError(f"no operator has the shape {', '.join(self.shape)}")
        return from_json({"op": self.op, **self.form, **self.shape})

    @property
    def id(self) -> str:
        """Eight hex digits of the SHA-256 of the line."""
        return hashlib.sha256(self.to_line().encode()).hexdigest()[:8]

    @property
    def order(self) -> tuple[Any, ...]:
        """Records of a file are sorted by this: cpu, shape by numbers, form, threads."""
        return self.cpu, _ordered(self.shape), _ordered(self.form), self.threads

    def to_line(self) -> str:
        """The line in the log, without its end."""
        names = (*_KINDS, "weights_mib")
        return canonical({**self.extra, **{name: getattr(self, name) for name in names}})

    @classmethod
    def parse(cls, line: str | Mapping[str, Any], kernel: str, target: str) -> Record:
        """Raises ValueError, with the reason, for what is not a record."""
        if isinstance(line, str):
            try:
                line = json.loads(line)
            except ValueError as error:
                raise ValueError(f"not JSON ({error})") from None
            except RecursionError:
                raise ValueError("not JSON (nested too deeply)") from None
        if not isinstance(line, Mapping):
            raise ValueError(f"a JSON {type(line).__name__}, not an object")
        values = {"weights_mib": cls.weights_mib, **line}
        missing = [name for name in _KINDS if name not in values]
        if missing:
            raise ValueError(f"without the fields {', '.join(missing)}")
        for name, kinds in {**_KINDS, "weights_mib": (int,)}.items():
            value = values[name]
            if type(value) not in kinds:
                raise ValueError(f"field {name} is {value!r}, not {kinds[-1].__name__}")
            if float in kinds and not (math.isfinite(value) and value > 0):
                raise ValueError(f"field {name} is {value!r}, not a positive number")
        known = {name: values.pop(name) for name in (*_KINDS, "weights_mib")}
        values.pop("kernel", None)
        values.pop("target", None)
        return cls(kernel, target, **known, extra=values)


def legal(kernel: Kernel, params: Mapping[str, Any], workload: Workload, machine: Machine) -> Any:
    """The kernel's Params of these values. Raises ValueError, with the reason, for illegal ones.

    Legal are the values of the kernel's SPACE and those of its default for the workload.
    """
    names = [f.name for f in fields(kernel.Params)]
    if sorted(names) != sorted(params):
        raise ValueError(f"params {', '.join(params)}, {kernel.name} has {', '.join(names)}")
    default = kernel.default(workload, machine)
    values = {}
    for name in names:
        allowed = (*kernel.SPACE.get(name, ()), getattr(default, name))
        value = tuples(params[name])
        same = [v for v in allowed if v == value and type(v) is type(value)]
        if not same:
            listed = ", ".join(map(str, dict.fromkeys(allowed)))
            raise ValueError(f"{name}={value!r}, allowed are {listed}")
        values[name] = value
    made = kernel.Params(**values)
    if (needed := kernel.registers(made)) > machine.registers:
        raise ValueError(f"params need {needed} registers, {machine.name} has {machine.registers}")
    return made


def _ordered(value: Any) -> tuple[Any, ...]:
    """Any JSON as something that sorts among all others, numbers by value."""
    if isinstance(value, Mapping):
        return 4, tuple((name, _ordered(value[name])) for name in sorted(value))
    if isinstance(value, (list, tuple)):
        return 3, tuple(map(_ordered, value))
    if isinstance(value, str):
        return 2, value
    return (0,) if value is None else (1, value)


# ---- one file ----


@dataclass(frozen=True)
class Broken:
    """A line that is not a record; `line` counts from 1."""

    path: Path
    line: int
    text: str
    reason: str


class Entry(NamedTuple):
    """A line and what is looked up by: form and shape as canonical JSON."""

    line: str
    cpu: str
    form: str
    schedule: str
    shape: str


# What `update` writes is indexed without being parsed, which is 3 times as fast: of a log of 10,000
# records one compilation needs a few dozen. Anything else is parsed.
_FLAT = r"\{[^{}\n]*\}"
_LINE = re.compile(
    rf'^(\{{"cpu":"([^"\\\n]*)",[^{{\n]*"form":(\{{[^{{}}\n]*(?:{_FLAT}[^{{}}\n]*)?\}}),"gain":[^{{\n]*'
    rf'"params":{_FLAT}[^{{\n]*"schedule":"([^"\\\n]*)","shape":({_FLAT}),"threads":.*\}})$',
    re.MULTILINE,
)


class Log:
    """One file of records.

    `entries` are the lines that look like records, `records` those that are, in the order of the
    file; `broken` are all others but empty ones.
    """

    def __init__(self, path: Path, kernel: str, target: str, text: str) -> None:
        self.path, self.kernel, self.target = path, kernel, target
        self._text = text
        self.unlike: list[Broken] = []  # those of `broken` that do not look like records
        found = _LINE.findall(text)
        lines = text.count("\n") + (not text.endswith("\n")) if text else 0
        if len(found) == lines:
            self.entries = list(map(Entry._make, found))
        else:
            self.entries = list(self._each(text))

    @classmethod
    def read(cls, path: Path, kernel: str = "", target: str = "") -> Log:
        """Reads a file; one that is absent has no records. Names come from the path if not given.

        Raises OSError where there is a file that cannot be read.
        """
        try:
            text = path.read_bytes().decode(errors="surrogateescape")
        except FileNotFoundError:
            text = ""
        return cls(path, kernel or path.stem, target or target_name(path.parent.name), text)

    def _each(self, text: str) -> Iterator[Entry]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            if found := _LINE.fullmatch(line):
                yield Entry(*found.groups())
                continue
            try:
                record = self.parse(line)
            except ValueError as error:
                self.unlike.append(Broken(self.path, number, line, str(error)))
            else:
                form, shape = canonical(record.form), canonical(record.shape)
                yield Entry(line, record.cpu, form, record.schedule, shape)

    def parse(self, line: str) -> Record:
        """The record of a line of this file. Raises ValueError, with the reason."""
        return Record.parse(line, self.kernel, self.target)

    def number(self, entry: Entry) -> int:
        """The number of an entry's line in the file."""
        return self._text.split("\n").index(entry.line) + 1

    @cached_property
    def _parsed(self) -> tuple[list[Record], list[Broken]]:
        records, broken = [], list(self.unlike)
        for entry in self.entries:
            try:
                records.append(self.parse(entry.line))
            except ValueError as error:
                broken.append(Broken(self.path, self.number(entry), entry.line, str(error)))
        return records, broken

    @property
    def records(self) -> list[Record]:
        return self._parsed[0]

    @property
    def broken(self) -> list[Broken]:
        return self._parsed[1]


# ---- a folder ----


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else changes the logs of this folder meanwhile. Raises OSError."""
    root = folder / LOSERS
    root.mkdir(parents=True, exist_ok=True)
    ignore = root / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    with (root / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def update(folder: Path, target: str, kernel: str, records: Iterable[Record]) -> None:
    """Puts records into a log, in the place of those with their identity.

    The others stay, with fields and lines that this version does not know. The file appears whole
    or not at all. Raises TuningError where that cannot be done.
    """
    path = folder / folder_name(target) / f"{kernel}.jsonl"
    new = {r.identity: r for r in records}

    def changed(log: Log) -> list[Record]:
        return [*(r for r in log.records if r.identity not in new), *new.values()]

    rewrite(folder, path, changed)


def rewrite(
    folder: Path, path: Path, change: Callable[[Log], list[Record]], keep_broken: bool = True
) -> None:
    """Replaces the records of a log by what `change` makes of it, as `update` does."""
    try:
        with locked(folder):
            log = Log.read(path)
            lines = [r.to_line() for r in sorted(change(log), key=lambda r: r.order)]
            if keep_broken:
                lines += [b.text for b in log.broken]
            _write(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise _unwritable(path, folder, error) from None


def check_writable(folder: Path) -> None:
    """Raises TuningError where logs cannot be written in a folder; makes the folder."""
    try:
        with locked(folder):
            pass
    except OSError as error:
        raise _unwritable(folder, folder, error) from None


def _unwritable(path: Path, folder: Path, error: OSError) -> TuningError:
    return TuningError(
        f"tuning log '{path}': {error.strerror or error}. "
        f"Fix: name a folder that can be written with --log, '{folder}' is not one",
        "DC7010",
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")  # one name: the lock is held
    with partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Puts the names of a folder's files on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def today() -> str:
    """The date of a trial or record, UTC."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def packaged() -> Path:
    """The folder of the logs that come with this package."""
    from . import tuning_logs

    return Path(tuning_logs.__path__[0])
