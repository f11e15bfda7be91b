"""The command line in the process of the tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dccompile.cli import main as cli


class Shell:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *args: object, code: int = 0) -> tuple[str, str]:
        """stdout and stderr; fails unless the exit code is `code`."""
        self.capsys.readouterr()
        got = cli.main([str(a) for a in args])
        out, err = self.capsys.readouterr()
        assert got == code, f"exit {got}, stdout:\n{out}\nstderr:\n{err}"
        return out, err

    def json(self, verb: str, *args: object, code: int = 0) -> dict[str, Any]:
        """The document of --json, which is all of stdout."""
        body = json.loads(self(verb, *args, "--json", code=code)[0])
        assert body["schema"] == f"dccompile.{verb}/1"
        assert body["environment"]["versions"]["dccompile"]
        return dict(body)

    def fails(self, code: int, *args: object, after_output: bool = False) -> str:
        """The one line of an error: no traceback, nothing on stdout unless `after_output`."""
        out, err = self(*args, code=code)
        lines = [line for line in err.splitlines() if line.startswith("error DC")]
        assert bool(out) == after_output and len(lines) == 1 and "Traceback" not in err
        assert ". Fix: " in lines[0]
        return lines[0]
