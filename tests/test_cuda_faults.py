"""What goes wrong with GPUs: no driver, an old one, no memory, dead contexts, forks, exits.

Each case is a process of its own, whose driver is the emulator's and fails on demand.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import cuda_artifacts
import emulate

import dccompile as dc

Paths = dict[str, Path]
Child = Callable[..., list[str]]

START = """
import ctypes, gc, os, sys, threading
import numpy as np
import dccompile as dc
from dccompile.errors import UsageError
from dccompile.runtime import device, driver
AFFINE, CHECKED = sys.argv[1:3]
X = np.ones((3, 16), np.float32)
Y = 2 * X + np.arange(16, dtype=np.float32)
def load(path=AFFINE, **options):
    return dc.load(path, device="cuda", **options)
def right(module, x=X):
    return bool((module(x)["y"] == 2 * x + np.arange(16, dtype=np.float32)).all())
def tell(call):
    try:
        print(call())
    except dc.Error as error:
        print(type(error).__name__, error.code, error)
"""


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return emulate.toolkit(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def paths(toolkit: Any, artifacts: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    with pytest.MonkeyPatch.context() as patch:
        toolkit.patch(patch)
        return cuda_artifacts.make_both(tmp_path_factory.mktemp("cuda"), artifacts["affine"])


@pytest.fixture
def child(toolkit: Any, paths: Paths) -> Callable[..., list[str]]:
    """Gives the lines that code prints after START, with these settings of the emulator."""

    def run(code: str, installed: bool = True, complaint: str = "", **settings: Any) -> list[str]:
        environment = toolkit.environment(**settings)
        environment["PYTHONPATH"] = str(Path(dc.__file__).parents[1])
        if not installed:
            del environment["LD_LIBRARY_PATH"]
        done = subprocess.run(
            [sys.executable, "-c", START + code, str(paths["affine"]), str(paths["checked"])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert complaint in done.stderr if complaint else not done.stderr
        return done.stdout.splitlines()

    return run


LOADING: dict[str, tuple[dict[str, Any], str, str]] = {
    # settings, code, words of the message
    "no device": ({"devices": 0}, "DC4025", "no GPU is visible. Fix: load(device='cpu')"),
    "old driver": ({"driver": 11080}, "DC4024", "needs a driver of CUDA 12.0"),
    "old driver for PTX": (
        {"arch": 100, "driver": 12020}, "DC4024", "needs a driver of CUDA 12.4, this one is of"
    ),
    "old architecture": (
        {"arch": 75}, "DC4026", "with sm_75: it has cuda:sm_80, cuda:sm_90. Fix: use a GPU of"
    ),
    "driver mismatch": ({"fail": "cuInit:1:803"}, "DC4024", "does not start"),
    "stub": ({"fail": "cuInit:1:34"}, "DC4020", "does not start"),
    "unknown start": ({"fail": "cuInit:1:999"}, "DC4030", "CUDA_ERROR_UNKNOWN (999)"),
    "unknown PTX": ({"fail": "cuModuleLoadData:1:222"}, "DC4024", "Fix: update the driver"),
    "image of another GPU": (
        {"fail": "cuModuleLoadData:1:209"}, "DC4029", "k.cubin does not load on cuda:0: CUDA_ERROR"
    ),
    "no such kernel": ({"fail": "cuModuleGetFunction:2:500"}, "DC4029", "has no kernel 'main_"),
    "no memory for kernels": (
        {"fail": "cuModuleLoadData:1:2"}, "DC4021", "out of device memory when loading kernels"
    ),
    "no memory for weights": (
        {"fail": "cuMemAlloc:1:2"}, "DC4021", "allocating 64 bytes for the weights: 429"
    ),
    "no pinned memory": (
        {"fail": "cuMemHostAlloc:1:2"}, "DC4021", "bytes of page-locked memory cannot be had"
    ),
    "no context": ({"fail": "cuDevicePrimaryCtxRetain:1:46"}, "DC4022", "making a context"),
    "dead while loading": (
        {"fail": "cuModuleLoadData:1:700"}, "DC4023", "is lost: CUDA_ERROR_ILLEGAL_ADDRESS"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADING)
def test_loading(child: Child, case: str) -> None:
    settings, code, words = LOADING[case]
    (line,) = child("tell(load)", **settings)
    kind = "Error" if code in ("DC4022", "DC4023") else "IncompatibleError"
    assert line.startswith(f"{kind} {code} ") and words in line and "Fix: " in line
    assert dc.Error("", code).exit_code == 4


def test_no_driver(child: Child) -> None:
    code = "tell(load); tell(lambda: right(dc.load(AFFINE)))"
    line, right = child(code, installed=False)
    assert line == (
        "IncompatibleError DC4020 no NVIDIA driver: libcuda.so.1 cannot be loaded. "
        "Fix: install the driver, or load(device='cpu')"
    )
    assert right == "True"


@pytest.mark.parametrize(
    ("arch", "target"),
    [(80, "cuda:sm_80"), (89, "cuda:sm_80"), (90, "cuda:sm_90"), (120, "cuda:sm_90")],
)
def test_the_variant_fits_the_gpu(child: Child, arch: int, target: str) -> None:
    code = "m = load(); print(m.target); tell(lambda: right(m))"
    assert child(code, arch=arch) == [target, "True"]


def test_targets_and_devices(child: Child) -> None:
    code = """
