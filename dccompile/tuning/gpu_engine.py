"""Where trials for a GPU run: on this machine's first one, asked for by a process of its own.

The process that tunes never starts the driver before its trials are over.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import Error, IncompatibleError, UsageError
from ..machine import Gpu, Machine, available_cores
from .cluster import Local
from .gpu_trial import mismatch

_LIMIT_S = 60.0  # for a driver to start
_SIDE_BY_SIDE = 4  # that compile: more would wait for the device, within the limit of their trial


@dataclass(frozen=True)
class Found:
    """A GPU: its kind as records name it, and 90 for sm_90."""

    kind: str
    arch: int


def probe() -> Found:
    """The GPU that trials use. Raises IncompatibleError where there is none, or no driver."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        found = {"error": f"the NVIDIA driver ended the process: {said}", "code": "DC4030"}
    if "error" in found:
        raise IncompatibleError(found["error"], found["code"])
    return Found(**found)


def engine(workers: int | str | None, machines: Sequence[Machine]) -> Local:
    """Processes of this machine that take turns on its GPU. Raises UsageError, IncompatibleError.

    All `machines` must be targets that it runs.
    """
    if isinstance(workers, str):
        raise UsageError(
            f"--workers {workers}: trials for GPUs run on this machine alone. "
            "Fix: tune on the machine that has the GPU",
            "DC2038",
        )
    if not all(isinstance(m, Gpu) for m in machines):
        raise UsageError(
            f"--target {', '.join(m.name for m in machines)}: CPUs and GPUs in one job. "
            "Fix: tune for them one after the other",
            "DC2038",
        )
    found = probe()
    for machine in machines:
        if reason := mismatch(machine, found.arch):
            raise UsageError(
                f"--target {machine.name}: {reason}. Fix: measure on a machine that has one",
                "DC2038",
            )
    return Local(workers or min(available_cores(), _SIDE_BY_SIDE), found.kind)


def main() -> None:
    """Prints what `probe` reads."""
    from ..runtime import device

    try:
        found = device.find(0)
        print(json.dumps({"kind": found.kind, "arch": found.arch}))
    except Error as error:
        print(json.dumps({"error": str(error), "code": error.code}))


if __name__ == "__main__":
    main()
