"""The stand-ins for nvcc and libcuda.so.1: what programs for CUDA are tested with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate

from dccompile.cuda import device, toolchain
from dccompile.errors import Error

SOURCE = """extern "C" __global__ void __launch_bounds__(64) add(
    float* x, float* y, float by, int n) {
  int i = blockIdx.x * 64 + threadIdx.x;
  if (i < n) y[i] = x[i] + by;
}
extern "C" __global__ void __launch_bounds__(64) overrun(float* x) { x[100000 + threadIdx.x] = 1; }
extern "C" __global__ void __launch_bounds__(64) find(int* x) {
  if (x[threadIdx.x] == 5) dcc_report("DC2100: %", 5, 0, 0, 0, "name", 4);
}
"""
# What every child process starts with: the driver, a module, functions, memory, a stream.
START = """
import ctypes, json, os, sys
from ctypes import byref, c_void_p as P, c_int as I, c_float as F, c_size_t as Z
cuda = ctypes.CDLL("libcuda.so.1")
def ok(result): assert result == 0, result
def init():
    ok(cuda.cuInit(0))
    context = P()
    ok(cuda.cuDevicePrimaryCtxRetain(byref(context), 0))
    ok(cuda.cuCtxPushCurrent_v2(context))
def load(path):
    module = P()
    ok(cuda.cuModuleLoadData(byref(module), open(path, "rb").read()))
    return module
def function(module, name):
    found = P()
    ok(cuda.cuModuleGetFunction(byref(found), module, name))
    return found
def memory(size):
    p = P()
    ok(cuda.cuMemAlloc_v2(byref(p), Z(size)))
    return p
def stream():
    s = P()
    ok(cuda.cuStreamCreate(byref(s), 1))
    return s
def launch(f, *args, grid=1, block=64, on=None, shared=0):
    pointers = (P * len(args))(*(ctypes.addressof(a) for a in args))
    return cuda.cuLaunchKernel(f, grid, 1, 1, block, 1, 1, shared, on, pointers, None)
def floats(*values): return (F * len(values))(*values)
out = lambda value: print(json.dumps(value))
"""


@pytest.fixture(scope="module")
def toolkit(tmp_path_factory):
    return emulate.toolkit(tmp_path_factory.mktemp("toolkit"))


@pytest.fixture
def images(toolkit, monkeypatch, tmp_path):
    """Paths of a cubin and a PTX of `SOURCE`, made as the compiler makes them."""
    toolkit.patch(monkeypatch)
    found = toolchain.find()
    assert (found.kind, found.version) == ("nvcc", "V13.0.0")
    code = found.compile("#define DCC_REPORTS\n" + device.prelude() + SOURCE, "sm_80")
    for name, data in (("k.cubin", code.cubin), ("k.ptx", code.ptx)):
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.fixture
def child(toolkit, images):
    """Runs a program after `START`; gives what it printed as JSON and its standard error."""

    def run(program, **settings):
        done = subprocess.run(
            [sys.executable, "-c", START + textwrap.dedent(program)],
            env=toolkit.environment(**settings),
            cwd=images,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return run


def test_refuses(toolkit, monkeypatch):
    """A wrong source is an error of the compiler's, with g++'s words."""
    toolkit.patch(monkeypatch)
    with pytest.raises(Error, match=r"nvcc refuses a kernel: .*mistake"):
        toolchain.find().compile('extern "C" __global__ void k(int* a) {\n  mistake\n}', "sm_80")


ADD = """
    init()
    s, add = stream(), function(load("{image}"), b"add")
    x, y = memory(400), memory(400)
    given, got = floats(*range(100)), floats(*[0] * 100)
    ok(cuda.cuMemcpyHtoDAsync_v2(x, given, Z(400), s))
    ok(launch(add, x, y, F(0.5), I(100), grid=2, on=s))
    ok(cuda.cuMemcpyDtoHAsync_v2(got, y, Z(400), s))
    ok(cuda.cuStreamSynchronize(s))
    out(list(got))
