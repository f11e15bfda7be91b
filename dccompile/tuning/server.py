"""Runs trials, each in a child that is killed at its limit.

A server is a process that has imported the compiler, once, and forks a child for every trial: it
is single-threaded, computes nothing but problems, and outlives whatever a candidate does. Requests
and results are lines of JSON. It ends when its input does, also in the middle of a trial.

A request: kernel, target, workload (`Workload.to_json`), params and against (the incumbent's),
seconds of the race, limit in seconds of the whole trial, bytes of weights that the copies of both
competitors' W fill (they are read in turns, as in a model whose other layers come between), seed of
the data, schedule (digest of the kernel's source), versions of dccompile and tvm.

A result: status "ok", "wrong", "crash", "timeout", "error" or "refused", and the reason; with "ok"
us, p20, p80 of the candidate and against_us of the incumbent, microseconds, medians over rounds,
sums over the sizes of an open dimension; ratio, the incumbent's time by the candidate's, median
over rounds, and the bounds low and high of that median with a confidence of 95 %; rounds. Always:
cpu, worker, seconds, and parts, the milliseconds of processor time of each part of the trial.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from .. import fingerprint, registry
from ..kernel import Kernel
from ..machine import TARGETS, cpu_type
from ..workload import Workload
from . import turns
from .children import LIMIT_S, Bench, last_line, versions, worker
from .trial import WEIGHTS

__all__ = ["LIMIT_S", "Server", "main", "request", "run_here", "versions"]

GRACE_S = 60.0  # beyond a trial's limit: making a problem, or starting
_NUMBERS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


# ---- in the server's process ----


def prepare() -> None:
    """Brings in all that children need, so that none has to."""
    from ..bench import measure
    from ..generic import legalize, stack
    from ..runtime import ffi
    from ..workload import Gemm

    tvm = measure.import_tvm()
    for kernel in registry.kernels():
        fingerprint.schedule(kernel)  # of what was imported, whatever happens to the files later
    ffi.load_pool(memoryview(measure._pool_image()), "pool")
    turns.prepare()
    machine = TARGETS["x86-64-v3"]
    work = Gemm(1, 8, 8, "f32", "f32", "f32")
    choice = registry.select(work, machine)
    func = choice.kernel.build(work, choice.params, machine).with_attr("global_symbol", "kernel")
    stack.build(tvm.IRModule({"kernel": func}), legalize.target_of(machine)).inspect_source("asm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Answers requests on standard input until it ends."""
    parser = argparse.ArgumentParser(description="runs tuning trials: lines of JSON in and out")
    parser.add_argument("--core", type=int, help="the only core to run on")
    parser.add_argument("--folder", type=Path, help="for compiled kernels; removed at the end")
    options = parser.parse_args(arguments)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    folder = options.folder or Path(tempfile.mkdtemp(prefix="dccompile-"))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no reply
    os.set_inheritable(replies.fileno(), False)
    try:
        prepare()
        bench = Bench(folder)
        for line in sys.stdin:
            print(json.dumps(bench.run(json.loads(line))), file=replies, flush=True)
    except BrokenPipeError:
        pass
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- elsewhere ----


def request(
    kernel: Kernel[Any, Any],
    target: str,
    workload: Workload,
    params: Any,
    against: Any,
    *,
    seconds: float,
    limit: float = LIMIT_S,
    weights: int = WEIGHTS,
    seed: int = 0,
) -> dict[str, Any]:
    """A request to race `params` against the incumbent's, by this version of everything."""
    return {
        "target": target,
        "kernel": kernel.name,
        "workload": workload.to_json(),
        "params": asdict(params),
        "against": asdict(against),
        "seconds": seconds,
        "limit": limit,
        "weights": weights,
        "seed": seed,
        "schedule": fingerprint.schedule(kernel),
        "versions": versions(),
    }


class Server:
    """A server's process, started when it is first needed, and again if it dies.

    `core`: the only one it runs on. It belongs to a session of its own, which the terminal's
    Ctrl-C does not reach. One thread at a time uses it.
    """

    entry: tuple[str, ...] = ("-m", "dccompile.tuning.server")

    def __init__(self, core: int | None = None) -> None:
        self._core = core
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs a trial; returns its result, also where the server itself dies of it."""
        with self._lock:
            try:
                return self._ask(request)
            except BaseException:  # an answer that is still to come is nobody's
                self._stop()
                raise

    def close(self) -> None:
        """Ends the process, in the middle of a trial if there is one."""
        with self._lock:
            self._stop()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        start = time.monotonic()
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._start()
        assert self._process is not None and self._process.stdin and self._process.stdout
        deadline = start + float(request.get("limit", LIMIT_S)) + GRACE_S
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = _line(self._process.stdout.fileno(), deadline)
        except BrokenPipeError:
            line = b""
        if line:
            reply = json.loads(line)
            assert isinstance(reply, dict)
            return reply
        if line is None:
            result = {"status": "timeout", "reason": "the server did not answer and was killed"}
            self._stop()
        else:
            result = {"status": "crash", "reason": f"the server died: {self._end()}"}
        spent = round(time.monotonic() - start, 4)
        return {**result, "cpu": cpu_type(), "worker": worker(), "seconds": spent, "parts": {}}

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="dccompile-")
        self._log = tempfile.TemporaryFile()
        command = [sys.executable, *self.entry, "--folder", self._folder]
        if self._core is not None:
            command += ["--core", str(self._core)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **dict.fromkeys(_NUMBERS, "1")},
        )

    def _end(self) -> str:
        """How the process ended, and its last words."""
        assert self._process is not None and self._log is not None
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = last_line(self._log.fileno())
        self._stop()
        return how + (f": {said}" if said else "")

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin and process.stdout
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
            process.kill()  # and with it, the child of a trial
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _line(pipe: int, deadline: float) -> bytes | None:
    """A line of a pipe that nobody else reads; b"" at its end, None at the deadline."""
    text = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while not text.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            return None
        part = os.read(pipe, 1 << 16)
        if not part:
            return b""
        text += part
    return text


@lru_cache(maxsize=1)
def _own(process: int) -> Server:
    return Server()


def run_here(request: dict[str, Any]) -> dict[str, Any]:
    """Runs a trial by a server that belongs to this process; what a cluster's worker calls."""
    return _own(os.getpid()).run(request)


if __name__ == "__main__":
    main()
