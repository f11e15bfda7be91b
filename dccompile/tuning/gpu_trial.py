"""A trial on a GPU: compiled for it, checked and raced there, by a child that starts the driver.

What a candidate does to the device's context, which no error repairs, ends with the child. Trials
compile side by side; only one at a time uses the device.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..machine import Gpu
from .trial import WEIGHTS, Clock, Refused, Task, Wrong, library, packed_weights


def race(request: dict[str, Any], task: Task, folder: Path, clock: Clock) -> dict[str, Any]:
    """As `trial.run` says; raises Wrong, Refused, and whatever a candidate makes the driver say."""
    from ..bench.gpu_memory import Memory
    from ..cuda import loose
    from ..cuda.replay import replay
    from ..runtime import device
    from . import race as racing

    ours, theirs = (task.kernel.Params(**request[name]) for name in ("params", "against"))
    chosen = list(dict.fromkeys((ours, theirs)))
    images = [_image(task, params, folder, clock) for params in chosen]
    with clock("pack"):
        packed = [packed_weights(task, params) for params in chosen]
    with _alone():
        with clock("load"):
            gpu = device.find(0)
            if reason := mismatch(task.machine, gpu.arch):
                raise Refused(reason)
            functions = [loose.load(image, gpu) for image in images]
            share = int(request.get("weights", WEIGHTS)) // 2
            memory = Memory(gpu, task.workload, task.problems, packed, share)
        with clock("check"):
            for index, problem in enumerate(task.problems):
                functions[0](*memory.arguments(index, 0))
                reason = functions[0].finding() or problem.check(memory.result(index))
                if reason is not None:
                    raise Wrong(reason)
        with clock("race"):
            turns = [
                [
                    replay(gpu, memory.calls(function, index, which))
                    for index in range(len(task.problems))
                ]
                for which, function in enumerate(functions)
            ]
            return racing.race(turns[0], turns[-1], request["seconds"])


def mismatch(machine: Any, arch: int) -> str | None:
    """Why a GPU of that architecture cannot run a target's machine code; None if it can.

    It runs on later parts of its own generation alone.
    """
    if not isinstance(machine, Gpu):
        return f"target {machine.name} is no GPU's"
    wanted = int(machine.arch.removeprefix("sm_"))
    if wanted // 10 == arch // 10 and wanted <= arch:
        return None
    return f"{machine.name} does not run on this GPU, which is sm_{arch}"


def _image(task: Task, params: Any, folder: Path, clock: Clock) -> bytes:
    """The kernel compiled, as `loose.load` takes it; from the folder if it is there."""
    from ..cuda import loose

    file = library(task, params, folder).with_suffix(".gpu")
    if not file.exists():
        with clock("build"):
            func = task.kernel.build(task.workload, params, task.machine)
            func = func.with_attrs({"global_symbol": "main", "dcc.kernel": task.kernel.name})
        with clock("compile"):
            assert isinstance(task.machine, Gpu)
            new = file.with_suffix(".new")
            new.write_bytes(loose.compile(func, task.machine))
            new.rename(file)  # whole or not there: a trial may be killed at any time
    return file.read_bytes()


@contextmanager
def _alone() -> Iterator[None]:
    """No other trial of this user is on the device meanwhile."""
    place = Path(tempfile.gettempdir()) / f"dccompile-gpu-{os.getuid()}.lock"
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
