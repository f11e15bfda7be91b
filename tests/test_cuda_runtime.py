"""Models on a GPU: loading, calls with tensors of the host and of the device, graphs, errors.

The GPU is the emulator's, whose driver counts its calls, and with ``-m cuda`` a real one.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import cuda_artifacts
import emulate

import dccompile as dc
from dccompile.runtime import cuda_variant, device, device_array, driver, ffi
from dccompile.runtime.cuda_module import CudaModule
from dccompile.runtime.device_array import DeviceArray
from dccompile.runtime.loader import load

LIBRARY = driver.LIBRARY
W = np.arange(16, dtype=np.float32)
Paths = dict[str, Path]


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The emulator, whose compiler and driver this process uses, or a GPU of this machine.

    The emulator does its work as late as streams allow, and checks every access of a kernel.
    """
    with emulate.place(request.param, tmp_path_factory.mktemp("gpu"), late=1, check=1) as kind:
        yield kind


@pytest.fixture(scope="module")
def paths(
    machine: str, artifacts: Paths, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return cuda_artifacts.make_both(tmp_path_factory.mktemp("cuda"), artifacts["affine"])


@pytest.fixture
def affine(paths: Paths) -> CudaModule:
    return load(paths["affine"], device="cuda")


@pytest.fixture
def checked(paths: Paths) -> CudaModule:
    return load(paths["checked"], device="cuda:0")


class Uncounted(int):
    """What a GPU's driver says of its calls: nothing that a test could contradict."""

    def __sub__(self, other: int) -> int:
        return self

    __add__ = __sub__

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def calls(name: str) -> int:
    """How often the driver's function was called."""
    if driver.LIBRARY == LIBRARY:
        return Uncounted()
    return int(ctypes.CDLL(driver.LIBRARY).emu_calls(name.encode()))


def free_bytes() -> int:
    """Device memory that is free when nothing is kept for later calls."""
    gc.collect()
    found = device.find(0)
    found.trim()
    gc.collect()
    if driver.LIBRARY == LIBRARY:
        return Uncounted()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with found:
        assert not found.driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    return free.value


def matrix(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 16), np.float32)


X = matrix(5)
Y = 2 * X + W


class Foreign:
    """A tensor of some other library in the GPU's memory; `exports` are the streams it was told."""

    def __init__(self, array: np.ndarray, where: Any = (2, 0), offset: int = 0) -> None:
        gpu = device.find(0)
        array = np.ascontiguousarray(array)
        with gpu:
            self.block = gpu.allocate(array.nbytes + 64, "for a test")
            address = self.block.address + offset
            if array.nbytes:
                assert not gpu.driver.cuMemcpyHtoD_v2(address, array.ctypes.data, array.nbytes)
        self.address, self.where = address, where
        self.exports: list[Any] = []
        self.array = DeviceArray(gpu, self, array.shape, array.dtype, 0)  # type: ignore[arg-type]

    def __dlpack_device__(self) -> Any:
        return self.where

    def __dlpack__(self, stream: Any = None) -> Any:
        self.exports.append(stream)
        return self.array.__dlpack__(stream=-1)


# Tensors of the host


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 300])
def test_numpy(affine: CudaModule, rows: int) -> None:
    for turn in range(4):
        x = matrix(rows, turn)
        y = affine(x)["y"]
        np.testing.assert_array_equal(y, 2 * x + W)
        assert type(y) is np.ndarray and y.flags.writeable


def test_signature(affine: CudaModule, paths: Paths) -> None:
    assert affine.device == "cuda:0" and affine.target in ("cuda:sm_80", "cuda:sm_90")
    said = "Module(affine(x: float32[N,16]) -> y: float32[N,16]; {} on cuda:0)"
    assert repr(affine) == said.format(affine.target)
    on_cpu = load(paths["affine"], device="cpu")
    assert on_cpu.device == "cpu" and on_cpu.inputs == affine.inputs
    np.testing.assert_array_equal(on_cpu(X)["y"], affine(X)["y"])
    np.testing.assert_array_equal(affine.run(["y"], {"x": X})[0], Y)
    np.testing.assert_array_equal(affine(x=X)["y"], affine({"x": X})["y"])


