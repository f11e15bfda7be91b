"""Every error a user can meet: one line that names the thing, the rule and the fix.

Codes: DC1xxx internal, DC2xxx usage and inputs, DC3xxx model, DC4xxx artifact and machine,
DC5xxx accuracy gate, DC6xxx performance gate, DC7xxx stopped early. The first digit is also
the exit code of the command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One finding about a model: where it is, what was found, what is allowed, what to do."""

    code: str
    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}. Fix: {self.fix}"


class Error(Exception):
    """Base of all errors raised on purpose; `code` is the stable identifier, e.g. ``DC3012``."""

    code = "DC1000"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    @property
    def exit_code(self) -> int:
        return int(self.code[2])

    def lines(self) -> list[str]:
        """The lines the command line prints, without a traceback."""
        return [f"error {self.code}: {self}"]


class UsageError(Error):
    """A wrong option or argument."""

    code = "DC2000"


class InputError(Error):
    """A tensor given to a loaded model does not fit its signature, or holds a forbidden value."""

    code = "DC2100"


class _WithProblems(Error):
    def __init__(self, problems: str | Iterable[Problem], code: str | None = None) -> None:
        if isinstance(problems, str):
            self.problems: tuple[Problem, ...] = ()
            super().__init__(problems, code)
            return
        self.problems = tuple(problems)
        first = self.problems[0]
        more = len(self.problems) - 1
        text = str(first) + (f" (and {more} more)" if more else "")
        super().__init__(text, code or first.code)

    def lines(self) -> list[str]:
        if not self.problems:
            return super().lines()
        return [f"error {p.code}: {p}" for p in self.problems]


class ModelError(_WithProblems):
    """The model is not valid ONNX; `problems` lists every finding."""

    code = "DC3000"


class UnsupportedError(_WithProblems):
    """The model is valid but uses what this compiler does not do; `problems` lists every node."""

    code = "DC3100"


class IncompatibleError(Error):
    """The artifact is damaged, foreign, or does not fit this machine."""

    code = "DC4000"


class TuningError(Error):
    """A tuning job or record cannot be used."""

    code = "DC7000"


class AccuracyError(Error):
    """An accuracy asked for was not reached; `model` is the best found, an onnx.ModelProto."""

    code = "DC5000"

    def __init__(self, message: str, code: str | None = None, model: Any = None) -> None:
        super().__init__(message, code)
        self.model = model


class ScheduleError(Error):
    """A schedule was asked for parameters it cannot honour."""

    code = "DC1100"
