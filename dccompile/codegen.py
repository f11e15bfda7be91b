"""Machine code in units: one object file for every distinct function of a model.

A unit is known by its key, the SHA-256 of all that its bytes depend on, and its symbol ends with
a digest of what it computes. So equal layers share one function, and a function compiled for any
model before comes from the cache. Hand-written kernels enter a module as stubs: their loops are
built together with their code, by the process that misses them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from . import fingerprint
from .cache import Cache
from .cuda import build
from .generic import legalize, stack
from .machine import Gpu, Machine
from .registry import Choice

_TURNS = 1024  # of 4 bytes: what the smallest pipe holds
_DIGITS = 10  # of the digest in a symbol: equal ones among 1000 functions are a chance of 5e-7


@dataclass(frozen=True)
class Unit:
    """One object file: `make` gives its functions by symbol, `key` names their machine code.

    For a GPU it is what `cuda.build` packs: the host's object file and the kernels' code.
    """

    key: str
    machine: Machine
    make: Callable[[], dict[str, tirx.PrimFunc]]


class Crash(Exception):
    """A process that generated code ended by itself; `code` as in Process.exitcode."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


# ---- units ----


def stub(choice: Choice, hint: str) -> tuple[str, tirx.PrimFunc]:
    """The symbol of a hand-written kernel and a function that stands for it in a module."""
    digest = _sha256(*_recipe(choice))
    symbol = f"{choice.kernel.name}_{hint}_{digest[:_DIGITS]}"
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"op_pattern": 8, "dcc.kernel": choice.kernel.name, "dcc.digest": digest})
        # Without arguments this intrinsic has no code: FoldConstant, which compiles and calls
        # functions of constants, then leaves the kernel's calls alone.
        T.evaluate(tirx.call_intrin("handle", "tirx.tvm_access_ptr"))
    return symbol, builder.get().without_attr("global_symbol")


def kernel_unit(symbol: str, choice: Choice, machine: Machine) -> Unit:
    """The kernel that the stub of this choice stands for."""

    def make() -> dict[str, tirx.PrimFunc]:
        func = choice.kernel.build(choice.workload, choice.params, machine)
        return {symbol: func.with_attr("dcc.kernel", choice.kernel.name)}

    sources = _contracts(), _with_imports(Path(inspect.getfile(type(choice.kernel))))
    record = json.dumps(asdict(machine), sort_keys=True)
    return Unit(_key(machine, symbol, *_recipe(choice), record, *sources), machine, make)


def function_unit(functions: dict[str, tirx.PrimFunc], machine: Machine) -> Unit:
    """Functions that exist already, by symbol."""
    texts = [text for name in sorted(functions) for text in (name, *_text(functions[name]))]
    return Unit(_key(machine, *texts), machine, lambda: functions)


