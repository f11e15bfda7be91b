"""A tuning server whose kernels misbehave: each does what its name ends with."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np

from dccompile import registry
from dccompile.errors import ScheduleError
from dccompile.tuning import server

good = next(k for k in registry.kernels() if k.name == "gemm_f32f32f32_avx2")
own = type(good)


class Wrong(own):
    name = "gemm_bad_wrong"

    def pack(self, workload, weights, params):
        packed = super().pack(workload, weights, params)
        packed.view(np.float32)[0] += 1
        return packed


class Abort(own):
    name = "gemm_bad_abort"

    def build(self, workload, params, machine):
        print("LLVM ERROR: out of registers", flush=True)
        os.abort()


class Exit(own):
    name = "gemm_bad_exit"

    def build(self, workload, params, machine):
        os._exit(3)


class Hang(own):
    """With a process that it waits for, as a linker that hangs; its number is left in a file."""

    name = "gemm_bad_hang"

    def build(self, workload, params, machine):
        waiting = subprocess.Popen(["sleep", "1000"])
        Path(os.environ["HANG_PID"]).write_text(f"{os.getpid()} {waiting.pid} ")
        while True:
            time.sleep(1)


class Raise(own):
    name = "gemm_bad_raise"

    def build(self, workload, params, machine):
        raise ScheduleError("mr=99: 16 are the most.\n Fix: take fewer")


class Noise(own):
    """Right, but it writes on every descriptor that should not reach whoever reads results."""

    name = "gemm_bad_noise"

    def build(self, workload, params, machine):
        os.write(1, b'{"status": "wrong"}\n')
        os.write(2, b"noise\n")
        return super().build(workload, params, machine)


class Kill(own):
    """Ends the server."""

    name = "gemm_bad_kill"

    def refuses(self, workload):
        os.kill(os.getpid(), 9)


KERNELS = (*(kind() for kind in (Wrong, Abort, Exit, Hang, Raise, Noise, Kill)), good)

if __name__ == "__main__":
    registry.kernels = lambda: KERNELS
    server.main()
