"""The cache of compiled functions, and code generation in units, in one and more processes."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from tvm import relax

import dccompile as dc
from dccompile import aot, cache, codegen, registry
from dccompile.cache import Cache, Usage
from dccompile.errors import Problem, ScheduleError, UnsupportedError
from dccompile.generic import legalize
from dccompile.machine import TARGETS
from dccompile.workload import Gemm

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(8)]
MACHINE = TARGETS["x86-64-v3"]


# ---- entries ----


def test_what_is_put_is_found(tmp_path: Path) -> None:
    store = Cache(tmp_path / "made" / "on" / "demand")
    assert store.get(KEYS[0]) is None and store.usage() == Usage(0, 0)
    for key, data in ((KEYS[0], b"code"), (KEYS[1], b""), (KEYS[0], b"other")):
        store.put(key, data)
        assert store.get(key) == data
    assert store.usage() == Usage(2, 2 * 32 + len(b"other"))


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer", "renamed"])
def test_a_damaged_entry_is_absent(tmp_path: Path, damage: str) -> None:
    store = Cache(tmp_path)
    store.put(KEYS[0], b"machine code")
    (path,) = tmp_path.iterdir()
    raw = path.read_bytes()
    if damage == "renamed":
        path = path.rename(path.with_name(path.name.replace(KEYS[0], KEYS[1])))
    else:
        flipped = raw[:-1] + bytes([raw[-1] ^ 1])
        changed = {"flip": flipped, "cut": raw[:-1], "empty": b"", "longer": raw + b"x"}
        path.write_bytes(changed[damage])
    assert store.get(KEYS[1] if damage == "renamed" else KEYS[0]) is None
    assert not path.exists()


def test_the_least_recently_used_go(tmp_path: Path) -> None:
    store = Cache(tmp_path, limit=5 * 132)
    foreign = tmp_path / "notes.txt"
    foreign.write_bytes(bytes(10_000))
    for age, key in enumerate(KEYS):
        store.put(key, bytes(100))
        at = 1_000_000 + age
        os.utime(tmp_path / f"{key}.object", (at, at))
    assert store.get(KEYS[0]) is not None  # now the youngest
    store.trim()
    kept = [i for i, key in enumerate(KEYS) if (tmp_path / f"{key}.object").exists()]
    assert kept == [0, 5, 6, 7]  # 9/10 of the limit
    store.trim()
    assert store.usage().entries == 4 and foreign.exists()


def test_files_of_a_process_that_died_go(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{KEYS[0]}.{name}" for name in ("abc", "def"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1_000_000, 1_000_000))
    Cache(tmp_path).trim()
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    full = tmp_path / "full"
    full.symlink_to("/dev/full/none")
    for folder in (None, tmp_path / "file", tmp_path / "file" / "below", full):
        store = Cache(folder)
        store.put(KEYS[0], b"code")
        store.trim()
        assert store.get(KEYS[0]) is None and store.usage() == Usage(0, 0)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    Cache(tmp_path).put(KEYS[0], b"code")
    assert list(tmp_path.iterdir()) == []


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder(**variables: str) -> Path | None:
        for name in (cache.VARIABLE, "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", "/home/someone")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return cache.folder()

    monkeypatch.chdir(tmp_path)
    assert folder() == Path("/home/someone/.cache/dccompile")
    assert folder(XDG_CACHE_HOME="/x") == Path("/x/dccompile")
    assert folder(XDG_CACHE_HOME="x") == Path("/home/someone/.cache/dccompile")
    assert folder(DCCOMPILE_CACHE_DIR="/y", XDG_CACHE_HOME="/x") == Path("/y")
    assert folder(DCCOMPILE_CACHE_DIR="~/y") == Path("/home/someone/y")
    assert folder(DCCOMPILE_CACHE_DIR="y") == tmp_path / "y"
    for off in ("", "off", " "):
        assert folder(DCCOMPILE_CACHE_DIR=off) is None


def _hammer(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    store = Cache(folder, limit=40_000)
    for _ in range(150):
        key = rng.choice(KEYS)
        if rng.random() < 0.5:
            store.put(key, key.encode() * rng.randrange(1, 300))
        else:
            data = store.get(key)
            assert data is None or data == key.encode() * (len(data) // 64)
        store.trim()


def test_many_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_hammer, args=(tmp_path, seed)) for seed in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# ---- units ----


def _units(*sizes: int) -> list[codegen.Unit]:
    choices = [registry.select(Gemm(4, n, 16, "f32", "f32", "f32"), MACHINE) for n in sizes]
    return [codegen.kernel_unit(codegen.stub(c, "test")[0], c, MACHINE) for c in choices]


def _objects(
    units: list[codegen.Unit], folder: Path, store: Cache, processes: int
) -> tuple[dict[str, bytes], tuple[int, int]]:
    folder.mkdir()
    told: list[tuple[int, int]] = []
    paths = codegen.objects(units, folder, store, processes, lambda *n: told.append(n))
    (counts,) = told
    return {key: path.read_bytes() for key, path in paths.items()}, counts


def test_one_object_for_equal_functions_in_any_number_of_processes(tmp_path: Path) -> None:
    units = _units(16, 24, 16, 40)
    assert units[0].key == units[2].key
    store = Cache(tmp_path / "store")
    cold, counts = _objects(units, tmp_path / "cold", store, 2)
    assert counts == (3, 3) and store.usage().entries == 3
    warm, counts = _objects(units[:1], tmp_path / "warm", store, 2)
    assert counts == (0, 1)
    alone, counts = _objects(units[::-1], tmp_path / "alone", Cache(None), 1)
    assert counts == (3, 3)
    assert alone == cold and warm.items() <= cold.items()
    (entry, *_) = (tmp_path / "store").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    again, counts = _objects(units, tmp_path / "again", store, 2)
    assert counts == (1, 3) and again == cold


def test_a_key_names_all_that_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (unit,) = _units(16)
    work = Gemm(4, 16, 16, "f32", "f32", "f32")
    keys = {unit.key}
    for other in (Gemm(5, 16, 16, "f32", "f32", "f32"), Gemm(4, 16, 17, "f32", "f32", "f32")):
        choice = registry.select(other, MACHINE)
        keys.add(codegen.kernel_unit(codegen.stub(choice, "test")[0], choice, MACHINE).key)
    choice = registry.select(work, MACHINE)
    symbol = codegen.stub(choice, "test")[0]
    assert codegen.kernel_unit(symbol, choice, MACHINE).key == unit.key
    keys.add(codegen.kernel_unit(symbol, choice, TARGETS["x86-64-v4"]).key)
    keys.add(codegen.kernel_unit(f"{symbol}x", choice, MACHINE).key)
    monkeypatch.setattr(codegen, "_with_imports", lambda _: "changed")
    keys.add(codegen.kernel_unit(symbol, choice, MACHINE).key)
    assert len(keys) == 6


def test_a_stub_is_not_folded() -> None:
    choice = registry.select(Gemm(4, 4, 4, "f32", "f32", "f32"), MACHINE)
    symbol, stub = codegen.stub(choice, "test")
    builder = relax.BlockBuilder()
    kernel = builder.add_func(stub, symbol)
    assert builder.add_func(codegen.stub(choice, "test")[1], symbol).same_as(kernel)
    ones = relax.const(np.ones((4, 4), np.float32))
    with builder.function("main", []):
        with builder.dataflow():
            type_ = relax.TensorType((4, 4), "float32")
            value = builder.emit(relax.call_tir(kernel, [ones, ones], out_ty=type_))
            result = builder.emit_output(relax.op.nn.relu(value))
        builder.emit_func_output(result)
    mod, _ = legalize.fuse(builder.get(), MACHINE)
    functions, program = aot.lower(mod, {}, lambda _: 0)
    assert [step.name.partition("_")[0] for step in program.steps] == ["gemm", "relu"]
    assert set(functions) == {"main", "plan", *(step.name for step in program.steps)}


ERRORS = [
    ScheduleError("gemm: mr=99. Fix: less", "DC1101"),
    UnsupportedError([Problem("DC3150", "node", "found", "fix")]),
    MemoryError("no more"),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_an_error_in_a_child_is_the_callers(tmp_path: Path, error: Exception) -> None:
    def fail() -> Any:
        raise error

    units = [*_units(16, 24), codegen.Unit(KEYS[0], MACHINE, fail)]
    with pytest.raises(type(error)) as caught:
        codegen.objects(units[::-1], tmp_path, Cache(None), 2)
    assert str(caught.value) == str(error) and "fail" in str(caught.value.__cause__)
    assert getattr(caught.value, "code", "") == getattr(error, "code", "")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("how", ["abort", "exit"])
def test_a_child_that_ends_is_a_crash(tmp_path: Path, how: str) -> None:
    def end() -> Any:
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)

    units = [*_units(16), codegen.Unit(KEYS[0], MACHINE, end), *_units(24, 40)]
    with pytest.raises(codegen.Crash) as caught:
        codegen.objects(units, tmp_path, Cache(None), 3)
    assert caught.value.code == (3 if how == "exit" else -signal.SIGKILL)
    assert multiprocessing.active_children() == []


WORKER = """
from dccompile import codegen, pipeline, worker
def crash(*_):
    raise codegen.Crash(CODE)
