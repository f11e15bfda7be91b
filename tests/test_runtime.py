"""Loading and calling: every way to call, every wrong call, threads, forks, foreign tensors."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dccompile as dc
from dccompile import machine
from dccompile.runtime import artifact, ffi
from dccompile.runtime import loader as runtime
from dccompile.runtime.loader import Module, TensorSpec

W = np.arange(16, dtype=np.float32)
Paths = dict[str, Path]


@pytest.fixture
def affine(artifacts: Paths) -> Module:
    return runtime.load(artifacts["affine"], threads=1)


@pytest.fixture
def mixed(artifacts: Paths) -> Module:
    return runtime.load(artifacts["mixed"], threads=1)


def matrix(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 16), np.float32)


def shifted(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins `offset` bytes past a 64-byte boundary."""
    raw = np.zeros(array.nbytes + 192, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def feeds(rows: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(rows)
    return {
        "a": np.array(2.0, np.float32),
        "b": rng.integers(0, 9, (rows, 4)),
        "c": rng.integers(0, 9, (rows, 8)).astype(np.float32),
    }


def check_mixed(outputs: Any, given: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(outputs["total"], given["a"] * given["c"].sum(1))
    assert outputs["hits"] == given["b"].sum()


# Calls


def test_signature(mixed: Module) -> None:
    assert mixed.inputs == (
        TensorSpec("a", "float32", ()),
        TensorSpec("b", "int64", ("N", 4)),
        TensorSpec("c", "float32", ("N", 8)),
    )
    assert [str(spec) for spec in mixed.outputs] == ["float32[N]", "int64[]"]
    assert repr(mixed.inputs[2]) == "c: float32[N,8]"
    assert "mixed" in repr(mixed)


def test_every_way_to_give_inputs(mixed: Module) -> None:
    given = feeds()
    a, b, c = given.values()
    for outputs in (
        mixed(a, b, c),
        mixed(a, c=c, b=b),
        mixed(**given),
        mixed(given),
        mixed(dict(reversed(given.items()))),
        mixed({"a": a, "b": b}, c=c),
    ):
        check_mixed(outputs, given)
    total, hits = mixed.run(None, given)
    check_mixed({"total": total, "hits": hits}, given)
    assert mixed.run(["hits"], given) == [hits]


def test_outputs_are_tuple_and_mapping(mixed: Module) -> None:
    outputs = mixed(**feeds())
    total, hits = outputs
    assert isinstance(outputs, tuple) and len(outputs) == 2
    assert outputs["total"] is total is outputs[0] and outputs[-1] is hits
    assert [*outputs.keys()] == ["total", "hits"] and "hits" in outputs and "x" not in outputs
    assert dict(outputs)["hits"] is hits and next(iter(outputs.values())) is total
    assert outputs.get("hits") is hits and outputs.get("none", 7) == 7
    with pytest.raises(KeyError, match="total, hits"):
        outputs["none"]
    again = pickle.loads(pickle.dumps(outputs))
    assert again["hits"] == hits and type(again).__name__ == "Outputs"
    assert "total=" in repr(outputs)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 1000])
def test_any_size_and_alignment(affine: Module, rows: int) -> None:
    x = matrix(rows)
    for offset in (0, 4, 16, 48):
        y = affine(shifted(x, offset))["y"]
        np.testing.assert_array_equal(y, 2 * x + W)
        assert y.__array_interface__["data"][0] % 64 == 0 and y.flags.writeable


def test_outputs_belong_to_the_caller(affine: Module) -> None:
    first = affine(matrix(5, 1))["y"]
    kept = first.copy()
    second = affine(matrix(5, 2))["y"]
    second[...] = -1
    np.testing.assert_array_equal(first, kept)
    del affine
    gc.collect()
    np.testing.assert_array_equal(first, kept)


def test_unusual_but_right_arrays(affine: Module, tmp_path: Path) -> None:
    x = matrix(4)
    expected = 2 * x + W
    locked = shifted(x, 0)
    locked.flags.writeable = False
    np.save(tmp_path / "x.npy", x)
    packed = np.zeros(4, [("pad", "i1"), ("row", "f4", 16)])["row"]
    packed[...] = x
    for given in (
        locked,
        np.frombuffer(x.tobytes(), np.float32).reshape(4, 16),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
        np.asarray(x, dtype=np.dtype("f4", metadata={"m": 1})),
        np.ascontiguousarray(packed),
    ):
        np.testing.assert_array_equal(affine(given)["y"], expected)
    one_row = matrix(8)[::2][:1]
    assert one_row.flags.c_contiguous
    np.testing.assert_array_equal(affine(one_row)["y"], 2 * one_row + W)


def test_a_new_shape_every_time(affine: Module) -> None:
    for rows in range(2100):
        assert affine(np.ones((rows, 16), np.float32))["y"].shape == (rows, 16)
    assert len(affine._shapes) <= 1024 and len(affine._signature._plans) <= 1024


# Wrong calls

X = np.zeros((3, 16), np.float32)
FEEDS = feeds()


class Liar:
    """A tensor whose DLPack export fails, or is on another device."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        raise ZeroDivisionError("no\nway")


WRONG = {
    "float64": (
        X.astype("f8"),
        "expected float32[N,16], got float64[3,16]; use x.astype('float32')",
    ),
    "big endian": (X.astype(">f4"), "got >f4[3,16]; use x.astype('float32')"),
    "objects": (X.astype(object), "got object[3,16]"),
    "rank": (X[0], "got float32[16]; give it 2 dimensions"),
    "0-d": (np.zeros((), np.float32), "got float32[]; give it 2 dimensions"),
    "dim": (X[:, :8].copy(), "got float32[3,8]; dimension 1 must be 16"),
    "not contiguous": (X[:, ::-1], "row-major order"),
    "columns first": (np.asfortranarray(X), "use numpy.ascontiguousarray(x)"),
    "broadcast": (np.broadcast_to(X[0], (3, 16)), "use numpy.ascontiguousarray(x)"),
    "masked": (np.ma.masked_array(X), "no array"),
    "none": (None, "got None, which is no array"),
    "text": ("x", "a builtins.str, which is no array"),
    "list": (X.tolist(), "use numpy.asarray(x, dtype='float32')"),
    "number": (1.0, "a builtins.float"),
    "failing": (Liar((1, 0)), "cannot be lent through DLPack: ZeroDivisionError: no;"),
    "elsewhere": (Liar((2, 1)), "DLPack device (2, 1); move it to the CPU first"),
    "nonsense": (Liar(None), "cannot be lent through DLPack: TypeError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_array(affine: Module, case: str) -> None:
    value, said = WRONG[case]
    with pytest.raises(dc.InputError) as caught:
        affine(value)
    assert str(caught.value).startswith("input 'x': ") and said in str(caught.value)
    assert "\n" not in str(caught.value) and caught.value.code.startswith("DC21")
    np.testing.assert_array_equal(affine(X)["y"], np.broadcast_to(W, (3, 16)))


NAMES = {
    "unknown": ((), {**FEEDS, "z": X}, "no input is called 'z'"),
    "missing": ((), {"a": X}, "input 'b' is missing"),
    "none": ((), {}, "input 'a' is missing"),
    "twice": ((FEEDS["a"],), FEEDS, "input 'a' is given twice"),
    "too many": ((X,) * 4, {}, "got 4 inputs for 3"),
    "dict and name": ((FEEDS,), {"a": X}, "input 'a' is given twice"),
    "dict of others": (({"p": X, "q": X, "r": X},), {}, "no input is called 'p'"),
    "dict with number": (({1: X},), {}, "no input is called 1"),
}


@pytest.mark.parametrize("case", NAMES)
def test_wrong_names(mixed: Module, case: str) -> None:
    args, named, said = NAMES[case]
    with pytest.raises(dc.InputError) as caught:
        mixed(*args, **named)
    assert said in str(caught.value) and "c: float32[N,8]" in str(caught.value)


def test_wrong_output_name(mixed: Module) -> None:
    with pytest.raises(dc.InputError, match="no output is called 'z'; the outputs are total"):
        mixed.run(["z"], FEEDS)
    with pytest.raises(dc.InputError, match="no output is called 'z'"):
        mixed(**FEEDS, out={"z": X})
    with pytest.raises(dc.InputError, match="a dict"):
        mixed(**FEEDS, out=X)


def test_symbols_must_agree_and_lie_in_range(mixed: Module) -> None:
    short = {**FEEDS, "c": FEEDS["c"][:2]}
    said = r"input 'c': N is 2 in float32\[2,8\], but 3 in input 'b', int64\[3,4\]; make them equal"
    with pytest.raises(dc.InputError, match=said):
        mixed(**short)
    for rows in (0, 65):
        with pytest.raises(dc.InputError, match=rf"got int64\[{rows},4\]; N must be 1 to 64"):
            mixed(**feeds(rows))
    check_mixed(mixed(**feeds(64)), feeds(64))


def test_zero_dims(mixed: Module) -> None:
    with pytest.raises(dc.InputError, match=r"expected float32\[\], got float32\[1\]"):
        mixed(np.ones(1, np.float32), FEEDS["b"], FEEDS["c"])
    assert mixed(**FEEDS)["hits"].shape == ()


def test_errors_of_compiled_code(artifacts: Paths, mixed: Module) -> None:
    bad = {**FEEDS, "b": FEEDS["b"] - 100}
    bound = mixed.bind(bad)
    for call in (lambda: mixed(**bad), lambda: mixed(bad), bound):
        with pytest.raises(dc.InputError) as caught:
            call()
        assert caught.value.code == "DC2110"
        assert str(caught.value) == "input 'b': negative. Fix: give others"
    check_mixed(mixed(**FEEDS), FEEDS)
    x = np.arange(5000)
    for threads, place in itertools.product((1, 2, 4), (0, 2600, 4999)):
        checked = runtime.load(artifacts["checked"], threads=threads)
        np.testing.assert_array_equal(checked(x)["y"], x)
        wrong = x.copy()
        wrong[place] = -1
        with pytest.raises(dc.InputError) as caught:
            checked(wrong)
        assert caught.value.code == "DC2111"
        np.testing.assert_array_equal(checked(x)["y"], x)


# Buffers of the caller


@pytest.mark.parametrize("offset", [0, 16])
def test_out(mixed: Module, offset: int) -> None:
    total, hits = shifted(np.zeros(3, np.float32), offset), shifted(np.zeros((), np.int64), offset)
    outputs = mixed(**FEEDS, out={"total": total, "hits": hits})
    assert outputs["total"] is total and outputs["hits"] is hits
    check_mixed(outputs, FEEDS)
    total[...] = 0
    check_mixed(mixed(FEEDS, out={"total": total}), FEEDS)
    assert total.any()


@pytest.mark.parametrize("offset", [0, 4])
def test_bind(affine: Module, offset: int) -> None:
    x, y = (shifted(np.zeros((6, 16), np.float32), offset) for _ in range(2))
    bound = affine.bind(x=x, y=y)
    for seed in range(3):
        x[...] = matrix(6, seed)
        assert bound()["y"] is y
        np.testing.assert_array_equal(y, 2 * x + W)
    alone = affine.bind(x=x)
    assert alone.outputs["y"] is not y and (alone()["y"] == y).all()
    other = affine.bind({"x": x}, {"y": y})
    del affine
    gc.collect()
    assert (other()["y"] == 2 * x + W).all()


def wrong_buffers() -> dict[str, tuple[Any, str]]:
    locked = np.zeros((3, 16), np.float32)
    locked.flags.writeable = False
    return {
        "dtype": (np.zeros((3, 16)), "output 'y': expected float32[N,16], got float64[3,16]"),
        "shape": (np.zeros((4, 16), np.float32), "this call makes float32[3, 16]"),
        "read-only": (locked, "read-only"),
        "strided": (np.zeros((3, 32), np.float32)[:, ::2], "row-major"),
        "none": (None, "no array"),
        "foreign": (Liar((2, 0)), "move it to the CPU"),
    }


@pytest.mark.parametrize("case", wrong_buffers())
def test_wrong_output_buffer(affine: Module, case: str) -> None:
    buffer, said = wrong_buffers()[case]
    for call in (lambda: affine(X, out={"y": buffer}), lambda: affine.bind(x=X, y=buffer)):
        with pytest.raises(dc.InputError) as caught:
            call()
        assert said in str(caught.value) and str(caught.value).startswith("output 'y': ")


def test_overlapping_buffers(affine: Module) -> None:
    both = shifted(np.zeros((7, 16), np.float32), 0)
    for x, y in ((both[:3], both[:3]), (both[:4], both[3:]), (both[3:], both[:4])):
        with pytest.raises(dc.InputError, match="overlaps"):
            affine(x, out={"y": y})
        with pytest.raises(dc.InputError, match="overlaps"):
            affine.bind(x=x, y=y)
    affine(both[:3], out={"y": both[3:6]})


def test_bind_names(affine: Module) -> None:
    for given, said in (
        ({"y": X}, "input 'x' is missing"),
        ({"x": X, "z": X}, "no output is called 'z'"),
    ):
        with pytest.raises(dc.InputError, match=said):
            affine.bind(**given)
    with pytest.raises(dc.InputError, match="use bind"):
        affine.bind({"x": X}, x=X)


def test_a_bound_call_is_for_one_thread(affine: Module) -> None:
    bound = affine.bind(x=X)
    with bound._busy, pytest.raises(dc.Error, match="bind once for every thread"):
        bound()
    bound()


# Threads


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_python_threads_call_one_module(artifacts: Paths, threads: int) -> None:
    module = runtime.load(artifacts["affine"], threads=threads)
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for i in range(150):
            x = matrix(1 + (i * 37 + seed * 11) % 300, seed * 1000 + i)
            if not np.array_equal(module(x)["y"], 2 * x + W):
                wrong.append((seed, i))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


POOL = """
import os, sys
import numpy as np
from dccompile.runtime.loader import load
tasks = lambda: len(os.listdir("/proc/self/task"))
x = np.ones((5000, 16), np.float32)
before, cores = tasks(), os.sched_getaffinity(0)
modules = [load(sys.argv[1], threads=n) for n in (1, 3, 2, 5)]
counts = []
for module in modules:
    assert (module(x)[0] == 2 + np.arange(16)).all()
    counts.append(tasks() - before)
assert os.sched_getaffinity(0) == cores
print(counts)
"""


def test_worker_threads_are_as_many_as_asked_for(artifacts: Paths) -> None:
    assert python(POOL, artifacts["affine"]) == "[0, 2, 2, 4]"


def test_default_threads(artifacts: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DCCOMPILE_NUM_THREADS", "3")
    assert runtime.load(artifacts["negate"]).threads == 3
    monkeypatch.setenv("DCCOMPILE_NUM_THREADS", "many")
    with pytest.raises(dc.Error, match="DCCOMPILE_NUM_THREADS"):
        runtime.load(artifacts["negate"])


FORK = """
import os, signal, sys, threading, time
import numpy as np
from dccompile.runtime.loader import load
module = load(sys.argv[1], threads=int(sys.argv[2]))
x = np.random.default_rng(0).random((4000, 16), np.float32)
def call():
    for _ in range(10):
        assert (module(x)[0] == 2 * x + np.arange(16, dtype="f4")).all()
def fork(depth):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        call()
        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        if depth:
            fork(depth - 1)
        sys.exit(5)
    assert os.waitpid(child, 0)[1] == 5 << 8
stop = threading.Event()
def others():
    while not stop.is_set(): call()
other = threading.Thread(target=others)
call()
fork(2)
time.sleep(0.1)  # the workers sleep now
fork(1)
other.start()
for _ in range(5): fork(0)
stop.set()
other.join()
call()
print("good")
"""


@pytest.mark.parametrize("threads", [1, 2, 6])
def test_fork(artifacts: Paths, threads: int) -> None:
    """With workers spinning, asleep, and in the middle of another thread's loop."""
    assert python(FORK, artifacts["affine"], threads) == "good"


# Foreign tensors


def test_torch(affine: Module, mixed: Module) -> None:
    torch = pytest.importorskip("torch")
    x = torch.rand(5, 16)
    expected = 2 * x + torch.arange(16)
    y = affine(x)["y"]
    assert isinstance(y, torch.Tensor) and torch.equal(y, expected)
    assert torch.equal(affine(x=x[1:])["y"], expected[1:])  # 64 bytes further: no copy
    rows = torch.rand(6 * 16 + 1)[1:].reshape(6, 16)  # 4 bytes further
    assert torch.equal(affine(rows)["y"], 2 * rows + torch.arange(16))
    assert affine(torch.empty(0, 16))["y"].shape == (0, 16)
    for buffer in (torch.empty(5, 16), torch.empty(81)[1:].reshape(5, 16)):
        assert affine(x, out={"y": buffer})["y"] is buffer and torch.equal(buffer, expected)
    bound = affine.bind(x=x, y=(z := torch.zeros(5, 16)))
    x += 1
    assert bound()["y"] is z and torch.equal(z, 2 * x + torch.arange(16))
    given = {name: torch.from_numpy(value) for name, value in feeds().items()}
    check_mixed({k: v.numpy() for k, v in mixed(given).items()}, feeds())
    first_decides = mixed(feeds()["a"], given["b"], given["c"])
    assert isinstance(first_decides["total"], np.ndarray)


def test_torch_refused(affine: Module) -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(3, 16)
    for given, said in (
        (x.double(), r"got float64\[3,16\]; convert it to float32 first"),
        (x.bfloat16(), r"got bfloat16\[3,16\]"),
        (x[:, :8], "contiguous"),
        (x.T.contiguous().T, "contiguous"),
        (torch.zeros(16), "give it 2 dimensions"),
        (torch.zeros(3, 16, requires_grad=True), "detach"),
        (torch._neg_view(x), "resolve_neg"),
        (x.to_sparse(), "cannot be lent"),
        (torch.empty(3, 16, device="meta"), "cannot be lent|move it"),
    ):
        with pytest.raises(dc.InputError, match=said):
            affine(given)


def test_tvm_ffi_tensor(affine: Module) -> None:
    x = shifted(matrix(3), 0)
    given = ffi.import_tvm_ffi().from_dlpack(x)
    y = affine(given)["y"]
    assert type(y) is type(given)
    np.testing.assert_array_equal(np.from_dlpack(y), 2 * x + W)


# Processes of their own


def python(code: str, *args: Any) -> str:
    """Runs code in a fresh interpreter; returns what it prints."""
    root = str(Path(dc.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SERVE = """
import sys
sys.modules.update(dict.fromkeys(["tvm", "onnx", "onnxruntime", "openvino"]))
import dccompile as dc
light = {"numpy", "tvm_ffi", "torch"} & set(sys.modules)
module = dc.load(sys.argv[1])
import numpy as np
x = np.ones((4, 16), np.float32)
assert (module(x)["y"] == 2 + np.arange(16)).all()
assert "torch" not in sys.modules
try:
    import torch
    y = module(torch.ones(4, 16))["y"]
    assert type(y) is torch.Tensor and torch.equal(y, 2 + torch.arange(16.).expand(4, 16))
except ModuleNotFoundError:
    pass
print(light, sorted(m for m in sys.meta_path if "Torch" in repr(m)))
"""


def test_a_serving_host_needs_no_compiler(artifacts: Paths) -> None:
    """tvm and onnx cannot be imported, torch is not, until the user does."""
    assert python(SERVE, artifacts["affine"]) == "set() []"


def test_beside_tvm(artifacts: Paths) -> None:
    """TVM imported after a module was loaded, and a module loaded after TVM."""
    code = """
import sys
import numpy as np
from dccompile.runtime.loader import load
x = np.ones((4000, 16), np.float32)
for _ in range(2):
    assert (load(sys.argv[1], threads=2)(x)[0] == 2 + np.arange(16)).all()
    import tvm
print("good")
"""
    assert python(code, artifacts["affine"]) == "good"


def test_nothing_is_left_behind(artifacts: Paths) -> None:
    """No file, descriptor or mapping of a module that is gone."""

    def state() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("x86-64-v3") + maps.count("affine.dcm")

    runtime.load(artifacts["affine"])(X)
    before = state()
    for _ in range(20):
        module = runtime.load(artifacts["affine"])
        module(X)
        module.bind(x=X)()
    del module
    assert state() == before


def test_artifacts_do_not_meet(artifacts: Paths, tmp_path: Path) -> None:
    """Loaded at once, and one after the other under the same name and descriptor."""
    negate, affine = (runtime.load(artifacts[name]) for name in ("negate", "affine"))
    v = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(negate(v)["y"], -v)
    np.testing.assert_array_equal(affine(X)["y"], np.broadcast_to(W, (3, 16)))
    path = tmp_path / "model.dcm"
    for name, x, y in (("affine", X, X + W), ("negate", v, -v)) * 3:
        path.unlink(missing_ok=True)
        path.write_bytes(artifacts[name].read_bytes())
        np.testing.assert_array_equal(runtime.load(path)(x)["y"], y)
    np.testing.assert_array_equal(negate(v)["y"], -v)


def test_weights_are_shared_between_processes(artifacts: Paths) -> None:
    """The mapping of the weights is private to nobody: no page of it was copied."""
    module = runtime.load(artifacts["affine"])
    module(X)
    blocks = Path("/proc/self/smaps").read_text().split(str(artifacts["affine"]))[1:]
    dirty = [line for block in blocks for line in block.splitlines()[:24] if "_Dirty" in line][:2]
    assert blocks and all(line.split()[1] == "0" for line in dirty)


# Loading


def test_no_variant_for_this_cpu(artifacts: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "host_features", lambda: frozenset({"sse2"}))
    with pytest.raises(dc.IncompatibleError, match="x86-64-v3 needs avx2, fma") as caught:
        runtime.load(artifacts["affine"])
    assert caught.value.code == "DC4008" and caught.value.exit_code == 4


def rewrite(source: Path, path: Path, manifest: Any = None, entries: Any = None) -> Path:
    """A copy with other facts in its manifest or other entries, and the right hashes."""
    with artifact.read(source) as found:
        kept = {n: bytes(found.entry(n)) for n in found.manifest["entries"]}
        facts = {**found.manifest, **(manifest or {})}
    artifact.write(path, facts, {**kept, **(entries or {})})
    return path


def test_the_first_variant_that_runs_is_taken(artifacts: Paths, tmp_path: Path) -> None:
    with artifact.read(artifacts["affine"]) as found:
        usual = found.manifest["variants"][0]
    variants = [
        {**usual, "target": "future", "features": ["avx4096"]},
        {**usual, "target": "good"},
        {**usual, "target": "worse"},
    ]
    path = rewrite(artifacts["affine"], tmp_path / "v.dcm", {"variants": variants})
    assert runtime.load(path).target == "good"
    assert runtime.load(path, target="worse").target == "worse"
    with pytest.raises(dc.IncompatibleError, match="future needs avx4096"):
        runtime.load(path, target="future")
    with pytest.raises(dc.IncompatibleError, match="no variant 'cuda', it has future, good, worse"):
        runtime.load(path, target="cuda")


def test_libraries_that_do_not_load(artifacts: Paths, tmp_path: Path) -> None:
    library = "lib/x86-64-v3.so"
    with artifact.read(artifacts["affine"]) as found:
        pool, code = bytes(found.entry(artifact.RUNTIME)), bytes(found.entry(library))
    for image in (b"", b"no library", code[:3000], pool):
        path = rewrite(artifacts["affine"], tmp_path / "l.dcm", entries={library: image})
        with pytest.raises(dc.IncompatibleError, match="Fix: ") as caught:
            runtime.load(path)
        assert caught.value.code == "DC4011" and str(path) in str(caught.value)


def test_worker_threads_that_do_not_load(
    artifacts: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with artifact.read(artifacts["affine"]) as found:
        other = bytes(found.entry("lib/x86-64-v3.so"))
    monkeypatch.setattr(ffi, "_pool", None)
    for image in (b"no library", other):
        path = rewrite(artifacts["affine"], tmp_path / "p.dcm", entries={artifact.RUNTIME: image})
        with pytest.raises(dc.IncompatibleError, match="runtime library does not load"):
            runtime.load(path)


def test_another_ffi(artifacts: Paths, tmp_path: Path) -> None:
    path = rewrite(artifacts["affine"], tmp_path / "f.dcm", {"runtime": {"tvm_ffi": "0.9.1"}})
    with pytest.raises(dc.IncompatibleError, match=r"made for tvm_ffi 0\.9\.1"):
        runtime.load(path)


def test_damaged(artifacts: Paths, tmp_path: Path) -> None:
    whole = bytearray(artifacts["affine"].read_bytes())
    whole[5000] ^= 1
    path = tmp_path / "d.dcm"
    path.write_bytes(whole)
    with pytest.raises(dc.IncompatibleError, match="SHA-256"):
        runtime.load(path)
    for wrong in (None, 3, tmp_path, tmp_path / "missing.dcm"):
        with pytest.raises(dc.IncompatibleError):
            runtime.load(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"threads": n} for n in (0, -1, True, 2.0, "2", 10**6)])
def test_wrong_threads(artifacts: Paths, option: Any) -> None:
    with pytest.raises(dc.Error, match="not a number of threads") as caught:
        runtime.load(artifacts["affine"], **option)
    assert caught.value.exit_code == 2


def test_wrong_device(artifacts: Paths) -> None:
    for device in ("gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", None, 0):
        with pytest.raises(dc.Error, match="allowed are cpu, cuda and cuda:<number>"):
            runtime.load(artifacts["affine"], device=device)
    with pytest.raises(dc.IncompatibleError, match="no variant for a GPU") as caught:
        runtime.load(artifacts["affine"], device="cuda:0")
    assert caught.value.code == "DC4027" and "use device='cpu'" in str(caught.value)


def test_code_in_anonymous_memory_may_be_forbidden(
    artifacts: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", deny)
    assert runtime.load(artifacts["affine"])(X)["y"].shape == (3, 16)
