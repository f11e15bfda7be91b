"""Tensors for kernel tests: 64-byte aligned, between guard bytes, or at the end of memory."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import tvm


def aligned(shape, dtype, guard=0):
    """A 64-byte aligned array of 0x5A bytes, and the bytes around and in it."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(nbytes + 2 * guard + 64, 0x5A, np.uint8)
    start = -raw.ctypes.data % 64 + guard
    return raw[start : start + nbytes].view(dtype).reshape(shape), raw


def tensor(array):
    """A copy of the array that kernels accept."""
    if not array.size:
        return tvm.runtime.tensor(array)
    copy, _ = aligned(array.shape, array.dtype)
    copy[...] = array
    return tvm.runtime.from_dlpack(copy)


def before_a_hole(array):
    """The array at the end of a page that no readable page follows, or up to 63 bytes before."""
    page = mmap.PAGESIZE
    pages = -(-array.nbytes // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    view = np.frombuffer(region, np.uint8)
    hole = ctypes.c_void_p(view.ctypes.data + pages * page)
    assert ctypes.CDLL(None, use_errno=True).mprotect(hole, page, 0) == 0
    start = (pages * page - array.nbytes) // 64 * 64
    copy = view[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    assert copy.ctypes.data % 64 == 0
    copy[...] = array
    return tvm.runtime.from_dlpack(copy), region
