"""The emulator of GPUs: every class of defect is found, right kernels give the right numbers."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate

from dccompile.cuda import device
from dccompile.machine import GPUS

A100 = GPUS["cuda:sm_80"]


def launch(body, arrays, grid=(1, 1, 1), block=(32, 1, 1), check=True, **options):
    """Runs `body` of a kernel whose parameters are pointers to the arrays, by name.

    Returns nothing; outputs are written in place.
    """
    kinds = {"i": "int", "I": "uint", "f": "float", "B": "uchar"}
    parameters = ", ".join(f"{kinds[a.dtype.char]}* {n}" for n, a in arrays.items())
    source = f'extern "C" __global__ void k({parameters}) {{\n{body}\n}}\n'
    memory = emulate.Memory()
    args = [ctypes.c_void_p(memory.add(n, a)) for n, a in arrays.items()]
    emulate.call(emulate.load(source, check), "k", grid, block, args, memory, **options)
    memory.back()


def ints(n, start=0):
    return np.arange(start, start + n, dtype=np.int32)


T = "int t = threadIdx.x;\n"
S = "__shared__ alignas(64) int s[64];\n"
FILL = T + S + "s[t] = 0;\n__syncthreads();\n"
EXCHANGE = FILL + "s[t] = a[t];\n{sync}\nb[t] = s[63 - t];"
# What to find, what the report says, kernel, threads.
DEFECTS = {
    "missing_barrier": (
        "race: \\w+ of byte \\d+ of shared memory 's'",
        EXCHANGE.format(sync=""),
        64,
    ),
    "barrier_of_some_threads": (
        "__syncthreads of line 7 waits for thread .* has left",
        EXCHANGE.format(sync="if (t < 8) __syncthreads();").replace("s[63 - t]", "a[t]"),
        64,
    ),
    "two_barriers": (
        "__syncthreads of line 7 waits for .* waits in __syncthreads of line 8",
        EXCHANGE.format(sync="if (t < 8) __syncthreads();\nelse __syncthreads();"),
        64,
    ),
    "warp_barrier_between_warps": (
        "race: \\w+ of byte",
        EXCHANGE.format(sync="__syncwarp();"),
        64,
    ),
    "write_after_read": (
        "race: write of byte .* read with no barrier",
        FILL + "int r = s[63 - t];\n__syncwarp();\nif (t >= 32) s[t] = r;",
        64,
    ),
    "write_after_reads_of_all": (
        "race: write of byte 0 of shared memory 's', which .* read",
        T + "__shared__ alignas(64) int s[1];\nif (t == 0) s[0] = a[0];\n__syncthreads();\n"
        "int r = s[0];\n__syncwarp();\nif (t == 63) s[0] = r;",
        64,
    ),
    "two_writers": (
        "race: write of byte 0 of shared memory 's', which .* wrote",
        T + "__shared__ alignas(64) int s[1];\ns[0] = t;\n",
        64,
    ),
    "two_writers_of_a_byte": (
        "race: write of byte 1 of tensor 'b', which .* wrote",
        T + "((uchar*)b)[t == 9 ? 1 : t] = 1;",
        64,
    ),
    "global_race": (
        "race: (read|write) of byte .* of tensor 'b', which .* (wrote|read)",
        T + "b[t] = a[t];\nb[t + 64] = b[63 - t];",
        64,
    ),
    "global_read_past_the_end": (
        "read of 4 bytes outside every tensor and array: at byte 512 of 'a', which has 512",
        T + "b[t] = a[t + 65];",
        64,
    ),
    "global_read_before_the_start": ("at byte -4 of 'a'", T + "b[t] = a[t - 1];", 64),
    "global_write_past_the_end": (
        "write of 4 bytes .* at byte 512 of 'b'",
        T + "b[t + 65] = a[t];",
        64,
    ),
    "vector_half_outside": (
        "read of 16 bytes outside .* at byte 496 of 'c'",
        T + "uint r[4];\nif (t == 31) dcc_load16(r, c + t * 4);\nb[t] = r[0];",
        64,
    ),
    "null": ("outside every tensor and array", T + "b[t] = *(int*)0;", 64),
    "into_the_neighbour": (
        "outside every tensor and array: at byte 256 of 's'",
        T + "__shared__ alignas(64) int s[64];\n__shared__ alignas(64) int r[64];\nr[t] = 1;\n"
        "int* p = s + 1;\np[t] = a[t];\nb[t] = r[t] + s[t + 1];",
        64,
    ),
    "index_outside_an_array": (
        "index 64 outside of an array",
        T + "__shared__ alignas(64) int s[64];\ns[t + 1] = a[t];",
        64,
    ),
    "index_outside_a_local_array": (
        "index 4 outside of an array",
        T + "int r[4];\nfor (int i = 0; i <= 4; i++) r[i] = a[i + t];\nb[t] = r[0] + r[a[1]];",
        64,
    ),
    "no_value": (
        "read of byte .* of shared memory 's', which nobody has written",
        T + "__shared__ alignas(64) int s[65];\ns[t] = a[t];\n__syncthreads();\nb[t] = s[t + 1];",
        64,
    ),
    "misaligned_struct": (
        "an address that is 4 over a multiple of 16",
        T + "if (t < 8) ((int4*)b)[t] = ((int4*)(a + 1))[t];",
        64,
    ),
    "misaligned_load": (
        "read of 16 bytes at byte 4 of tensor 'a': not a multiple of 16",
        T + "uint r[4];\ndcc_load16(r, a + 1 + t);\nb[t] = r[0];",
        8,
    ),
    "misaligned_matrix": (
        "read of 16 bytes at byte 4 of shared memory 's': not a multiple of 16",
        T + "__shared__ alignas(64) uint s[256];\nfor (int i = t; i < 256; i += 32) s[i] = i;\n"
        "__syncthreads();\nuint r[4];\ndcc_ldmatrix4(r, s + 1 + t * 4);\nb[t] = r[0];",
        32,
    ),
    "read_only_load_of_written": (
        "read-only load of byte 0 of tensor 'b', which this kernel has written",
        T + "b[t] = 1;\nb[t + 64] = dcc_load4(b + t);",
        64,
    ),
    "shared_where_global": (
        "outside every tensor",
        T + "__shared__ alignas(64) uint s[64];\ns[t] = t;\nb[t] = dcc_load4(s + t);",
        64,
    ),
    "lane_missing": (
        "__shfl_xor_sync of line 4 .* waits for lane 8, which has left",
        T + "if (t < 8)\nb[t] = __shfl_xor_sync(~0u, a[t], 1);",
        32,
    ),
    "lane_at_a_barrier": (
        "__shfl_xor_sync of line 4 .* waits for lane 8, which waits in __syncthreads of line 5",
        T + "if (t < 8)\nb[t] = __shfl_xor_sync(~0u, a[t], 1);\n__syncthreads();",
        32,
    ),
    "lane_not_in_its_mask": (
        "in which lane 8 itself is not",
        T + "b[t] = __shfl_xor_sync(255u, a[t], 1);",
        32,
    ),
    "mma_of_half_a_warp": (
        "mma of line 5 in a warp of 16 threads",
        T + "uint x[4] = {}, y[2] = {};\nint z[4] = {};\ndcc_mma_u8s8(z, x, y);\nb[t] = z[0];",
        16,
    ),
    "mma_with_lanes_missing": (
        "mma of line 6 .* waits for lane 31, which has left",
        T + "uint x[4] = {}, y[2] = {};\nint z[4] = {};\nif (t < 31)\ndcc_mma_u8s8(z, x, y);\n"
        "b[t] = z[0];",
        32,
    ),
    "endless": (
        "still runs after 1 s",
        T + "volatile int going = 1;\nuint x = t;\nwhile (going | x) x = x * 3 | 1;\nb[t] = x;",
        64,
    ),
    "endless_with_barriers": ("still runs after 1 s", "for (;;) __syncthreads();", 64),
    "division_by_zero": ("division by zero", T + "b[t] = 5 / a[t];", 64),
    "local_of_another_thread": (
        "local variable of another thread",
        T + "__shared__ alignas(64) uint64_t s[1];\nint mine = a[t];\n"
        "if (t == 0) s[0] = (uint64_t)&mine;\n"
        "__syncthreads();\nb[t] = *(int*)s[0];\n__syncthreads();",
        64,
    ),
    "plain_beside_atomic": (
        "race: .* of byte 0 of tensor 'b', which",
        T + "if (t == 5) b[0] = 1;\nelse atomicAdd(b, a[t]);",
        64,
    ),
    "static_shared_memory": (
        "65536 bytes of static shared memory, at most 49152",
        T + "__shared__ alignas(64) int s[16384];\ns[t] = t;",
        64,
    ),
}
COPY = (
    T + "__shared__ alignas(64) int s[128];\ns[t] = 0;\n__syncthreads();\n"
    "if (t < 32) dcc_copy16(s + t * 4, a + t * 4, 16);\n{sync}\nb[t] = s[127 - t];"
)
COPIES = {
    "no_commit": ("copy of thread .* is under way", "dcc_wait0();\n__syncthreads();"),
    "no_wait": ("copy of thread .* is under way", "dcc_commit();\n__syncthreads();"),
    "wait_leaves_it": ("copy of .* is under way", "dcc_commit();\ndcc_wait1();\n__syncthreads();"),
    "no_barrier": ("race: \\w+ of byte", "dcc_commit();\ndcc_wait0();"),
    "barrier_before_wait": (
        "race: read|under way",
        "dcc_commit();\n__syncthreads();\ndcc_wait0();",
    ),
    "written_meanwhile": (
        "write of .* while an asynchronous copy",
        "__syncthreads();\nif (t < 32) s[t] = 1;\ndcc_commit();\ndcc_wait0();\n__syncthreads();",
    ),
}
DEFECTS |= {n: (want, COPY.format(sync=sync), 128) for n, (want, sync) in COPIES.items()}
DEFECTS |= {
    "copy_past_the_end": (
        "read of 16 bytes outside every tensor: at byte 512 of 'a'",
        COPY.format(sync="").replace("a + t * 4", "a + 4 + t * 4").replace("b[t]", "//"),
        128,
    ),
    "misaligned_copy": (
        "from an address with offset 4",
        COPY.format(sync="").replace("a + t * 4", "a + 1").replace("t < 32", "t < 1"),
        128,
    ),
    "copy_before_all_have_read": (
        "race: copy of byte \\d+ of shared memory 's', which thread \\(\\d+,0,0\\) read",
        FILL + "b[t] = s[63 - t];\nif (t >= 48) t -= 48, dcc_copy16(s + t * 4, a + t * 4, 16);",
        64,
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defect(name):
    """Found in any order of the threads, with the place in one line."""
    wanted, body, threads = DEFECTS[name]
    for order in range(1 if name.startswith("endless") else 4):
        arrays = {"a": ints(128), "b": ints(128), "c": ints(126)}
        with pytest.raises(emulate.EmulatorError) as caught:
            launch(body, arrays, block=(threads, 1, 1), seconds=1, order=order)
        text = str(caught.value)
        assert text.startswith("k, block (0,0,0), thread (") and "\n" not in text
        if order == 0:
            assert re.search(wanted, text), text


BLOCKS = {
    "two_blocks_write": ("another block wrote", T + "b[t] = 1;"),
    "other_block_reads": (
        "another block read",
        T + "if (blockIdx.x == 0) b[t + 64] = b[t];\nelse if (t == 3) b[t] = 1;",
    ),
    "reads_of_other_block": (
        "which another block wrote",
        T + "if (blockIdx.x == 0) b[t] = 1;\nelse b[t + 64] = b[63 - t];",
    ),
    "all_read_then_one_writes": (
        "another block read",
        T + "b[64 * blockIdx.x + 1 + t] = b[0];\nif (blockIdx.x == 1 && t == 0) b[0] = 1;",
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_defect_between_blocks(name):
    wanted, body = BLOCKS[name]
    with pytest.raises(emulate.EmulatorError, match=wanted):
        launch(body, {"a": ints(64), "b": ints(192)}, grid=(2, 1, 1), block=(64, 1, 1))


LIMITS = {
    "threads": ((1, 1, 1), (1025, 1, 1), {}, "at most 1024"),
    "threads_together": ((1, 1, 1), (64, 32, 1), {}, "1024 together"),
    "z": ((1, 1, 1), (1, 1, 65), {}, "at most 1024, 1024, 64"),
    "grid": ((1, 65536, 1), (32, 1, 1), {}, "65535"),
    "no_blocks": ((0, 1, 1), (32, 1, 1), {}, "at least 1"),
    "dynamic_shared": ((1, 1, 1), (32, 1, 1), {"dynamic": (163 << 10) + 1}, "of shared memory"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limit(name):
    grid, block, options, wanted = LIMITS[name]
    with pytest.raises(emulate.EmulatorError, match=wanted):
        launch(T + "b[t] = 1;", {"b": ints(64)}, grid=grid, block=block, **options)


def test_line():
    """Where line numbers can be had, the message ends with the statement."""
    with pytest.raises(emulate.EmulatorError, match=r"line 3: b\[t\] = a\[t \+ 65\];"):
        launch(
            DEFECTS["global_read_past_the_end"][1],
            {"a": ints(128), "b": ints(128)},
            block=(64, 1, 1),
        )


# ---- right kernels ----

RIGHT = {
    "exchange": (EXCHANGE.format(sync="__syncthreads();"), 64, lambda a: a[63::-1]),
    "warp_exchange": (
        T + "__shared__ alignas(64) int s[64];\ns[t] = a[t];\n__syncwarp();\nb[t] = s[t ^ 31];\n"
        "__syncwarp();\ns[t] = b[t];\n",
        64,
        lambda a: a[np.arange(64) ^ 31],
    ),
    "bytes_of_one_word": (
        T + "__shared__ alignas(64) uchar s[64];\ns[t] = a[t];\n__syncthreads();\n"
        "b[t] = ((uint*)s)[t / 4] >> t % 4 * 8 & 255;",
        64,
        lambda a: a[:64],
    ),
    "copies_in_stages": (
        T
        + "__shared__ alignas(64) int s[128];\nif (t < 16) dcc_copy16(s + t * 4, a + t * 4, 16);\n"
        "dcc_commit();\nif (t < 16) dcc_copy16(s + 64 + t * 4, a + 64 + t * 4, 4 * (t % 5));\n"
        "dcc_commit();\ndcc_wait1();\n__syncthreads();\nint r = s[63 - t];\ndcc_wait0();\n"
        "__syncthreads();\nb[t] = r + 1000 * s[64 + t];",
        64,
        lambda a: (
            a[63::-1] + 1000 * np.where(np.arange(64) % 4 < np.arange(64) // 4 % 5, a[64:], 0)
        ),
    ),
    "atomics": (
        T + "__shared__ alignas(64) int s[4];\nif (t < 4) s[t] = t == 2 ? 1000 : 0;\n"
        "__syncthreads();\n"
        "atomicAdd(s, a[t]);\natomicMax(s + 1, a[t]);\natomicMin(s + 2, a[t] + 7);\n"
        "atomicCAS(s + 3, 0, 5);\n__syncthreads();\nb[t] = s[t % 4];",
        64,
        lambda a: np.tile([a[:64].sum(), 63, 7, 5], 16),
    ),
    "vote": (
        T + "b[t] = __ballot_sync(~0u, a[t] % 3 == 0) + __any_sync(~0u, t == 3);\n"
        "b[t] += 2 * __all_sync(~0u, t < 32);",
        32,
        lambda a: np.full(32, sum(1 << i for i in range(0, 32, 3)) + 3, np.int64).astype(np.int32),
    ),
    "active_mask": (
        T + "b[t] = 0;\nif (t % 2 == 0) return;\nuint m = __activemask();\n"
        "b[t] = m + __shfl_xor_sync(m, t, 2);",
        8,
        lambda a: np.where(np.arange(8) % 2, 0xAA + (np.arange(8) ^ 2), 0),
    ),
    "shuffles_in_parts": (
        T + "b[t] = __shfl_sync(~0u, t, 1, 8) + 100 * __shfl_up_sync(~0u, t, 3, 16)"
        " + 10000 * __shfl_down_sync(~0u, t, 5, 16);",
        32,
        lambda a: np.array(
            [
                (t // 8 * 8 + 1)
                + 100 * (t - 3 if t % 16 >= 3 else t)
                + 10000 * (t + 5 if t % 16 < 11 else t)
                for t in range(32)
            ]
        ),
    ),
    "wide_shuffles": (
        T + "int64_t v = __shfl_xor_sync(~0u, ((int64_t)t << 40) | t, 3);\n"
        "float f = __shfl_xor_sync(~0u, t * 0.5f, 1);\n"
        "b[t] = (int)(v >> 40) * 1000 + (int)(f * 2);",
        32,
        lambda a: (np.arange(32) ^ 3) * 1000 + (np.arange(32) ^ 1),
    ),
    "vectors": (
        T + "if (t < 16) { int4 v = ((int4*)a)[t]; v.x += v.w; ((int4*)b)[t] = v; }",
        64,
        lambda a: np.where(np.arange(64) % 4 == 0, a[:64] + a[3:67], a[:64]),
    ),
    "permute": (
        T + "b[t] = dcc_permute(0x33221100u, 0x77665544u, 0x7106);",
        4,
        lambda a: np.full(4, 0x77110066),
    ),
    "early_end": (
        T + "if (t >= 60) return;\nb[t] = a[t];",
        64,
        lambda a: np.where(ints(64) < 60, a[:64], 0),
    ),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", RIGHT)
def test_right(name, check):
    body, threads, wanted = RIGHT[name]
    for order in range(4):
        a, b = ints(128), np.zeros(128, np.int32)
        launch(body, {"a": a, "b": b}, block=(threads, 1, 1), order=order, check=check)
        want = np.zeros(128, np.int64)
        want[:threads] = wanted(ints(128))[:threads]
        np.testing.assert_array_equal(b, want.astype(np.int32))


def test_grid():
    """Every block and thread of three dimensions has its own indices."""
    body = (
        "int i = ((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);\n"
        "int j = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;\n"
        "b[i * 24 + j] = i * 1000 + j;"
    )
    b = np.zeros(24 * 30, np.int32)
    launch(body, {"b": b}, grid=(5, 2, 3), block=(4, 3, 2))
    np.testing.assert_array_equal(b, (ints(30)[:, None] * 1000 + ints(24)).reshape(-1))


def test_dynamic_shared():
    source = (
        'extern "C" __global__ void k(int* b) {\n'
        "  extern __shared__ alignas(64) uchar buf_dyn_shmem[];\n"
        "  ((int*)buf_dyn_shmem)[threadIdx.x] = threadIdx.x;\n  __syncthreads();\n"
        "  b[threadIdx.x] = ((int*)buf_dyn_shmem)[31 - threadIdx.x];\n}"
    )
    library, memory, b = emulate.load(source), emulate.Memory(), ints(32)
    args = [ctypes.c_void_p(memory.add("b", b))]
    emulate.call(library, "k", (1, 1, 1), (32, 1, 1), args, memory, dynamic=128)
    memory.back()
    np.testing.assert_array_equal(b, ints(32)[::-1])
    with pytest.raises(emulate.EmulatorError, match="at byte 124 of 'dynamic', which has 124"):
        emulate.call(library, "k", (1, 1, 1), (32, 1, 1), args, memory, dynamic=124)


def test_not_a_number():
    """max and min take the number, as on the device; dcc_rint gives 0 and saturates."""
    a = np.array([np.nan, 1, -np.inf, 3e9, -3e9, 0.5, 1.5, -2.5], np.float32)
    b, c, d = (np.zeros(8, kind) for kind in (np.float32, np.float32, np.int32))
    body = T + "b[t] = max(a[t], 2.0f);\nc[t] = min(a[t], -2.0f);\nd[t] = dcc_rint(a[t]);"
    launch(body, {"a": a, "b": b, "c": c, "d": d}, block=(8, 1, 1))
    np.testing.assert_array_equal(b, np.fmax(a, np.float32(2)))
    np.testing.assert_array_equal(c, np.fmin(a, np.float32(-2)))
    np.testing.assert_array_equal(d, [0, 1, -(2**31), 2**31 - 1, -(2**31), 0, 2, -2])


# ---- fragments ----


def fragment(rows, columns, lane_of, words):
    """words of all lanes, each of 4 bytes, from a matrix: `lane_of(row, column)` says where."""
    made = np.zeros((32, words * (4 // rows.dtype.itemsize)), rows.dtype)
    for i in range(rows.shape[0]):
        for j in range(columns):
            lane, index = lane_of(i, j)
            made[lane, index] = rows[i, j]
    return made.view(np.uint32)


# PTX manual, "Matrix Fragments for mma.m16n8k32": groupID = lane >> 2, thread = lane % 4.
# a: row = groupID for i < 4 or 8 <= i < 12, else groupID + 8; column = thread*4 + i&3, and 16 more
# for i >= 8.
# b: row = thread*4 + i&3 (+ 16 for i >= 4), column = groupID.
def a_int8(row, column):
    i = column % 4 + (4 if row >= 8 else 0) + (8 if column >= 16 else 0)
    return (row % 8) * 4 + column % 16 // 4, i


def b_int8(row, column):
    return column * 4 + row % 16 // 4, row % 4 + (4 if row >= 16 else 0)


# "mma.m16n8k16" of .f16: a: row = groupID for i in 0,1,4,5, else + 8; column = thread*2 + i&1, and
# 8 more for i >= 4. b: row = thread*2 + i&1 (+ 8 for i >= 2), column = groupID.
def a_half(row, column):
    i = column % 2 + (2 if row >= 8 else 0) + (4 if column >= 8 else 0)
    return (row % 8) * 4 + column % 8 // 2, i


def b_half(row, column):
    return column * 4 + row % 8 // 2, row % 2 + (2 if row >= 8 else 0)


# "mma.m16n8k8" of .tf32: a0: (groupID, thread), a1: row + 8, a2: column + 4, a3: both.
# b0: row = thread, b1: row = thread + 4, column = groupID.
def a_tf32(row, column):
    return (row % 8) * 4 + column % 4, (1 if row >= 8 else 0) + (2 if column >= 4 else 0)


def b_tf32(row, column):
    return column * 4 + row % 4, row // 4


# c of all three: row = groupID for c0, c1, else + 8; column = thread*2 + i&1.
def c_all(row, column):
    return (row % 8) * 4 + column // 2, column % 2 + (2 if row >= 8 else 0)


@pytest.mark.parametrize("kind", ["u8s8", "s8s8", "f16", "tf32"])
def test_mma(kind):
    rng = np.random.default_rng(3)
    types = {
        "u8s8": (np.uint8, np.int8, np.int32, 32, a_int8, b_int8),
        "s8s8": (np.int8, np.int8, np.int32, 32, a_int8, b_int8),
        "f16": (np.float16, np.float16, np.float32, 16, a_half, b_half),
        "tf32": (np.float32, np.float32, np.float32, 8, a_tf32, b_tf32),
    }
    left, right, total, k, a_of, b_of = types[kind]

    def random(shape, dtype):
        info = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else None
        if info:
            return rng.integers(info.min, info.max + 1, shape).astype(dtype)
        return rng.integers(-64, 65, shape).astype(dtype)  # products and sums are exact

    a, b, c = (
        random((16, k), left),
        random((k, 8), right),
        rng.integers(-99, 99, (16, 8)).astype(total),
    )
    words = {
        "a": fragment(a, k, a_of, 4).reshape(-1),
        "b": fragment(b, 8, b_of, 2).reshape(-1),
        "c": fragment(c, 8, c_all, 4).view(total).reshape(-1),
    }
    body = f"int t = threadIdx.x;\ndcc_mma_{kind}(c + t * 4, a + t * 4, b + t * 2);"
    launch(body, words)
    want = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_array_equal(
        words["c"], fragment(want.astype(total), 8, c_all, 4).view(total).reshape(-1)
    )


def test_tf32_reads_19_bits():
    a = np.full(128, np.float32(1 + 2**-10 + 2**-12)).view(np.uint32)
    b, c = np.full(64, np.float32(1)).view(np.uint32), np.zeros(128, np.float32)
    launch(
        "int t = threadIdx.x;\ndcc_mma_tf32(c + t * 4, a + t * 4, b + t * 2);",
        {"a": a, "b": b, "c": c},
    )
    np.testing.assert_array_equal(c, np.float32(8 * (1 + 2**-10)))


def test_ldmatrix():
    """Lane i of matrix m has the elements 2 (i % 4) and the next of row i / 4."""
    matrices = np.arange(4 * 8 * 8, dtype=np.int16).reshape(4, 8, 8)
    got = np.zeros(128, np.uint32)
    body = (
        "int t = threadIdx.x;\n__shared__ alignas(64) uint s[256];\n"
        "for (int i = 0; i < 4; i++) s[t * 8 + i] = a[t * 4 + i];\n"  # rows 32 bytes apart
        "__syncwarp();\nuint r[4];\ndcc_ldmatrix4(r, s + t * 8);\n"
        "for (int i = 0; i < 4; i++) b[t * 4 + i] = r[i];"
    )
    launch(body, {"a": matrices.reshape(-1).view(np.uint32), "b": got})
    lanes = got.view(np.int16).reshape(32, 4, 2)
    for lane in range(32):
        for m in range(4):
            start = lane % 4 * 2
            np.testing.assert_array_equal(lanes[lane, m], matrices[m, lane // 4, start : start + 2])


def test_half():
    """Every half to f32 and back; rounding of f32 as numpy's, half to even."""
    halves = np.arange(65536, dtype=np.uint32)
    floats, back = np.zeros(65536, np.float32), np.zeros(65536, np.uint32)
    body = (
        "int i = blockIdx.x * 256 + threadIdx.x;\nf[i] = dcc_half_to_float(h[i]);\n"
        "r[i] = dcc_float_to_half(f[i]);"
    )
    launch(body, {"h": halves, "f": floats, "r": back}, grid=(256, 1, 1), block=(256, 1, 1))
    want = halves.astype(np.uint16).view(np.float16)
    np.testing.assert_array_equal(floats, want.astype(np.float32))
    numbers = ~np.isnan(want)
    np.testing.assert_array_equal(back[numbers], halves[numbers])
    values = np.random.default_rng(1).normal(0, 1, 256).astype(np.float32)
    values *= np.float32(10.0) ** np.random.default_rng(2).integers(-9, 6, 256)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    got = np.zeros(256, np.uint32)
    launch(
        "int i = threadIdx.x;\nr[i] = dcc_float_to_half(f[i]);",
        {"f": values, "r": got},
        block=(256, 1, 1),
    )
    np.testing.assert_array_equal(got, rounded)