pipeline.generate = crash
worker._generate([], [], None)
"""


@pytest.mark.parametrize("code", [-signal.SIGKILL, 3])
def test_the_compiler_ends_as_its_child_did(code: int) -> None:
    script = WORKER.replace("CODE", str(int(code)))
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == code


# ---- models ----


def _compiled(model: onnx.ModelProto, path: Path, **options: Any) -> tuple[bytes, int, int]:
    """The artifact's bytes, functions compiled, functions from the cache."""
    events: list[dict[str, Any]] = []
    dc.compile(model, targets="x86-64-v3", progress=events.append, **options).save(path)
    (told,) = [e for e in events if "functions" in e]
    return path.read_bytes(), told["functions"], told["cached"]


def test_the_cache_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.mlp((13, 36, 36, 36, 3))
    path = tmp_path / "m.dcm"
    monkeypatch.setenv(cache.VARIABLE, "off")
    plain, total, hits = _compiled(model, path)
    assert total > 3 and hits == 0
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "store"))
    assert _compiled(model, path) == (plain, total, 0)
    assert _compiled(model, path) == (plain, 0, total)


def test_models_share_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "store"))
    path = tmp_path / "m.dcm"
    _, total, _ = _compiled(graphs.mlp((20, 33, 33, 5), seed=1), path)
    assert total == 4  # main and plan, and three layers
    model = graphs.mlp((20, 33, 33, 33, 5), seed=2)
    _, missing, hits = _compiled(model, path)
    assert (missing, hits) == (1, 3), "the layers are the same, main is another"
    x = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    (want,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    np.testing.assert_allclose(dc.load(path)(x)["y"], want, atol=1e-5)
