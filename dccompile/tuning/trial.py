"""One trial: a candidate is compiled, checked, and raced against the incumbent.

It runs in a process of its own, forked by the server, which may crash or hang. Both competitors
read the same inputs and write the same output; of their weights each has copies that are used in
turns (see turns.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import linker
from ..bench.problems import Problem, large, pack
from ..errors import Error
from ..kernel import Kernel
from ..machine import Gpu, Machine
from ..runtime import ffi
from ..workload import EmbeddingBag, Interaction
from .race import PLACES, race
from .turns import Turns

WEIGHTS = 8 << 20  # bytes of all copies of W, unless the request says: of each more than L2
_COPIES = 256
_LINE = 64
_LOST = "DC4023"  # code of errors that end a GPU's context, as a signal ends a process


@dataclass
class Task:
    """What trials of one kernel and workload share; `packed` is W where no parameter changes it."""

    kernel: Kernel[Any, Any]
    machine: Machine
    workload: Any
    problems: list[Problem]
    packed: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        own = 0 if self.packed is None else self.packed.nbytes
        return own + sum(problem.nbytes for problem in self.problems)


@dataclass
class Clock:
    """Milliseconds of processor time that parts of a trial take, in other processes too."""

    ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Any:
        start = _processor_s()
        yield
        spent = 1e3 * (_processor_s() - start)
        self.ms[part] = round(self.ms.get(part, 0.0) + spent, 2)


def _processor_s() -> float:
    whole = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        whole += used.ru_utime + used.ru_stime
    return whole


class Wrong(Exception):
    """A candidate computed something else than the reference."""


class Refused(Exception):
    """This machine cannot run the trial."""


def run(request: dict[str, Any], task: Task, folder: Path) -> dict[str, Any]:
    """The result of a trial: see `server.Server.run`. Libraries are kept in `folder`."""
    from . import gpu_trial

    clock = Clock()
    race_it = gpu_trial.race if isinstance(task.machine, Gpu) else _race
    try:
        found = race_it(request, task, folder, clock)
    except Wrong as error:
        found = {"status": "wrong", "reason": str(error)}
    except Refused as error:
        found = {"status": "refused", "reason": str(error)}
    except Exception as error:
        text = " ".join(str(error).split())
        name = "" if isinstance(error, Error) else f"{type(error).__name__}: "
        crash = isinstance(error, Error) and error.code == _LOST
        found = {"status": "crash" if crash else "error", "reason": f"{name}{text[:500]}"}
    return {**found, "parts": clock.ms}


def _race(request: dict[str, Any], task: Task, folder: Path, clock: Clock) -> dict[str, Any]:
    ours, theirs = (_params(task.kernel, request[name]) for name in ("params", "against"))
    ffi.configure_threads(1)
    first = _compiled(task, ours, folder, clock)
    other = first if theirs == ours else _compiled(task, theirs, folder, clock)
    with clock("pack"):
        packed = [packed_weights(task, ours)]
        if theirs != ours:
            packed.append(packed_weights(task, theirs))
        memory = _Memory(task, packed, int(request.get("weights", WEIGHTS)))
    with clock("check"):
        for problem, tensors in zip(task.problems, memory.tensors, strict=True):
            first[0](*memory.arguments(tensors, 0, 0))
            reason = problem.check(tensors.result)
            if reason is not None:
                raise Wrong(reason)
    with clock("race"):
        mine = memory.turns(first, 0)
        rivals = mine if ours == theirs else memory.turns(other, 1)
        return race(mine, rivals, request["seconds"])


def _params(kernel: Kernel[Any, Any], values: dict[str, Any]) -> Any:
    return kernel.Params(**values)


# ---- code ----


def _compiled(task: Task, params: Any, folder: Path, clock: Clock) -> list[Any]:
    """The kernel's function, loaded as an artifact's code is; compiled unless `folder` has it.

    It is loaded several times: equal code at another address is up to 2 % faster or slower.
    """
    file = library(task, params, folder)
    if not file.exists():
        _compile(task, params, file, clock)
    with clock("load"):
        image = memoryview(file.read_bytes())
        return [ffi.load_library(image, file.stem, file.stem)["kernel"] for _ in range(PLACES)]


def library(task: Task, params: Any, folder: Path) -> Path:
    """Where a compiled kernel is kept."""
    what = [task.kernel.name, task.machine.name, task.workload.to_json(), asdict(params)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
    return folder / f"{digest}.so"


def _compile(task: Task, params: Any, file: Path, clock: Clock) -> None:
    import tvm

    from ..generic import legalize, stack

    with clock("build"):
        func = task.kernel.build(task.workload, params, task.machine)
        func = func.with_attrs({"global_symbol": "kernel", "dcc.kernel": task.kernel.name})
        module = tvm.IRModule({"kernel": func})
    with clock("llvm"):
        built = stack.build(module, legalize.target_of(task.machine))
        code = file.with_suffix(".o")
        built.write_to_file(str(code), "o")
    with clock("link"):
        linked = file.with_suffix(".new")
        linker.link([code], linked)
        code.unlink()
        linked.rename(file)  # whole or not there: a trial may be killed at any time


# ---- data ----


def packed_weights(task: Task, params: Any) -> np.ndarray:
    """W as the kernel wants it."""
    if task.packed is not None:
        return task.packed
    return pack(task.kernel, task.workload, task.problems[0].weights, params)


@dataclass
class _Tensors:
    """Of one problem: inputs before W in turns, those after it, the result and its array."""

    turns: list[tuple[Any, ...]]
    after: tuple[Any, ...]
    out: Any
    result: np.ndarray


class _Memory:
    """Everything that competitors read and write, in one piece of large pages, aligned to lines.

    What lies behind each other there begins at offsets as they come, as in a model's memory. Copies
    of the competitors' weights alternate: no region's luck is that of one alone.
    """

    def __init__(self, task: Task, packed: Sequence[np.ndarray], weights: int) -> None:
        self.weightless = isinstance(task.workload, Interaction)
        shared = isinstance(task.workload, EmbeddingBag)
        copies = [1 if shared else _copies(w.nbytes, weights // 2) for w in packed]
        arrays = [a for p in task.problems for turn in p.turns for a in turn]
        arrays += [a for p in task.problems for a in (*p.after, p.expected)]
        need = sum(_rounded(a.nbytes) for a in arrays)
        if not shared:
            need += sum(n * _rounded(w.nbytes) for n, w in zip(copies, packed, strict=True))
        self._free, self._at = large(need), 0
        self.tensors = [self._problem(problem) for problem in task.problems]
        self.weights: list[list[Any]] = [[_tensor(w)] if shared else [] for w in packed]
        for turn in range(0 if shared else max(copies)):
            for kept, n, w in zip(self.weights, copies, packed, strict=True):
                if turn < n:
                    kept.append(self._copy(w))

    def arguments(self, tensors: _Tensors, which: int, turn: int) -> tuple[Any, ...]:
        """A call's arguments with the weights of a competitor."""
        before = tensors.turns[turn % len(tensors.turns)]
        weights = self.weights[which]
        w = () if self.weightless else (weights[turn % len(weights)],)
        return (*before, *w, *tensors.after, tensors.out)

    def turns(self, places: Sequence[Any], which: int) -> list[Turns]:
        """The calls of a competitor, per problem."""
        found = []
        for tensors in self.tensors:
            count = max(len(tensors.turns), len(self.weights[which]))
            sets = [self.arguments(tensors, which, turn) for turn in range(count)]
            found.append(Turns(places, sets))
        return found

    def _problem(self, problem: Problem) -> _Tensors:
        turns = [tuple(self._copy(a) for a in turn) for turn in problem.turns]
        after = tuple(self._copy(a) for a in problem.after)
        result = self._take(problem.expected)
        result.view(np.uint8)[...] = 0x5A
        return _Tensors(turns, after, _tensor(result), result)

    def _take(self, like: np.ndarray) -> np.ndarray:
        raw = self._free[self._at : self._at + like.nbytes]
        self._at += _rounded(like.nbytes)
        return raw.view(like.dtype).reshape(like.shape)

    def _copy(self, array: np.ndarray) -> Any:
        place = self._take(array)
        place[...] = array
        return _tensor(place)


def _tensor(array: np.ndarray) -> Any:
    import tvm

    return tvm.runtime.from_dlpack(array) if array.size else tvm.runtime.tensor(array)


def _rounded(nbytes: int) -> int:
    return -(-max(nbytes, 1) // _LINE) * _LINE


def _copies(nbytes: int, weights: int) -> int:
    """How many W fill `weights` bytes."""
    return max(1, min(_COPIES, math.ceil(weights / max(nbytes, 1))))
