"""Every trial of a tuning job, losers with their reasons: one JSON line each, never rewritten.

``<logs>/losers/<target>/<kernel>.jsonl``, in a folder that git ignores. A line is one write to a
file opened for appending, under a lock, and is on the disk before the next trial begins: whoever
is killed loses the trial under way, and jobs that share a log don't mix their lines. A line that
was torn all the same is ended by the next writer, and skipped by readers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import lines, records
from ..errors import TuningError
from ..kernel import Kernel
from .tasks import Task

# What a trial of this machine and this software says of its parameters. A refusal says nothing.
_FINAL = ("ok", "wrong", "crash", "timeout", "error")


class Journal:
    """The trials below one folder of logs.

    `broken` counts the lines that the last `read` of each (target, kernel) had to skip.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broken: dict[tuple[str, str], int] = {}

    def path(self, target: str, kernel: str) -> Path:
        return self.folder / records.LOSERS / records.folder_name(target) / f"{kernel}.jsonl"

    def append(self, target: str, kernel: str, entry: Mapping[str, Any]) -> None:
        """Adds a line; it is on the disk when this returns.

        Raises TuningError, DC7011, where the folder cannot be written.
        """
        line = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        path = self.path(target, kernel)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with records.locked(self.folder):
                new = not path.exists()
                number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    lines.append(number, line)
                finally:
                    os.close(number)
                if new:
                    records.sync(path.parent)
        except OSError as error:
            raise TuningError(
                f"tuning log '{self.folder}': {path.name} cannot be written "
                f"({error.strerror or error}), a job keeps every trial there. "
                "Fix: name a folder that can be written with --log",
                "DC7011",
            ) from error

    def read(self, target: str, kernel: str) -> list[dict[str, Any]]:
        """The trials of a kernel, oldest first; lines that are none are counted in `broken`."""
        path = self.path(target, kernel)
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise TuningError(
                f"tuning log '{self.folder}': {path.name} cannot be read "
                f"({error.strerror or error}). Fix: name a folder that can be read with --log",
                "DC7011",
            ) from error
        found = [e for e in map(_parse, filter(None, lines)) if e is not None]
        self.broken[target, kernel] = sum(map(bool, lines)) - len(found)
        return found

    def done(self, task: Task, cpu: str, schedule: str, tvm: str) -> dict[Any, dict[str, Any]]:
        """The last trial of each Params of a task, oldest first, that need not be run again.

        Those of this type of machine, this version of the schedule and of TVM.
        """
        found: dict[Any, dict[str, Any]] = {}
        for trial in self.read(task.target.name, task.kernel.name):
            same = (trial["key"], trial.get("cpu"), trial.get("schedule"), trial.get("tvm"))
            if same != (task.key, cpu, schedule, tvm) or trial["status"] not in _FINAL:
                continue
            params = _restore(task.kernel, trial["params"])
            if params is not None:
                found.pop(params, None)  # the later of two keeps its place in time
                found[params] = trial
        return found


def _restore(kernel: Kernel, data: Mapping[str, Any]) -> Any | None:
    """The kernel's Params of this JSON, or None where its fields are others, or no plain values."""
    plain = all(isinstance(value, (int, float, str)) for value in data.values())
    if not plain or set(data) != {f.name for f in fields(kernel.Params)}:
        return None
    return kernel.Params(**data)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # it may be nested a thousand times
        return None
    good = isinstance(found, dict) and isinstance(found.get("key"), str)
    good = good and isinstance(found.get("params"), dict) and isinstance(found.get("status"), str)
    return found if good else None