"""


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(("image", "arch"), [("k.cubin", 80), ("k.cubin", 89), ("k.ptx", 90)])
def test_launch(child, image, arch, late):
    got, _ = child(ADD.format(image=image), arch=arch, late=late)
    assert got == [i + 0.5 for i in range(100)]


@pytest.mark.parametrize(
    ("image", "arch", "result"), [("k.cubin", 90, 209), ("k.ptx", 75, 222), ("text", 80, 200)]
)
def test_wrong_image(child, images, image, arch, result):
    (images / "text").write_text("no code at all")
    program = f"""
    init()
    out(cuda.cuModuleLoadData(byref(P()), open("{image}", "rb").read()))
    """
    assert child(program, arch=arch)[0] == result


def test_modules_are_apart(child):
    """Two loads of one image have variables of their own."""
    program = """
    init()
    found = []
    for module in load("k.cubin"), load("k.cubin"):
        at, size = P(), Z()
        ok(cuda.cuModuleGetGlobal_v2(byref(at), byref(size), module, b"dcc_status"))
        found.append((at.value, size.value))
    missing = cuda.cuModuleGetGlobal_v2(byref(at), byref(size), module, b"nothing")
    out([found[0][0] != found[1][0], found[0][1], missing])
    """
    assert child(program)[0] == [True, 8, 500]


def test_report(child):
    """A kernel writes its finding where dcc_status points to, in pinned memory."""
    program = """
    init()
    module, x, pinned, at = load("k.cubin"), memory(256), P(), P()
    ok(cuda.cuMemsetD8_v2(x, 0, Z(256)))
    ok(cuda.cuMemcpyHtoD_v2(x, (I * 3)(1, 5, 5), Z(12)))
    ok(cuda.cuMemHostAlloc(byref(pinned), Z(512), 2))
    ctypes.memset(pinned, 0, 512)
    ok(cuda.cuMemHostGetDevicePointer_v2(byref(at), pinned, 0))
    status = P()
    ok(cuda.cuModuleGetGlobal_v2(byref(status), None, module, b"dcc_status"))
    ok(cuda.cuMemcpyHtoD_v2(status, byref(at), Z(8)))
    ok(launch(function(module, b"find"), x))
    ok(cuda.cuCtxSynchronize())
    taken = I.from_address(pinned.value).value
    out([taken, ctypes.string_at(pinned.value + 40).decode()])
    """
    assert child(program)[0] == [2, "DC2100: %"]


@pytest.mark.parametrize("late", [0, 1])
def test_graph(child, late):
    """A captured copy and launch run again with what is in memory then; values are kept."""
    program = """
    init()
    s, add = stream(), function(load("k.cubin"), b"add")
    x, y, by, n = memory(400), memory(400), F(1), I(100)
    graph, runnable = P(), P()
    ok(cuda.cuMemcpyHtoD_v2(x, floats(*[0] * 100), Z(400)))
    ok(cuda.cuStreamBeginCapture_v2(s, 1))
    ok(launch(add, x, y, by, n, grid=2, on=s))
    ok(cuda.cuMemcpyAsync(x, y, Z(400), s))
    ok(cuda.cuStreamEndCapture(s, byref(graph)))
    by.value = 9
    ok(cuda.cuGraphInstantiateWithFlags(byref(runnable), graph, ctypes.c_uint64(0)))
    ok(cuda.cuGraphDestroy(graph))
    for _ in range(3):
        ok(cuda.cuGraphLaunch(runnable, s))
    got = floats(*[0] * 100)
    ok(cuda.cuMemcpyDtoHAsync_v2(got, x, Z(400), s))
    ok(cuda.cuStreamSynchronize(s))
    ok(cuda.cuGraphExecDestroy(runnable))
    out(list(got))
    """
    assert child(program, late=late)[0] == [3.0] * 100


def test_capture_forbids_waiting(child):
    program = """
    init()
    s, x, graph = stream(), memory(400), P()
    ok(cuda.cuStreamBeginCapture_v2(s, 1))
    results = [cuda.cuStreamSynchronize(s), cuda.cuStreamEndCapture(s, byref(graph))]
    ok(cuda.cuStreamBeginCapture_v2(s, 0))
    results += [cuda.cuMemAlloc_v2(byref(P()), Z(4)), cuda.cuStreamEndCapture(s, byref(graph))]
    out(results)
    """
    assert child(program)[0] == [900, 901, 900, 901]


def test_late(child):
    """With EMU_LATE work waits for the one who needs it: a missing wait shows."""
    program = """
    init()
    s, x, pinned = stream(), memory(4), P()
    ok(cuda.cuMemHostAlloc(byref(pinned), Z(4), 0))
    value = F.from_address(pinned.value)
    value.value = 1
    ok(cuda.cuMemcpyHtoDAsync_v2(x, pinned, Z(4), s))
    value.value = 2
    ok(cuda.cuStreamSynchronize(s))
    got = F()
    ok(cuda.cuMemcpyDtoH_v2(byref(got), x, Z(4)))
    out(got.value)
    """
    assert [child(program, late=late)[0] for late in (0, 1)] == [1.0, 2.0]


def test_events(child):
    program = """
    init()
    one, two, x, pinned, event, done = stream(), stream(), memory(4), P(), P(), P()
    ok(cuda.cuMemHostAlloc(byref(pinned), Z(4), 0))
    I.from_address(pinned.value).value = 7
    ok(cuda.cuEventCreate(byref(event), 2))
    ok(cuda.cuEventCreate(byref(done), 0))
    ok(cuda.cuMemcpyHtoDAsync_v2(x, pinned, Z(4), one))
    ok(cuda.cuEventRecord(event, one))
    ok(cuda.cuStreamWaitEvent(two, event, 0))
    got = I()
    ok(cuda.cuMemcpyDtoHAsync_v2(byref(got), x, Z(4), two))
    ok(cuda.cuEventRecord(done, two))
    ok(cuda.cuEventSynchronize(done))
    out([got.value, cuda.cuEventElapsedTime(byref(F()), event, done)])
    """
    assert child(program, late=1)[0] == [7, 400]


def test_out_of_memory(child):
    program = """
    init()
    x, p, free, total = memory(1 << 20), P(), Z(), Z()
    result = cuda.cuMemAlloc_v2(byref(p), Z(3 << 20))
    ok(cuda.cuMemGetInfo_v2(byref(free), byref(total)))
    ok(cuda.cuMemFree_v2(x))
    after = cuda.cuMemAlloc_v2(byref(p), Z(3 << 20))
    out([result, free.value, total.value, after, cuda.emu_allocations()])
    """
    assert child(program, memory=3)[0] == [2, 2 << 20, 3 << 20, 0, 1]


def test_wrong_memory(child):
    """Double free, a copy over the end, a copy of freed memory, a stream that is no more."""
    program = """
    init()
    x, y, s, host = memory(100), memory(100), stream(), (I * 100)()
    results = [cuda.cuMemcpyHtoD_v2(x, host, Z(101)), cuda.cuMemFree_v2(x), cuda.cuMemFree_v2(x)]
    results += [cuda.cuMemcpyDtoH_v2(host, x, Z(4)), cuda.cuStreamDestroy_v2(s)]
    results += [cuda.cuStreamSynchronize(s), cuda.emu_allocations(), cuda.emu_objects()]
    out(results)
    """
    got, errors = child(program)
    assert got == [1, 0, 1, 1, 0, 400, 1, 0]
    assert "101 bytes" in errors and "not allocated" in errors


@pytest.mark.parametrize("late", [0, 1])
def test_failure_stays(child, late):
    """An illegal access shows in a later call, and in all that follow."""
    program = """
    init()
    x, s = memory(400), stream()
    results = [launch(function(load("k.cubin"), b"overrun"), x, on=s)]
    results += [cuda.cuStreamSynchronize(s), cuda.cuMemAlloc_v2(byref(P()), Z(4))]
    out([*results, cuda.cuCtxPopCurrent_v2(None)])
    """
    got, errors = child(program, late=late)
    assert got == [0, 700, 700, 0]
    assert "overrun, block (0,0,0), thread (0,0,0): access to the address" in errors


def test_checks(toolkit, child, images, monkeypatch):
    """With EMU_CHECK when it is compiled every access is checked."""
    monkeypatch.setenv("EMU_CHECK", "1")
    code = toolchain.find().compile("#define DCC_REPORTS\n" + device.prelude() + SOURCE, "sm_80")
    (images / "k.cubin").write_bytes(code.cubin)
    program = """
    init()
    x, y = memory(400), memory(396)
    ok(launch(function(load("k.cubin"), b"add"), x, y, F(1), I(100), grid=2))
    out(cuda.cuCtxSynchronize())
    """
    got, errors = child(program)
    assert got == 700
    assert "at byte 396 of 'allocation of 396 bytes', which has 396" in errors


def test_planned_failures(child):
    program = """
    init()
    results = [cuda.cuMemAlloc_v2(byref(P()), Z(4)) for _ in range(4)]
    results += [cuda.cuCtxSynchronize() for _ in range(3)]
    out([*results, cuda.emu_calls(b"cuMemAlloc")])
    """
    got, _ = child(program, fail="cuMemAlloc:2:2,cuCtxSynchronize:2:719")
    assert got == [0, 2, 0, 0, 0, 719, 719, 4]


def test_launch_limits(child):
    program = """
    init()
    add, args = function(load("k.cubin"), b"add"), (memory(4), memory(4), F(0), I(0))
    results = [launch(add, *args, block=65), launch(add, *args, grid=0)]
    results += [launch(add, *args, shared=(48 << 10) + 1)]
    results += [cuda.cuFuncSetAttribute(add, 8, 100 << 10)]
    results += [launch(add, *args, shared=100 << 10), cuda.cuFuncSetAttribute(add, 8, 164 << 10)]
    out([*results, cuda.cuCtxSynchronize()])
    """
    assert child(program)[0] == [701, 1, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("settings", "results"),
    [
        ({"devices": 0}, [100, 3, 0]),
        ({"devices": 3}, [0, 0, 3]),
        ({"fail": "cuInit:1:999"}, [999, 3, 0]),
    ],
)
def test_devices(child, settings, results):
    program = """
    count = I()
    out([cuda.cuInit(0), cuda.cuDeviceGetCount(byref(count)), count.value])
    """
    assert child(program, **settings)[0] == results


def test_attributes(child):
    program = """
    value, version, name = I(), I(), ctypes.create_string_buffer(99)
    before = cuda.cuDeviceGetAttribute(byref(value), 75, 0)
    init()
    ok(cuda.cuDriverGetVersion(byref(version)))
    ok(cuda.cuDeviceGetName(name, 99, 0))
    values = []
    for number in (75, 76, 97, 16):
        ok(cuda.cuDeviceGetAttribute(byref(value), number, 0))
        values.append(value.value)
    address = P()
    found = cuda.cuGetProcAddress_v2(b"cuMemAlloc", byref(address), 12000, ctypes.c_uint64(0), None)
    same = address.value == ctypes.cast(cuda.cuMemAlloc_v2, P).value
    none = cuda.cuGetProcAddress_v2(b"cuNothing", byref(address), 12000, ctypes.c_uint64(0), None)
    text = ctypes.c_char_p()
    ok(cuda.cuGetErrorName(700, byref(text)))
    texts = [name.value.decode(), text.value.decode()]
    out([before, version.value, *texts, values, found, same, none])
    """
    got, _ = child(program, arch=90, driver=12080)
    assert got[:4] == [3, 12080, "Emulated GPU sm_90", "CUDA_ERROR_ILLEGAL_ADDRESS"]
    assert got[4:] == [[9, 0, 227 << 10, 108], 0, True, 500]


def test_no_context(child):
    program = """
    ok(cuda.cuInit(0))
    out(cuda.cuMemAlloc_v2(byref(P()), Z(4)))
    """
    assert child(program)[0] == 201


def test_environment(toolkit):
    made = toolkit.environment(devices=2)
    assert made["PATH"].split(os.pathsep)[0] == str(toolkit.nvcc.parent)
    assert made["EMU_DEVICES"] == "2" and made["DCCOMPILE_CUDA_COMPILER"] == "nvcc"
