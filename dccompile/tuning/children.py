"""Trials in children of a server's process, and what becomes of them.

A child may compute something wrong, raise, abort or hang: it costs its trial, no more.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import __version__, fingerprint, registry
from ..bench import problems
from ..errors import Error
from ..machine import Gpu, cpu_type, find, missing_features
from ..workload import EmbeddingBag, from_json
from . import trial

LIMIT_S = 60.0  # of a trial whose request names none
_TASKS_BYTES = 1 << 30  # of problems kept
_LIBRARIES = 256  # compiled kernels kept
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Bench:
    """Runs trials one after the other, in children of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tasks: OrderedDict[tuple[str, ...], trial.Task] = OrderedDict()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """The result of a trial, whatever happens in it."""
        start = time.perf_counter()
        result: dict[str, Any]
        reason = refusal(request)
        if reason is not None:
            result = {"status": "refused", "reason": reason}
        else:
            try:
                task = self._task(request)
                ready = time.perf_counter()
                result = self._fork(request, task)
                result.setdefault("parts", {})["problem"] = round(1e3 * (ready - start), 2)
            except Exception as error:
                result = {"status": "error", "reason": _one_line(error)}
        spent = time.perf_counter() - start
        return {**result, "cpu": cpu_type(), "worker": worker(), "seconds": round(spent, 4)}

    def _task(self, request: dict[str, Any]) -> trial.Task:
        """The kernel and data of a request, kept for the next ones."""
        where = ("kernel", "target", "workload", "seed")
        key = tuple(json.dumps(request.get(name), sort_keys=True) for name in where)
        task = self._tasks.pop(key, None)
        if task is None:
            workload = from_json(request["workload"])
            kernel = registry.named(request["kernel"])
            assert kernel is not None
            reason = kernel.refuses(workload)
            if reason is not None:
                raise ValueError(f"{kernel.name} refuses {workload.describe()}: {reason}")
            made = problems.make(workload, int(request.get("seed", 0)))
            machine = find(request["target"])
            assert machine is not None
            task = trial.Task(kernel, machine, workload, made)
            if isinstance(workload, EmbeddingBag):
                task.packed = problems.pack(kernel, workload, made[0].weights, None)
            self._forget(_TASKS_BYTES - task.nbytes)
            gc.collect()
            gc.freeze()  # children would copy the pages whose objects a collection touches
        self._tasks[key] = task
        return task

    def _forget(self, room: int) -> None:
        """Drops what was not used for longest until the rest fits."""
        while self._tasks and sum(task.nbytes for task in self._tasks.values()) > room:
            self._tasks.popitem(last=False)
        old = sorted(self._folder.glob("*.[sg]*"), key=lambda path: path.stat().st_mtime)
        for path in old[:-_LIBRARIES]:
            path.unlink()

    def _fork(self, request: dict[str, Any], task: trial.Task) -> dict[str, Any]:
        limit = float(request.get("limit", LIMIT_S))
        noise = os.memfd_create("dccompile-trial")  # what the child, or LLVM in it, says
        here, there = os.pipe()
        server = os.getpid()
        child = os.fork()
        if child == 0:
            _child(request, task, self._folder, there, noise, server)
        os.close(there)
        try:
            return _await(child, here, noise, limit)
        finally:
            os.close(here)
            os.close(noise)


def _child(
    request: dict[str, Any],
    task: trial.Task,
    folder: Path,
    there: int,
    noise: int,
    server: int,
) -> None:
    """All that happens in a child; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)  # killed with the linker that it runs
        _die_with(server)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than another
        os.dup2(noise, 1)
        os.dup2(noise, 2)
        gc.disable()
        result = json.dumps(trial.run(request, task, folder)).encode()
        while result:
            result = result[os.write(there, result) :]
        code = 0
    finally:
        os._exit(code)


def _await(child: int, here: int, noise: int, limit: float) -> dict[str, Any]:
    """What a child reports before its limit, else how it ended."""
    end = time.monotonic() + limit
    poll = select.poll()
    poll.register(here, select.POLLIN)
    poll.register(sys.stdin.fileno(), 0)  # tells when nobody is there any more
    text = b""
    while True:
        ready = dict(poll.poll(max(0.0, end - time.monotonic()) * 1e3))
        late, gone = not ready, sys.stdin.fileno() in ready
        if late or gone:
            break
        part = os.read(here, 1 << 16)
        if not part:
            break
        text += part
    if late or gone:
        _kill(child)
    _, status = os.waitpid(child, 0)
    _kill(child)  # what it may have started
    if gone:
        raise SystemExit(0)
    if late:
        return {"status": "timeout", "reason": f"killed at its limit of {limit:g} s"}
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        said = last_line(noise)
        return {"status": "crash", "reason": name + (f": {said}" if said else "")}
    try:
        found = json.loads(text)
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError):
        said = last_line(noise)
        reason = f"exit code {os.waitstatus_to_exitcode(status)}"
        return {"status": "crash", "reason": reason + (f": {said}" if said else "")}


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def last_line(noise: int) -> str:
    os.lseek(noise, max(0, os.fstat(noise).st_size - 2000), os.SEEK_SET)
    lines = os.read(noise, 2000).decode(errors="replace").strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else ""


def _die_with(parent: int) -> None:
    """Has this process killed when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def refusal(request: dict[str, Any]) -> str | None:
    """Why this process cannot run a trial that another one asks for; None if it can."""
    mine = versions()
    for name, wanted in request.get("versions", {}).items():
        if mine.get(name) != wanted:
            return f"{name} {mine.get(name, 'is not known')} is here, {wanted} is asked for"
    target = find(request["target"])
    if target is None:
        return f"target {request['target']} is not known here"
    kernel = registry.named(request["kernel"])
    if kernel is None:
        return f"kernel {request['kernel']} is not known here"
    needs = {*target.features, *kernel.features}
    if isinstance(target, Gpu):  # the child will see which GPU is here
        if lacks := sorted(needs.difference(target.features)):
            return f"{kernel.name} needs {', '.join(lacks)}, which {target.name} lacks"
    elif lacks := missing_features(sorted(needs)):
        return f"{target.name} needs {', '.join(lacks)}, which this CPU ({cpu_type()}) lacks"
    schedule, wanted = fingerprint.schedule(kernel), request.get("schedule")
    if wanted is not None and schedule != wanted:
        return f"schedule {schedule} of {kernel.name} is here, {wanted} is asked for"
    return None


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions that a request names, of this process."""
    from importlib.metadata import version

    return {"dccompile": __version__, "tvm": version("apache-tvm")}


@lru_cache(maxsize=1)
def worker() -> str:
    """This process, as results name it."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, Error) else f"{type(error).__name__}: {text}"