# ---- the two files of device functions ----


def _signatures(text):
    """Name -> parameters, each a type and a name, of the functions of a file."""
    text, found = re.sub(r"//[^\n]*", "", text), {}
    for name, given in re.findall(r"\b(dcc_\w+)\(([^()]*(?:\(\)[^()]*)*)\)\s*\{", text):
        parameters = [p.split() for p in given.split(",") if p.strip() and "LINE" not in p]
        found[name] = [(" ".join(kind), of) for *kind, of in parameters]
    return found


def test_same_functions():
    """The emulator's device.h has the functions of device.cuh with the same parameters, down to
    where the emulator compiles device.cuh itself."""
    on_device = _signatures(device.prelude().partition(emulate.build.PLAIN_FROM)[0])
    here = _signatures((Path(emulate.build.HERE) / "device.h").read_text())
    assert on_device == here and len(here) > 30


# ---- functions of TVM ----


def _scaled(dtype="float32", unsafe=0):
    """C[i, j] = A[i, j] * 2 for an open number of rows, one block per row."""
    from tvm import tirx
    from tvm.script.ir_builder import IRBuilder
    from tvm.tirx.script import builder as T

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("scaled")
        T.func_attr({"tirx.noalias": True, "dcc.kernel": "scaled"})
        m = tirx.Var("m", "int64")
        a = T.arg("A", T.buffer((m, 40), dtype))
        c = T.arg("C", T.buffer((m, 40), dtype))
        with T.thread_binding(0, m, "blockIdx.x") as row:
            with T.thread_binding(0, 40, "threadIdx.x") as column:
                value = a[row, column + unsafe] * tirx.const(2, dtype)
                T.buffer_store(c, value, [row, column])
    return builder.get()


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "float16", "float64", "int16"])
@pytest.mark.parametrize("m", [0, 1, 7])
def test_run(dtype, m):
    a = np.arange(m * 40).reshape(m, 40).astype(dtype)
    c = np.zeros_like(a)
    assert emulate.run(_scaled(dtype), [a, c]) is None
    np.testing.assert_array_equal(c, a * np.array(2, dtype))