tell(lambda: load(target="cuda:sm_80").target)
tell(lambda: load(target="cuda:sm_90"))
tell(lambda: load(target="cuda:sm_70"))
tell(lambda: dc.load(AFFINE, target="cuda:sm_80"))
tell(lambda: dc.load(CHECKED))
tell(lambda: dc.load(AFFINE, device="cuda:1").device)
tell(lambda: dc.load(AFFINE, device="cuda:2"))
tell(lambda: right(dc.load(AFFINE, device="cuda:1")) and right(load()))
"""
    lines = child(code, devices=2)
    assert [line.split()[0] for line in lines] == [
        "cuda:sm_80", *["IncompatibleError"] * 4, "cuda:1", "IncompatibleError", "True"
    ]  # fmt: skip
    for line, words in (
        (lines[1], "DC4026"),
        (lines[1], "compile the model with --target cuda:sm_80 too"),
        (lines[2], "DC4007"),
        (lines[3], "is for a GPU. Fix: load(device='cuda')"),
        (lines[4], "DC4028"),
        (lines[6], "DC4025 cuda:2: 2 GPUs are visible. Fix: name one of these"),
    ):
        assert words in line


def test_no_memory_at_a_call(child: Child) -> None:
    """The call says what it needs; the module goes on."""
    code = """
m = load()
for _ in range(2):
    tell(lambda: m(np.ones((100_000, 16), np.float32)))
    tell(lambda: right(m))
"""
    lines = child(code, memory=1)
    assert lines[1::2] == ["True", "True"]
    for line in lines[::2]:
        assert line.startswith("IncompatibleError DC4021 cuda:0: out of device memory")
        assert "allocating 19200000 bytes for a call" in line and "of its 1048576 bytes" in line


def test_refused_launches(child: Child) -> None:
    """Of the first call, of the second one's capture and in its place, of two more."""
    code = """
m = load()
b = m.bind(x=X)
for _ in range(3): tell(lambda: right(m))
tell(b)
for _ in range(3): tell(lambda: right(m))
print((b()["y"] == Y).all())
"""
    lines = child(code, fail=",".join(f"cuLaunchKernel:{n}:701" for n in range(1, 6)))
    for line in lines[:4]:
        assert line.startswith("Error DC4022 cuda:0: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)")
        assert "when starting kernels" in line
    assert lines[4:] == ["True"] * 4


