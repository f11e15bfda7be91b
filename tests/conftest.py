"""Small artifacts for the tests of file format and runtime, built by hand: no front end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dccompile import cache


def pytest_itemcollected(item: pytest.Item) -> None:
    """``pytest -m cuda`` runs the tests of single kernels on this machine's GPU.

    Those of whole models choose where they run by their fixture `machine`.
    """
    emulate = getattr(getattr(item, "module", None), "emulate", None)
    single = item.path.name.startswith("test_cuda_") and "machine" not in item.fixturenames
    if emulate is not None and single and item.config.option.markexpr == "cuda":
        emulate.on_gpu = True
        item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled functions go to a folder of this run, unless the environment names one."""
    with pytest.MonkeyPatch.context() as patch:
        if cache.VARIABLE not in os.environ:
            patch.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of four artifacts.

    `affine`: x f32[N,16] -> y f32[N,16] = 2 x + w, w = 0..15, N at least 0, through the workspace
    and in a parallel loop. `negate`: x f32[4] -> y f32[4] = -x. `mixed`: a f32[], b i64[N,4],
    c f32[N,8], N in 1..64 -> total f32[N] = a * sum of a row of c, hits i64[] = sum of b; a
    negative b raises DC2110. `checked`: x i64[N] -> y i64[N] = x in a parallel loop, where a
    negative x raises DC2111.
    """
    folder = tmp_path_factory.mktemp("artifacts")
    weights = [("w", np.arange(16, dtype=np.float32))]
    open_n = [{"name": "N", "min": 0, "max": None}]
    matrix = ("float32", ["N", 16])
    made = {
        "affine": _make(
            folder, "affine", _affine(), [("x", *matrix)], [("y", *matrix)], open_n, weights
        ),
        "negate": _make(
            folder, "negate", _negate(), [("x", "float32", [4])], [("y", "float32", [4])], [], None
        ),
        "mixed": _make(
            folder,
            "mixed",
            _mixed(),
            [("a", "float32", []), ("b", "int64", ["N", 4]), ("c", "float32", ["N", 8])],
            [("total", "float32", ["N"]), ("hits", "int64", [])],
            [{"name": "N", "min": 1, "max": 64}],
            None,
        ),
        "checked": _make(
            folder,
            "checked",
            _checked(),
            [("x", "int64", ["N"])],
            [("y", "int64", ["N"])],
            open_n,
            None,
        ),
    }
    return made


def _make(
    folder: Path,
    name: str,
    functions: dict[str, Any],
    inputs: list[Any],
    outputs: list[Any],
    symbols: list[Any],
    weights: Any,
) -> Path:
    import tvm

    from dccompile import threadpool
    from dccompile.runtime import artifact

    pool = folder / "pool.so"
    threadpool.build(pool)
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    library = folder / f"{name}.so"
    built = tvm.tirx.build(tvm.IRModule(functions), target=target)
    tvm.runtime.Executable(built).export_library(str(library))
    rows = lambda side: [dict(zip(("name", "dtype", "shape"), row, strict=True)) for row in side]  # noqa: E731
    entries: dict[str, Any] = {"lib/x86-64-v3.so": library}
    if weights:
        entries["params.safetensors"] = artifact.pack_params(weights)
    entries[artifact.RUNTIME] = pool
    manifest = {
        "format": 1,
        "name": name,
        "inputs": rows(inputs),
        "outputs": rows(outputs),
        "symbols": symbols,
        "variants": [
            {
                "target": "x86-64-v3",
                "features": ["avx2", "fma"],
                "library": "lib/x86-64-v3.so",
                "params": "params.safetensors" if weights else None,
            }
        ],
        "runtime": {"tvm_ffi": "0.1.14.post1"},
    }
    path = folder / f"{name}.dcm"
    artifact.write(path, manifest, entries)
    return path


@contextmanager
def _function(name: str, *args: str) -> Iterator[Any]:
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        yield builder, [T.arg(arg, T.handle()) for arg in args]


def _plan(build: Callable[[Any], list[Any]], symbols: int) -> Any:
    """`plan`, which stores what `build(N)` lists."""
    from tvm.tirx.script import builder as T

    with _function("plan", "symbols", "result") as (builder, (symbols_, result_)):
        given = T.match_buffer(symbols_, (max(1, symbols),), "int64")
        values = build(given[0])
        result = T.match_buffer(result_, (len(values),), "int64")
        for i, value in enumerate(values):
            T.buffer_store(result, value, [i])
    return builder.get()


def _i64(value: int) -> Any:
    from tvm import tirx

    return tirx.const(value, "int64")


def _affine() -> dict[str, Any]:
    from tvm import tirx
    from tvm.tirx.script import builder as T

    with _function("main", "x", "y", "params", "workspace") as (builder, handles):
        n, size = T.int64(), T.int64()
        x = T.match_buffer(handles[0], (n, 16), "float32")
        y = T.match_buffer(handles[1], (n, 16), "float32")
        params = T.match_buffer(handles[2], (64,), "uint8")
        workspace = T.match_buffer(handles[3], (size,), "uint8")
        w = T.decl_buffer((16,), "float32", data=params.data)
        scratch = T.decl_buffer((n, 16), "float32", data=workspace.data)
        with T.parallel(n) as i:
            with T.serial(16) as j:
                T.buffer_store(scratch, x[i, j] * tirx.const(2, "float32"), [i, j])
            with T.serial(16) as k:
                T.buffer_store(y, scratch[i, k] + w[k], [i, k])
    plan = _plan(lambda n: [n * 64, n, _i64(16)], 1)
    return {"main": builder.get(), "plan": plan}


def _negate() -> dict[str, Any]:
    from tvm import tirx
    from tvm.tirx.script import builder as T

    with _function("main", "x", "y", "params", "workspace") as (builder, handles):
        x = T.match_buffer(handles[0], (4,), "float32")
        y = T.match_buffer(handles[1], (4,), "float32")
        T.match_buffer(handles[2], (0,), "uint8")
        T.match_buffer(handles[3], (0,), "uint8")
        with T.serial(4) as i:
            T.buffer_store(y, tirx.const(0, "float32") - x[i], [i])
    return {"main": builder.get(), "plan": _plan(lambda _: [_i64(0), _i64(4)], 0)}


def _mixed() -> dict[str, Any]:
    from tvm import tirx
    from tvm.tirx.script import builder as T

    names = ("a", "b", "c", "total", "hits", "params", "workspace")
    with _function("main", *names) as (builder, handles):
        n = T.int64()
        a = T.match_buffer(handles[0], (), "float32")
        b = T.match_buffer(handles[1], (n, 4), "int64")
        c = T.match_buffer(handles[2], (n, 8), "float32")
        total = T.match_buffer(handles[3], (n,), "float32")
        hits = T.match_buffer(handles[4], (), "int64")
        T.buffer_store(hits, _i64(0), [])
        with T.serial(n) as i:
            with T.serial(4) as j:
                with T.Assert(b[i, j] >= 0, "DC2110: input 'b': negative. Fix: give others"):
                    pass
                T.buffer_store(hits, hits[()] + b[i, j], [])
            T.buffer_store(total, tirx.const(0, "float32"), [i])
            with T.serial(8) as k:
                T.buffer_store(total, total[i] + a[()] * c[i, k], [i])
    return {"main": builder.get(), "plan": _plan(lambda n: [_i64(0), n], 1)}


def _checked() -> dict[str, Any]:
    from tvm.tirx.script import builder as T

    with _function("main", "x", "y", "params", "workspace") as (builder, handles):
        n = T.int64()
        x = T.match_buffer(handles[0], (n,), "int64")
        y = T.match_buffer(handles[1], (n,), "int64")
        with T.parallel(n) as i:
            with T.Assert(x[i] >= 0, "DC2111: input 'x': negative. Fix: give others"):
                pass
            T.buffer_store(y, x[i], [i])
    return {"main": builder.get(), "plan": _plan(lambda n: [_i64(0), n], 1)}