def entry_unit(functions: dict[str, tirx.PrimFunc], calls: Iterable[str], machine: Machine) -> Unit:
    """Functions, named ``main`` or later in the alphabet, that call those of other units.

    For every call of a function that is not in the module TVM declares one more, under a name of
    its own. So a function before them, which nobody calls, declares each of them once.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("externals")
        none = tirx.reinterpret("handle", tirx.const(0, "uint64"))
        for name in calls:
            args = (none, none, tirx.const(0, "int32"), none)
            T.evaluate(tirx.call_extern("int32", f"__tvm_ffi_{name}", *args))
    return function_unit({"externals": builder.get(), **functions}, machine)


def symbol(name: str, func: tirx.PrimFunc) -> str:
    """The symbol of a function: its name for people, without a counter, and its digest.

    A stub keeps its name, which has one.
    """
    if func.attrs and "dcc.digest" in func.attrs:
        return name
    return f"{name.rstrip('0123456789')}_{_sha256(*_text(func))[:_DIGITS]}"


def _recipe(choice: Choice) -> tuple[str, ...]:
    parts = (choice.workload.to_json(), asdict(choice.params))
    return choice.kernel.name, *(json.dumps(p, sort_keys=True) for p in parts)


def _text(func: tirx.PrimFunc) -> tuple[str, str]:
    """All of a function but its name."""
    func = func.without_attr("global_symbol") if func.attrs else func
    return tvm.ir.save_json(func), str(tvm_ffi.structural_hash(func, map_free_vars=True))


def _key(machine: Machine, *parts: str) -> str:
    return _sha256(_tools(machine), *parts)


@lru_cache(maxsize=None)  # noqa: UP033 (a cache by that name is something else here)
def _tools(machine: Machine) -> str:
    """Digest of all that turns a function into machine code."""
    versions = f"tvm {tvm.__version__} llvm {tvm.target.codegen.llvm_version_major()}"
    sources = _sources(Path(__file__)), _with_imports(Path(stack.__file__))
    if isinstance(machine, Gpu):
        return _sha256(versions, *sources, *build.tools(machine))
    return _sha256(versions, str(legalize.target_of(machine)), *sources)


@lru_cache(maxsize=1)
def _contracts() -> str:
    """Digest of what schedules import beside each other."""
    own = Path(__file__).parent
    return _sources(*(own / f"{n}.py" for n in ("kernel", "machine", "workload")))


@lru_cache(maxsize=None)  # noqa: UP033
def _with_imports(path: Path) -> str:
    """Digest of a Python file and of those in its folder that it imports, directly or not."""
    return _sources(*fingerprint.imported_files(path))


def _sources(*paths: Path) -> str:
    return _sha256(*(part for p in paths for part in (p.name, p.read_text())))


def _sha256(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


# ---- code ----


def objects(
    units: Iterable[Unit],
    folder: Path,
    cache: Cache,
    processes: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Path]:
    """Object files of units by key, in `folder`: from the cache, else compiled.

    With `processes` more than 1 that happens in forked children, so this process should have no
    other threads. `progress` is told, once, how many units are compiled and of how many. Raises
    what compiling raises, and Crash where a child ends.
    """
    paths: dict[str, Path] = {}
    missing: list[tuple[Unit, Path]] = []
    for unit in units:
        if unit.key in paths:
            continue
        path = paths[unit.key] = folder / f"{unit.key}.o"
        data = cache.get(unit.key)
        if data is None:
            missing.append((unit, path))
        else:
            path.write_bytes(data)
    if progress is not None:
        progress(len(missing), len(paths))
    if min(processes, len(missing)) > 1:
        _forked(missing, cache, processes)
    else:
        for unit, path in missing:
            _compile(unit, path, cache)
    if missing:
        cache.trim()
    return paths


def _compile(unit: Unit, path: Path, cache: Cache) -> None:
    if isinstance(unit.machine, Gpu):
        path.write_bytes(build.build(unit.make(), unit.machine).pack())
        cache.put(unit.key, path.read_bytes())
        return
    functions = {n: f.with_attr("global_symbol", n) for n, f in unit.make().items()}
    built = stack.build(tvm.IRModule(functions), legalize.target_of(unit.machine))
    built.write_to_file(str(path), "o")
    cache.put(unit.key, path.read_bytes())


def _forked(missing: Sequence[tuple[Unit, Path]], cache: Cache, processes: int) -> None:
    """Compiles in children that take the next unit whenever they are free."""
    context = get_context("fork")
    parent = os.getpid()
    turns = min(len(missing), _TURNS)
    queue, end = os.pipe()  # multiprocessing's own would need semaphores, which containers may lack
    os.write(end, b"".join(turn.to_bytes(4, "little") for turn in range(turns)))
    os.close(end)

    def work(report: connection.Connection) -> None:
        try:
            while (turn := os.read(queue, 4)) and os.getppid() == parent:
                for unit, path in missing[int.from_bytes(turn, "little") :: turns]:
                    _compile(unit, path, cache)
        except BaseException as error:
            report.send_bytes(_packed(error))

    children: dict[connection.Connection, Any] = {}
    try:
        for _ in range(min(processes, len(missing))):
            here, there = context.Pipe(duplex=False)
            child = context.Process(target=work, args=(there,))
            child.start()
            there.close()  # the child's end alone is left: here ends with the child
            children[here] = child
        left = list(children)
        while left:
            for ready in connection.wait(left):
                assert isinstance(ready, connection.Connection)
                left.remove(ready)
                _finish(ready, children[ready])
    finally:
        for here, child in children.items():
            child.kill()
            child.join()
            here.close()
        os.close(queue)


def _finish(report: connection.Connection, child: Any) -> None:
    """Raises what a child reports before it ends, or how it ended."""
    try:
        error, trace = pickle.loads(report.recv_bytes())
    except EOFError:
        child.join()
        if child.exitcode:
            raise Crash(child.exitcode) from None
        return
    raise error from RuntimeError(trace)


def _packed(error: BaseException) -> bytes:
    """An error and its trace for another process."""
    trace = "".join(traceback.format_exception(error))
    try:
        raw = pickle.dumps((error, trace))
        pickle.loads(raw)
    except Exception:
        return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return raw