def test_run_finds_overrun():
    a, c = np.zeros((3, 40), np.float32), np.zeros((3, 40), np.float32)
    message = r"scaled_kernel, block \(2,0,0\), thread \(39,0,0\): read of 4 bytes outside .*'A'"
    with pytest.raises(emulate.EmulatorError, match=message):
        emulate.run(_scaled(unsafe=1), [a, c])


def test_report():
    """The text with its values and the name; what comes after the first is dropped."""
    source = (
        "#define DCC_REPORTS\n" + device.prelude() + 'extern "C" __global__ void k(int* a) {\n'
        "  if (a[threadIdx.x] < 0)\n"
        '    dcc_report("DC2100: $: % in % of %", -5000000000ll, threadIdx.x, 7, 0, "name", 4);\n}'
    )
    library, memory, finding = emulate.load(source), emulate.Memory(), emulate.Finding()
    emulate._point_to(library, finding)
    args = [ctypes.c_void_p(memory.add("a", np.array([1, -1, -1, 1] * 8, np.int32)))]
    emulate.call(library, "k", (1, 1, 1), (32, 1, 1), args, memory)
    assert finding.message() == "DC2100: name: -5000000000 in 1 of 7"


def test_without_gxx(monkeypatch):
    """Skipped, with the reason."""
    monkeypatch.setenv("PATH", os.devnull)
    emulate.load.cache_clear()
    with pytest.raises(pytest.skip.Exception, match="g\\+\\+"):
        emulate.load('extern "C" __global__ void k(int* a) {}')