def test_strange_but_right_arrays(affine: CudaModule) -> None:
    locked = X.copy()
    locked.flags.writeable = False
    raw = np.zeros(X.nbytes + 4, np.uint8)
    shifted = raw[4:].view(np.float32).reshape(X.shape)
    shifted[...] = X
    for given in (locked, shifted, matrix(8)[::2][:1]):
        np.testing.assert_array_equal(affine(given)["y"], 2 * given + W)
    torch = pytest.importorskip("torch")
    y = affine(torch.from_numpy(X))["y"]
    assert isinstance(y, torch.Tensor) and np.array_equal(y.numpy(), Y)


def test_page_locked_tensors_of_the_host(affine: CudaModule, paths: Paths) -> None:
    class PageLocked:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 3, 0

        def __dlpack__(self, **_: Any) -> Any:
            return X.__dlpack__()

    for module in (affine, load(paths["affine"])):
        np.testing.assert_array_equal(module(PageLocked())["y"], Y)


def test_outputs_belong_to_the_caller(affine: CudaModule) -> None:
    first = affine(X)["y"]
    affine(X + 1)
    np.testing.assert_array_equal(first, Y)


def test_out(affine: CudaModule) -> None:
    y = np.zeros_like(X)
    assert affine(X, out={"y": y})["y"] is y
    np.testing.assert_array_equal(y, Y)
    for buffer, said in (
        (np.zeros((5, 16)), "expected float32"),
        (np.zeros((4, 16), np.float32), "this call makes"),
        (X, "overlaps"),
        (None, "no array"),
    ):
        with pytest.raises(dc.InputError, match=said):
            affine(X, out={"y": buffer})
    with pytest.raises(dc.InputError, match="no output is called 'z'"):
        affine(X, out={"z": y})
    with pytest.raises(dc.InputError, match="a dict"):
        affine(X, out=y)


def test_bind(affine: CudaModule) -> None:
    x, y = np.zeros_like(X), np.zeros_like(X)
    bound = affine.bind(x=x, y=y)
    alone = affine.bind({"x": x})
    kept = alone.outputs["y"]
    for seed in range(4):
        x[...] = matrix(5, seed)
        assert bound()["y"] is y and alone()["y"] is kept
        np.testing.assert_array_equal(y, 2 * x + W)
        np.testing.assert_array_equal(kept, y)
    del affine
    gc.collect()
    np.testing.assert_array_equal(bound()["y"], 2 * x + W)
    with bound._busy, pytest.raises(dc.Error, match="bind once for every thread"):
        bound()


@pytest.mark.parametrize("value", [X.astype("f8"), X[0], X[:, :8].copy(), X.T, None, "x", 1.0])
def test_wrong_array(affine: CudaModule, value: Any) -> None:
    with pytest.raises(dc.InputError, match=r"^input 'x': expected float32\[N,16\]"):
        affine(value)
    np.testing.assert_array_equal(affine(X)["y"], Y)


# Graphs


def test_a_graph_replaces_the_launches(affine: CudaModule) -> None:
    before = calls("cuLaunchKernel"), calls("cuGraphLaunch")
    for turn in range(6):
        x = matrix(5, turn)
        np.testing.assert_array_equal(affine(x)["y"], 2 * x + W)
    # two launches of the first call, two that the second one captures
    assert calls("cuLaunchKernel") - before[0] == 4
    assert calls("cuGraphLaunch") - before[1] == 5


def test_a_bound_call_captures_at_once(affine: CudaModule) -> None:
    bound = affine.bind(x=X)
    before = calls("cuLaunchKernel"), calls("cuGraphLaunch")
    for _ in range(4):
        np.testing.assert_array_equal(bound()["y"], Y)
    assert calls("cuLaunchKernel") - before[0] == 4
    assert calls("cuGraphLaunch") - before[1] == 3


def test_eight_shapes_have_graphs(affine: CudaModule) -> None:
    for rows in (*range(1, 10), *range(1, 10)):
        affine(matrix(rows))
    assert len(affine._lanes) == 1 and len(affine._lanes[0]._frames) == 8
    for rows in (9, 9, 3, 3, 3):
        np.testing.assert_array_equal(affine(matrix(rows))["y"], 2 * matrix(rows) + W)
    affine(matrix(500))  # other memory: what was captured is of no use
    for rows in (9, 9, 9):
        np.testing.assert_array_equal(affine(matrix(rows))["y"], 2 * matrix(rows) + W)


def test_without_graphs(affine: CudaModule) -> None:
    affine.graphs = False
    before = calls("cuGraphLaunch")
    bound = affine.bind(x=X)
    for _ in range(3):
        np.testing.assert_array_equal(affine(X)["y"], Y)
        np.testing.assert_array_equal(bound()["y"], Y)
    assert calls("cuGraphLaunch") == before


