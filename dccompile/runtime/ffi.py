"""The FFI package and compiled libraries, loaded in a way fit for a serving process.

tvm_ffi imports torch if it can (seconds): it is imported here without. Shared libraries go
through anonymous memory: no file is left, and none can change under a running model.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from ..errors import IncompatibleError

__all__ = ["configure_threads", "import_tvm_ffi", "load_library", "load_pool", "local"]

_lock = threading.RLock()
_serial = 0
_pool: ctypes.CDLL | None = None


class _NoTorch:
    """Import hook: to the thread that made it, torch is not installed."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("not needed here", name=name)


def import_tvm_ffi() -> ModuleType:
    """The tvm_ffi package, imported without torch and without building its torch extension."""
    loaded = sys.modules.get("tvm_ffi")
    if loaded is not None and hasattr(loaded, "load_module"):
        return loaded
    switch = "TVM_FFI_DISABLE_TORCH_C_DLPACK"
    before = os.environ.get(switch)
    hook = _NoTorch()
    with _lock:
        os.environ[switch] = "1"
        sys.meta_path.insert(0, hook)  # type: ignore[arg-type]
        try:
            import tvm_ffi
        except (ImportError, OSError, RuntimeError) as error:
            raise IncompatibleError(
                f"package tvm_ffi: cannot be imported: {_line(error)}. "
                "Fix: pip install dccompile again, it brings the right one",
                "DC4012",
            ) from None
        finally:
            sys.meta_path.remove(hook)  # type: ignore[arg-type]
            if before is None:
                os.environ.pop(switch, None)
            else:
                os.environ[switch] = before
    return tvm_ffi


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _open_image(image: memoryview, name: str) -> tuple[int, str]:
    """A file descriptor over a copy of `image`, and a path that dlopen has never seen.

    dlopen recognises a library by its path before it looks at the file, and descriptors are
    reused: the number of the call goes into the path, a 0 as ``./`` and a 1 as ``.//``.
    """
    global _serial
    with _lock:
        _serial += 1
        serial = _serial
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    done = 0
    while done < len(image):
        done += os.write(fd, image[done:])
    return fd, f"/proc/self/fd/{f'{serial:b}'.replace('0', './').replace('1', './/')}{fd}"


def _check_elf(image: memoryview) -> None:
    """Raises OSError unless all that dlopen will map is there: it dies of what is missing."""
    if len(image) < 64 or bytes(image[:6]) != b"\x7fELF\2\1":
        raise OSError("no 64-bit library")
    machine, start, size, count = struct.unpack_from("<18xH12xQ14x2H", image)
    if machine != 62:
        raise OSError("a library for another processor")
    for at in range(start, start + size * count, max(size, 1)):
        if size != 56 or at + size > len(image):
            raise OSError("a library without segments")
        kind, offset, nbytes = struct.unpack_from("<I4xQ16xQ", image, at)
        if kind == 1 and offset + nbytes > len(image):
            raise OSError("a truncated library")


def _dlopen(image: memoryview, name: str, load: Any) -> Any:
    """``load(path)`` for a shared library held in memory."""
    _check_elf(image)
    try:
        fd, path = _open_image(image, name)
    except OSError:
        return _dlopen_file(image, load)
    try:
        return load(path)
    except (OSError, RuntimeError):
        return _dlopen_file(image, load)  # a host may forbid code in anonymous memory
    finally:
        os.close(fd)


def _dlopen_file(image: memoryview, load: Any) -> Any:
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="dccompile-", suffix=".so") as file:
        file.write(image)
        file.flush()
        return load(file.name)


def load_pool(image: memoryview, where: str) -> None:
    """Loads the worker threads' library unless this process has it; it is never unloaded."""
    global _pool
    import_tvm_ffi()
    with _lock:
        if _pool is None:
            try:
                pool = _dlopen(image, "dcc_pool", ctypes.CDLL)
                for function in ("dcc_threads", "dcc_forget", *_CALLS.values()):
                    getattr(pool, function)
                _pool = pool
            except (AttributeError, OSError) as error:
                raise IncompatibleError(
                    f"{where}: the runtime library does not load: {_line(error)}. "
                    "Fix: compile the model again for this machine",
                    "DC4012",
                ) from None


def load_library(
    image: memoryview, name: str, where: str, exports: dict[str, int] | None = None
) -> Any:
    """The tvm_ffi module in a shared library held in memory, apart from every other module.

    `exports` receives the addresses of its C functions for CUDA.
    """
    load = import_tvm_ffi().get_global_func("ffi.Module.load_from_file.so")

    def attached(path: str) -> Any:
        module = load(path, "so")
        _attach(path, exports)
        return module

    try:
        return _dlopen(image, name, attached)
    except (OSError, RuntimeError) as error:
        raise IncompatibleError(
            f"{where}: the library does not load: {_line(error)}. "
            "Fix: compile the model again for this machine",
            "DC4011",
        ) from None


_CALLS = {
    "__TVMBackendParallelLaunch": "dcc_launch",
    "__TVMBackendAllocWorkspace": "dcc_alloc",
    "__TVMBackendFreeWorkspace": "dcc_free",
}


EXPORTS = ("dcc_cuda_attach", "dcc_cuda_stream", "dcc_cuda_status")


def _attach(path: str, exports: dict[str, int] | None) -> None:
    """Points the calls that a loaded library makes into the runtime at ours."""
    import _ctypes

    library = ctypes.CDLL(path)
    try:
        for pointer, function in _CALLS.items():
            try:
                place = ctypes.c_void_p.in_dll(library, pointer)
            except ValueError:
                continue  # it makes no such call
            place.value = ctypes.cast(getattr(_pool, function), ctypes.c_void_p).value
        if exports is not None:
            for name in filter(partial(hasattr, library), EXPORTS):
                exports[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    finally:
        _ctypes.dlclose(library._handle)


class _Local(threading.local):
    """What a Python thread has told the pool: how many threads its parallel loops may use."""

    threads = 0


local = _Local()


def configure_threads(threads: int) -> None:
    """Makes parallel loops of the calling Python thread use so many threads."""
    assert _pool is not None
    _pool.dcc_threads(threads)
    local.threads = threads


def _after_fork() -> None:
    """In a child there are no workers: its first parallel loop starts new ones."""
    global _lock
    _lock = threading.RLock()
    if _pool is not None:
        _pool.dcc_forget()


os.register_at_fork(after_in_child=_after_fork)
