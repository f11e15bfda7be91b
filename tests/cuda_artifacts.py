"""Small artifacts with variants for GPUs, built by hand: no front end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import conftest
import numpy as np
from dccompile.schedules.cuda._ir import T, address, call, do, i64, launch, prim_func, tirx
from dccompile.schedules.cuda._ir import when as given

from dccompile.cuda import build, hostlib
from dccompile.machine import GPUS

FOUND = "DC2111: input 'x': % at % of $. Fix: give others"
TABLE = np.frombuffer(b"table ", np.uint8)  # the name, at the start of params


def affine() -> Any:
    """`main` of x f32[N,16] -> y f32[N,16] = 2 x + w, through the workspace, in two launches."""
    with prim_func("main") as builder:
        n, size = tirx.Var("n", "int64"), tirx.Var("size", "int64")
        x = T.arg("x", T.buffer((n, 16), "float32"))
        y = T.arg("y", T.buffer((n, 16), "float32"))
        params = T.arg("params", T.buffer((64,), "uint8"))
        work = T.arg("workspace", T.buffer((size,), "uint8"))
        with launch((n,), (16,)) as (i, j):
            twice = call("float32", "mul", x[i, j], tirx.const(2, "float32"))
            do("store4", address(work, (i * 16 + j) * 4), call("uint32", "as_uint", twice))
        with launch((n,), (16,)) as (i, j):
            value = call("uint32", "load4", address(work, (i * 16 + j) * 4))
            bias = call("uint32", "load4", address(params, j * 4))
            total = call(
                "float32", "add", call("float32", "as_float", value),
                call("float32", "as_float", bias),
            )  # fmt: skip
            T.buffer_store(y, total, [i, j])
    return builder.get().with_attr("dcc.kernel", "affine")


def checked() -> Any:
    """`main` of x i64[N] -> y i64[N] = x, or 0 and a finding where x is negative."""
    with prim_func("main") as builder:
        n, size = tirx.Var("n", "int64"), tirx.Var("size", "int64")
        x = T.arg("x", T.buffer((n,), "int64"))
        y = T.arg("y", T.buffer((n,), "int64"))
        params = T.arg("params", T.buffer((64,), "uint8"))
        T.arg("workspace", T.buffer((size,), "uint8"))
        with launch((n,), (1,)) as (i, _):
            T.buffer_store(y, tirx.max(x[i], i64(0)), [i])
            with given(x[i] < 0):
                do("report", FOUND, x[i], i, i64(0), i64(0), address(params, 0), 5)
    return builder.get().with_attr("dcc.kernel", "checked")


def make(
    folder: Path,
    name: str,
    main: Any,
    rows: Sequence[Any],
    weights: np.ndarray,
    workspace: int,
    archs: Sequence[str] = ("sm_80", "sm_90"),
    cpu: Path | None = None,
) -> Path:
    """Writes an artifact of `main` with one input x and one output y, `rows` their facts.

    `workspace` is in bytes for each N; `cpu` is an artifact that lends a variant for the CPU.
    """
    import tvm

    from dccompile import linker, threadpool
    from dccompile.generic import legalize, stack
    from dccompile.runtime import artifact

    pool = folder / "pool.so"
    threadpool.build(pool)
    entries: dict[str, Any] = {}
    variants = []
    plan = conftest._plan(lambda n: [n * i64(workspace), n, *map(i64, rows[0][2][1:])], 1)
    for arch in archs:
        machine = GPUS[f"cuda:{arch}"]
        built = build.build({"main": main}, machine)
        parts = [folder / f"{name}.{arch}.{part}.o" for part in ("main", "plan", "launch")]
        parts[0].write_bytes(built.host)
        target = legalize.target_of(machine.host)
        stack.build(tvm.IRModule({"plan": plan}), target).write_to_file(str(parts[1]), "o")
        hostlib.build(built.kernels, parts[2])
        library = folder / f"{name}.{arch}.so"
        linker.link(parts, library)
        base = f"lib/cuda_{arch}"
        entries.update({f"{base}.so": library, f"{base}/k.cubin": built.cubin})
        entries[f"{base}/k.ptx"] = built.ptx
        image = {
            "cubin": f"{base}/k.cubin", "ptx": f"{base}/k.ptx", "kernels": list(built.kernels)
        }  # fmt: skip
        variants.append(
            {
                "target": machine.name,
                "features": list(machine.features),
                "library": f"{base}.so",
                "params": "params.safetensors",
                "images": [image],
                "pieces": [[0, -(-weights.nbytes // 64) * 64]] if weights.nbytes else [],
            }
        )
    if cpu is not None:
        with artifact.read(cpu) as file:
            (row,) = file.manifest["variants"]
            entries[row["library"]] = bytes(file.entry(row["library"]))
        variants.append({**row, "params": "params.safetensors"})
    entries["params.safetensors"] = artifact.pack_params([("w", weights)])
    entries[artifact.RUNTIME] = pool
    keys = ("name", "dtype", "shape")
    manifest = {
        "format": 1,
        "name": name,
        "inputs": [dict(zip(keys, rows[0], strict=True))],
        "outputs": [dict(zip(keys, rows[1], strict=True))],
        "symbols": [{"name": "N", "min": 0, "max": None}],
        "variants": variants,
        "runtime": {"tvm_ffi": "0.1.14.post1", "cuda": "12.4"},
    }
    path = folder / f"{name}.dcm"
    artifact.write(path, manifest, entries)
    return path


def make_both(folder: Path, cpu: Path) -> dict[str, Path]:
    """The artifacts `affine`, which has a variant for the CPU too, and `checked`."""
    w = np.arange(16, dtype=np.float32)
    matrix, vector = ("float32", ["N", 16]), ("int64", ["N"])
    return {
        "affine": make(
            folder, "affine", affine(), [("x", *matrix), ("y", *matrix)], w, 64, cpu=cpu
        ),
        "checked": make(
            folder, "checked", checked(), [("x", *vector), ("y", *vector)], TABLE, 0, ("sm_80",)
        ),
    }