# Tensors of the device


def test_device_tensors(affine: CudaModule) -> None:
    copies = [calls(name) for name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")]
    x = Foreign(X)
    copies[0] = calls("cuMemcpyHtoDAsync")
    y = affine(x)["y"]
    assert copies == [calls(name) for name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")]
    assert isinstance(y, DeviceArray) and repr(y) == "DeviceArray(float32[5,16] on cuda:0)"
    assert x.exports == [1]
    np.testing.assert_array_equal(y.numpy(), Y)
    np.testing.assert_array_equal(affine(x=y)["y"].numpy(), 2 * Y + W)
    assert affine(Foreign(X[:0]))["y"].numpy().shape == (0, 16)


def test_an_output_lives_as_long_as_its_consumers(affine: CudaModule) -> None:
    before = free_bytes()
    y = affine(Foreign(X))["y"]
    address = y.address
    taken = ffi.import_tvm_ffi().from_dlpack(y)
    assert taken.data_ptr() == address and taken.shape == (5, 16) and str(taken.device) == "cuda:0"
    del y
    assert affine(Foreign(X + 1))["y"].address != address
    del taken
    assert affine(Foreign(X + 2))["y"].address == address  # the last one back is the first used
    capsule = affine(Foreign(X))["y"].__dlpack__()
    assert "dltensor" in repr(capsule) and device_array._given
    del capsule
    assert not device_array._given
    affine._spaces.clear()
    assert free_bytes() == before


def test_lending_refused(affine: CudaModule) -> None:
    y = affine(Foreign(X))["y"]
    for wrong in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="numpy"):
            y.__dlpack__(**wrong)
    assert y.__dlpack__(max_version=(1, 0), dl_device=(2, 0), copy=False)


def test_device_buffers(affine: CudaModule) -> None:
    x, y = Foreign(X), Foreign(np.zeros_like(X))
    assert affine(x, out={"y": y})["y"] is y
    np.testing.assert_array_equal(y.array.numpy(), Y)
    bound = affine.bind(x=x, y=y)
    alone = affine.bind(x=x)
    before = calls("cuLaunchKernel"), calls("cuGraphLaunch")
    for seed in range(4):
        new = matrix(5, seed)
        with device.find(0) as gpu:
            gpu.driver.cuMemcpyHtoD_v2(x.address, new.ctypes.data, new.nbytes)
        assert bound()["y"] is y
        np.testing.assert_array_equal(y.array.numpy(), 2 * new + W)
        np.testing.assert_array_equal(alone()["y"].numpy(), 2 * new + W)
    assert calls("cuLaunchKernel") - before[0] == 8 and calls("cuGraphLaunch") - before[1] == 6


def wrong_tensors() -> dict[str, tuple[Any, str, str]]:
    return {
        "dtype": (Foreign(X.astype("f8")), "got float64[5,16]; convert it", "DC2103"),
        "rank": (Foreign(X[0]), "got float32[16]; give it 2 dimensions", "DC2104"),
        "other device": (Foreign(X, (2, 1)), "on cuda:1; move it to cuda:0 first", "DC2106"),
        "alignment": (Foreign(X, offset=4), "begins 4 bytes past a multiple of 64", "DC2105"),
        "managed": (Foreign(X, (13, 0)), "on DLPack device (13, 0)", "DC2106"),
    }


@pytest.mark.parametrize("case", ["dtype", "rank", "other device", "alignment", "managed"])
def test_wrong_tensor(affine: CudaModule, case: str) -> None:
    value, said, code = wrong_tensors()[case]
    with pytest.raises(dc.InputError) as caught:
        affine(value)
    assert said in str(caught.value) and str(caught.value).startswith("input 'x': expected float32")
    assert caught.value.code == code
    if case != "managed":
        with pytest.raises(dc.InputError, match=r"^output 'y': "):
            affine(Foreign(X), out={"y": value})


def test_failing_export(affine: CudaModule) -> None:
    x = Foreign(X)
    x.__class__ = type("Failing", (Foreign,), {"__dlpack__": lambda *_, **__: 1 / 0})
    with pytest.raises(dc.InputError, match="DLPack cannot lend: ZeroDivisionError: division"):
        affine(x)


def test_host_and_device_do_not_mix(affine: CudaModule) -> None:
    y = Foreign(np.zeros_like(X))
    with pytest.raises(dc.InputError, match=r"output 'y'.*ndarray elsewhere; move it to cuda:0"):
        affine(Foreign(X), out={"y": np.zeros_like(X)})
    with pytest.raises(dc.InputError, match=r"output 'y'.*DLPack device \(2, 0\)"):
        affine(X, out={"y": y})
    x = Foreign(X)
    with pytest.raises(dc.InputError, match="overlaps"):
        affine(x, out={"y": x})


def test_streams(affine: CudaModule) -> None:
    x = Foreign(X)
    with device.find(0) as gpu:
        streams = [gpu.stream() for _ in range(3)]
    first, second, third = (s.handle for s in streams)
    affine.stream = first
    y = affine(x)["y"]
    assert y.stream == first == affine.stream and x.exports.pop() == first
    numba = type("Stream", (), {"__cuda_stream__": lambda self: (0, third)})()
    for stream, handle in (
        (second, second),
        (type("Stream", (), {"cuda_stream": third})(), third),
        (type("Stream", (), {"ptr": second})(), second),
        (numba, third),
        (1, 0),
    ):
        with affine.on(stream):
            assert affine(x)["y"].stream == handle and x.exports.pop() == (handle or 1)
        assert affine.stream == first
    with pytest.raises(dc.InputError, match="number of a CUDA stream"):
        affine.stream = "stream"
    affine.stream = None
    assert affine(x)["y"].stream == 0
    waits = calls("cuStreamWaitEvent")
    y.__dlpack__(stream=first)
    y.__dlpack__(stream=-1)
    assert calls("cuStreamWaitEvent") == waits
    y.__dlpack__(stream=second)
    y.__dlpack__()
    assert calls("cuStreamWaitEvent") == waits + 2
    np.testing.assert_array_equal(y.numpy(), Y)
    affine.synchronize()


def test_the_stream_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cupy says is taken; a module that only has its name says nothing."""
    stream = type("Stream", (), {"ptr": 77})
    cupy = type(sys)("cupy")
    value = type("ndarray", (), {"__module__": "cupy._core.core"})()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert device_array.current_stream(value, 0) == 0
    cupy.cuda = type("cuda", (), {"get_current_stream": stream})  # type: ignore[attr-defined]
    assert device_array.current_stream(value, 0) == 77
    cupy.from_dlpack = list  # type: ignore[attr-defined]
    assert device_array.maker(value) is list


def test_outputs_are_of_the_kind_of_the_first_input(affine: CudaModule) -> None:
    class Array(Foreign):
        def __array_namespace__(self) -> Any:
            return type("namespace", (), {"from_dlpack": lambda y: ("mine", y)})

    kind, y = affine(Array(X))["y"]
    assert kind == "mine"
    np.testing.assert_array_equal(y.numpy(), Y)
    tensor = affine(ffi.import_tvm_ffi().from_dlpack(Foreign(X).array))["y"]
    assert isinstance(tensor, ffi.import_tvm_ffi().Tensor)


# What kernels report


def said(x: list[int], at: int) -> str:
    return f"input 'x': {x[at]} at {at} of table. Fix: give others"


def test_findings(checked: CudaModule, affine: CudaModule) -> None:
    assert affine._code.findings is None
    good = np.arange(9)
    bound = checked.bind(x=np.array([4, -3]))
    for call, expected in (
        (lambda: checked(np.array([1, 2, -7])), said([1, 2, -7], 2)),
        (lambda: checked(np.array([1, 2, -7])), said([1, 2, -7], 2)),
        (lambda: checked(np.array([1, 2, -9])), said([1, 2, -9], 2)),
        (bound, said([4, -3], 1)),
        (bound, said([4, -3], 1)),
    ):
        with pytest.raises(dc.InputError) as caught:
            call()
        assert str(caught.value) == expected and caught.value.code == "DC2111"
        np.testing.assert_array_equal(checked(good)["y"], good)


def test_findings_of_calls_that_do_not_wait(checked: CudaModule) -> None:
    good, bad = Foreign(np.arange(3)), Foreign(np.array([1, -5, 3]))
    earlier = f"input 'x': {-5} at 1"
    for after in (checked.synchronize, lambda: checked(np.arange(4)), lambda: checked(good)):
        checked(bad)
        with device.find(0) as gpu:
            gpu.synchronize()
        with pytest.raises(dc.InputError) as caught:
            after()
        assert str(caught.value).startswith(f"an earlier call: {earlier}")
        checked.synchronize()
        np.testing.assert_array_equal(checked(good)["y"].numpy(), np.arange(3))
        np.testing.assert_array_equal(checked(np.arange(4))["y"], np.arange(4))


def in_threads(count: int, work: Any) -> None:
    """Runs ``work(i)`` in threads; raises what one of them raised."""
    wrong: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_every_thread_hears_of_its_own_findings(checked: CudaModule) -> None:
    def work(i: int) -> None:
        rng = np.random.default_rng(i)
        for turn in range(30):
            x = rng.integers(0, 99, 4)
            if turn % 3 == i % 3:
                x[2] = -1 - i
                with pytest.raises(dc.InputError) as caught:
                    checked(x)
                assert str(caught.value) == said(list(x), 2)
            else:
                np.testing.assert_array_equal(checked(x)["y"], x)

    in_threads(4, work)


def test_many_threads_and_streams(affine: CudaModule, paths: Paths) -> None:
    other = load(paths["affine"], device="cuda")
    with device.find(0) as gpu:
        streams = [gpu.stream() for _ in range(2)]

    def work(i: int) -> None:
        for turn in range(15):
            x = matrix(1 + (turn * 7 + i) % 5, 100 * i + turn)
            np.testing.assert_array_equal(affine(x)["y"], 2 * x + W)
            with other.on(streams[i % 2].handle):
                y = other(Foreign(x))["y"]
                np.testing.assert_array_equal(other(y)["y"].numpy(), 2 * (2 * x + W) + W)

    in_threads(4, work)


# Memory


def test_weights_are_there_once(paths: Paths) -> None:
    gpu = device.find(0)
    before = free_bytes()
    modules = [load(paths["affine"], device="cuda") for _ in range(3)]
    assert len({m._params.data_ptr() for m in modules}) == 1 and len(gpu._params) == 1
    assert before - free_bytes() > 0 or isinstance(before, Uncounted)
    for module in modules:
        np.testing.assert_array_equal(module(X)["y"], Y)
    bound = modules[0].bind(x=X)
    bound()
    modules[1](Foreign(X))
    del module
    modules.clear()
    assert len(gpu._params) == 1  # the bound call has them
    del bound
    assert free_bytes() == before and not len(gpu._params)


def test_a_large_upload(machine: str) -> None:
    """More than twice what one buffer holds, and not a multiple of it."""
    gpu = device.find(0)
    data = np.random.default_rng(0).integers(0, 255, 40_000_001, np.uint8)
    block = gpu.params("a test", [data[:100], data[64:]])
    assert gpu.params("a test", []) is block
    lent = type("Lent", (), {"address": block.address})()
    there = DeviceArray(gpu, lent, (128 + data.size - 64,), data.dtype, 0).numpy()
    assert np.array_equal(there[:100], data[:100])  # the next piece is on a boundary of 64
    assert np.array_equal(there[128:], data[64:])


def test_blocks_kept_for_outputs_have_a_limit(
    affine: CudaModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = device.find(0)
    gpu.trim()
    monkeypatch.setattr(device, "_KEEP", 4096)
    kept = [affine(Foreign(matrix(n)))["y"] for n in range(1, 40)]
    kept.clear()
    assert sum(b.nbytes for blocks in gpu._free.values() for b in blocks) <= 4096
    assert [device._round(n) for n in (0, 1, 512, 513, 8192, 8193, 100_000)] == [
        512, 512, 512, 1024, 8192, 9216, 106_496
    ]  # fmt: skip


# Compiled models


def compiled(nodes: Any, inputs: Any, outputs: Any, constants: Any, path: Path) -> list[Any]:
    """A model of float32 and int64 tensors, on the CPU and on the GPU."""
    helper = pytest.importorskip("onnx").helper
    kinds = {"f": 1, "i": 7}  # of onnx.TensorProto
    ends = [
        [helper.make_tensor_value_info(name, kinds[kind], shape) for name, kind, shape in side]
        for side in (inputs, outputs)
    ]
    values = [pytest.importorskip("onnx").numpy_helper.from_array(v, k) for k, v in constants]
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "g", *ends, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    dc.compile(model, targets=["cuda:sm_80", "x86-64-v3"], name="g").save(path)
    return [load(path, device=where) for where in ("cpu", "cuda")]


def test_a_compiled_layer(machine: str, tmp_path: Path) -> None:
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    nodes = [("MatMul", ["x", "w"], ["h"]), ("Relu", ["h"], ["y"])]
    ends = [("x", "f", ["M", 64])], [("y", "f", ["M", 32])]
    on_cpu, on_gpu = compiled(nodes, *ends, [("w", w)], tmp_path / "m.dcm")
    for rows in (1, 5, 5, 5, 33):
        x = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
        expected = on_cpu(x)["y"]
        np.testing.assert_allclose(on_gpu(x)["y"], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(on_gpu(Foreign(x))["y"].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_inputs_of_host_and_device_do_not_mix(machine: str, tmp_path: Path) -> None:
    ends = [("a", "f", ["M", 8]), ("b", "f", ["M", 8])], [("y", "f", ["M", 8])]
    _, module = compiled([("Add", ["a", "b"], ["y"])], *ends, [], tmp_path / "m.dcm")
    a, b = matrix(3)[:, :8].copy(), matrix(3, 1)[:, :8].copy()
    np.testing.assert_array_equal(module(a, b)["y"], a + b)
    np.testing.assert_array_equal(module(Foreign(a), Foreign(b))["y"].numpy(), a + b)
    for first, second, name in ((Foreign(a), b, "b"), (a, Foreign(b), "a")):
        with pytest.raises(dc.InputError) as caught:
            module(first, second)
        assert caught.value.code == "DC2106" and str(caught.value) == (
            f"input '{name}': expected float32[M,8] on cuda:0, got a numpy.ndarray elsewhere; "
            "move it to cuda:0 like the others first"
        )
    with pytest.raises(dc.InputError, match=r"M is 2 in float32\[2,8\], but 3 in input 'a'"):
        module(Foreign(a), Foreign(b[:2]))


def test_a_compiled_lookup(machine: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).random((9, 8), np.float32)
    ends = [("i", "i", ["M"])], [("y", "f", ["M", 8])]
    nodes = [("Gather", ["t", "i"], ["y"])]
    on_cpu, on_gpu = compiled(nodes, *ends, [("t", table)], tmp_path / "m.dcm")
    for good in ([1, 0, 8], [-1, -9, 3]):
        np.testing.assert_array_equal(on_gpu(np.array(good))["y"], table[good])
    for bad in ([1, 2, 9], [-10, 1, 2]):
        found = []
        for module in (on_cpu, on_gpu):
            with pytest.raises(dc.InputError) as caught:
                module(np.array(bad))
            found.append((caught.value.code, str(caught.value)))
        assert found[0] == found[1]
        on_gpu(Foreign(np.array(bad)))
        with pytest.raises(dc.InputError, match="an earlier call: "):
            on_gpu.synchronize()


def test_sizes_that_the_model_computes(machine: str, tmp_path: Path) -> None:
    """Read back in the middle of the call; never captured."""
    ends = [("x", "f", ["M", 4])], [("y", "i", [2, "K"])]
    on_cpu, on_gpu = compiled([("NonZero", ["x"], ["y"])], *ends, [], tmp_path / "m.dcm")
    before = calls("cuGraphLaunch"), calls("cuStreamBeginCapture")
    x = np.zeros((40, 4), np.float32)
    x_there, y = Foreign(x), np.zeros((2, 160), np.int64)
    bound, bound_there = on_gpu.bind(x=x), on_gpu.bind(x=x_there)
    for seed in range(5):
        x[...] = np.random.default_rng(seed).random((40, 4)) > 0.2 * seed
        with device.find(0) as gpu:
            gpu.driver.cuMemcpyHtoD_v2(x_there.address, x.ctypes.data, x.nbytes)
        expected = on_cpu(x)["y"]
        for found in (
            on_gpu(x)["y"],
            on_gpu(x, out={"y": y})["y"],
            bound()["y"],
            on_gpu(x_there)["y"].numpy(),
            bound_there()["y"].numpy(),
        ):
            np.testing.assert_array_equal(found, expected)
    assert before == (calls("cuGraphLaunch"), calls("cuStreamBeginCapture"))


# Which variant


def test_choice_of_a_variant() -> None:
    rows = [{"target": t} for t in ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:other")]
    for arch, target, kind in (
        (80, "sm_80", "cubin"), (86, "sm_80", "cubin"), (89, "sm_80", "cubin"),
        (90, "sm_90", "cubin"), (100, "sm_100", "cubin"), (103, "sm_100", "cubin"),
        (120, "sm_100", "ptx"),
    ):  # fmt: skip
        found = cuda_variant._best(rows, arch)
        assert found is not None and (found[0]["target"], found[1]) == (f"cuda:{target}", kind)
    assert cuda_variant._best(rows, 75) is None
    assert cuda_variant._best(rows[2:], 90) is None
