"""What the command line shows: results on stdout, progress on stderr, colour only on terminals."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

Cell = str | int | float | None


def is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def out(text: str = "") -> None:
    """One line of the result."""
    print(text, file=sys.stdout)


def warn(text: str) -> None:
    """One line on stderr, also where progress is not shown."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def document(verb: str, body: dict[str, Any]) -> None:
    """The one JSON document of ``--json``."""
    print(json.dumps({"schema": f"dccompile.{verb}/1", **body}, indent=1), file=sys.stdout)


def cell(value: Cell) -> str:
    """Numbers with three or four telling digits, nothing for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}" if value < 1e4 else f"{value:.0f}"
        )
    return str(value)


def table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Aligned columns on stdout, numbers to the right, never cut; a bold head on a terminal."""
    if not rows:
        return
    texts = [[cell(v) for v in row] for row in rows]
    right = [
        all(isinstance(r[c], (int, float, type(None))) for r in rows) for c in range(len(headers))
    ]
    widths = [max(len(headers[c]), *(len(t[c]) for t in texts)) for c in range(len(headers))]
    bold = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    for number, line in enumerate([list(headers), *texts]):
        columns = zip(line, widths, right, strict=True)
        text = "  ".join(t.rjust(w) if r else t.ljust(w) for t, w, r in columns).rstrip()
        out(f"\033[1m{text}\033[0m" if bold and number == 0 else text)


class Progress:
    """Steps of a long job on stderr: a rich bar on a terminal, one plain line a step otherwise."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def live(self) -> bool:
        """Whether steps replace each other: else every one is a line that stays."""
        return self._bar is not None

    def step(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Announces what happens now; `done` of `total` where the number of steps is known."""
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=done or 0, total=total)
        else:
            self.note(f"[{done}/{total}] {text}" if total else text)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