@pytest.mark.parametrize("name", ["cuStreamBeginCapture", "cuGraphInstantiateWithFlags"])
def test_without_capture(child: Child, name: str) -> None:
    code = """
m = load()
b = m.bind(x=X)
for _ in range(3): print(right(m), (b()["y"] == Y).all())
"""
    assert child(code, fail=f"{name}:1:801,{name}:2:801") == ["True True"] * 3


@pytest.mark.parametrize("function", ["cuGraphLaunch:1", "cuLaunchKernel:8", "cuMemcpyHtoDAsync:7"])
@pytest.mark.parametrize("error", [700, 716, 719])
def test_a_dead_context_stays_dead(child: Child, function: str, error: int) -> None:
    """Every later call of every module says so at once, and the process still ends in order.

    What fails is the second call of a module, in its capture or where it launches the graph.
    """
    code = """
m, c = load(), load(CHECKED)
b = m.bind(x=X)
m(X); b(); c(np.arange(4))
tell(lambda: m(X))
for call in (lambda: m(X), lambda: c(np.arange(4)), b, m.synchronize, load, lambda: m.bind(x=X)):
    tell(call)
print(right(dc.load(AFFINE)))
"""
    lines = child(code, fail=f"{function}:{error}")
    assert lines.pop() == "True"
    assert len(lines) == 7
    for line in lines:
        assert line.startswith("Error DC4023 cuda:0: the CUDA context of this process is lost: ")
        assert f"({error})" in line and line.endswith("Fix: start the process again")


def test_an_address_that_a_kernel_should_not_touch(child: Child) -> None:
    code = """
from dccompile.runtime.tensors import lend
m = load()
m(X)
other = load()
m._params = m._dlpack(lend(None, 1 << 20, (64,), np.dtype(np.uint8)))
m._lanes.clear()
tell(lambda: m(X))
tell(lambda: other(X))
"""
    lines = child(code, complaint="emulator: ")
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("Error DC4023 ") and "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in line


FORK = """
m = load()
b = m.bind(x=X)
right(m); b()
child = os.fork()
if not child:
    for call in (lambda: m(X), b, m.synchronize, lambda: m.bind(x=X), load):
        try:
            call()
        except UsageError as error:
            assert error.code == "DC2025" and "spawn" in str(error)
        else:
            raise AssertionError
    assert right(dc.load(AFFINE))
    del m, b, call
    gc.collect()
    sys.exit(5)
print(os.waitpid(child, 0)[1] >> 8, right(m), (b()["y"] == Y).all())
"""


def test_fork(child: Child) -> None:
    assert child(FORK) == ["5 True True"]


def test_fork_before_the_first_use(child: Child) -> None:
    code = """
child = os.fork()
good = right(load())
if child:
    print(good, os.waitpid(child, 0)[1] >> 8)
else:
    sys.exit(5 if good else 6)
"""
    assert child(code) == ["True 5"]


def test_the_interpreter_ends_in_order(child: Child) -> None:
    """With modules, tensors that others hold, and calls that nobody waited for."""
    code = """
from tvm_ffi import from_dlpack
m, c = load(), load(CHECKED)
kept = [m.bind(x=X)]
kept[0](); right(m)
gpu = device.find(0)
with gpu: x = gpu.lend("x", X.nbytes)
from dccompile.runtime.device_array import DeviceArray
x = DeviceArray(gpu, x, X.shape, X.dtype, 0)
sys.kept = [from_dlpack(m(x)["y"]), m(x)["y"].__dlpack__(), m, kept]
threading.Thread(target=lambda: right(m)).start()
print("end")
"""
    assert child(code) == ["end"]


def test_no_compiler_is_imported(child: Child) -> None:
    code = """
sys.modules.update(dict.fromkeys(["tvm", "onnx", "torch"]))
print(right(load()), "dccompile.cuda" in sys.modules)
"""
    assert child(code) == ["True False"]
