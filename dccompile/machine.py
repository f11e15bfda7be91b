"""What a kernel may rely on: instruction sets, registers, caches, and how to recognise a host.

A target is a `Machine`: a small record that schedules read instead of hard-coding numbers. The
CPU feature names are those of ``/proc/cpuinfo``; a host has a target if it has all of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import UsageError

_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True)
class Machine:
    """One x86 target.

    `bits` is the vector width, `registers` the number of vector registers, cache sizes are in
    bytes per core (L3: shared). `mcpu` and `mattr` select the code generator's instruction set.
    """

    name: str
    features: tuple[str, ...]
    mcpu: str
    mattr: tuple[str, ...] = ()
    bits: int = 512
    registers: int = 32
    vnni: bool = False
    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 32 << 20

    @property
    def lanes(self) -> int:
        """32-bit lanes of one vector register."""
        return self.bits // 32

    @property
    def isa(self) -> str:
        """Suffix of the kernel names that may use everything this machine has."""
        return "vnni" if self.vnni else "avx512" if self.bits == 512 else "avx2"


TARGETS: dict[str, Machine] = {
    m.name: m
    for m in (
        Machine("x86-64-v3", _V3, "x86-64-v3", bits=256, registers=16),
        Machine("x86-64-v4", _V4, "x86-64-v4"),
        Machine("x86-64-v4-vnni", (*_V4, "avx512_vnni"), "x86-64-v4", ("+avx512vnni",), vnni=True),
    )
}


@dataclass(frozen=True)
class Gpu(Machine):
    """One NVIDIA target: `arch` names the instruction set, ``sm_80``.

    `features` are that of this architecture and of those before it. `registers` is how many one
    thread may have, `bits` the width of a warp's lanes together, `shared` the bytes of shared
    memory that one block may have; the rest describes the largest part of its architecture:
    multiprocessors, clock in GHz, GB/s of memory.
    """

    arch: str = ""
    shared: int = 99 << 10
    multiprocessors: int = 84
    clock: float = 1.7
    bandwidth: float = 700.0

    @property
    def isa(self) -> str:
        """Suffix of the kernel names that may use everything this machine has."""
        return self.arch

    @property
    def host(self) -> Machine:
        """What the code that launches kernels is compiled for."""
        return TARGETS[_HOST]


_ARCHITECTURES = {  # shared memory in KiB, multiprocessors, GHz, GB/s
    "sm_80": (163, 108, 1.41, 2039.0),  # A100
    "sm_86": (99, 84, 1.74, 696.0),  # A40
    "sm_89": (99, 142, 2.52, 864.0),  # L40S
    "sm_90": (227, 132, 1.755, 3350.0),  # H100
    "sm_100": (227, 148, 1.965, 8000.0),  # B200
    "sm_120": (99, 170, 2.407, 1792.0),  # RTX 6000 of Blackwell
}


def _gpu(arch: str) -> Gpu:
    shared, count, clock, bandwidth = _ARCHITECTURES[arch]
    before = [a for a in _ARCHITECTURES if int(a[3:]) <= int(arch[3:])]
    return Gpu(
        f"cuda:{arch}",
        tuple(before),
        _HOST,
        bits=1024,
        registers=255,
        l2=40 << 20,
        arch=arch,
        shared=shared << 10,
        multiprocessors=count,
        clock=clock,
        bandwidth=bandwidth,
    )


_HOST = "x86-64-v3"  # the CPU beside a GPU
GPUS: dict[str, Gpu] = {f"cuda:{arch}": _gpu(arch) for arch in _ARCHITECTURES}


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """CPU feature flags of this host, as ``/proc/cpuinfo`` names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_name() -> str:
    """The CPU's marketing name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return "unknown"


@lru_cache(maxsize=1)
def cpu_type() -> str:
    """This host's kind of CPU, e.g. ``amd-25-17``: vendor, family and model, or ``unknown``."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(found.get("vendor_id", ""))
    if vendor is None or not {"cpu family", "model"} <= found.keys():
        return "unknown"
    return f"{vendor}-{found['cpu family']}-{found['model']}"


def missing_features(features: tuple[str, ...] | list[str]) -> list[str]:
    """Features in the list that this host lacks."""
    have = host_features()
    return [f for f in features if f not in have]


def host() -> Machine:
    """The best target that this host can run.

    Raises UsageError on a host without AVX2.
    """
    for machine in reversed(TARGETS.values()):
        if not missing_features(machine.features):
            return machine
    lacks = ", ".join(missing_features(_V3))
    raise UsageError(
        f"target 'host': this CPU lacks {lacks}, the least target is x86-64-v3. "
        "Fix: name a target with --target and run the artifact on another machine",
        "DC2001",
    )


def find(name: str) -> Machine | None:
    """The target of this name, None if there is none."""
    return TARGETS.get(name) or GPUS.get(name)


def resolve(target: str) -> Machine:
    """The Machine for a target name; ``host`` is the best that this host can run."""
    if target == "host":
        return host()
    machine = find(target)
    if machine is None:
        raise UsageError(
            f"target '{target}': unknown, known are host, {', '.join([*TARGETS, *GPUS])}. "
            "Fix: name one of these",
            "DC2002",
        )
    return machine


def default_threads() -> int:
    """Threads to use: DCCOMPILE_NUM_THREADS, else OMP_NUM_THREADS, else affinity and quota."""
    for variable in ("DCCOMPILE_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(variable, "").split(",")[0].strip()
        if value:
            if not value.isdigit() or int(value) < 1:
                raise UsageError(
                    f"{variable}={value!r}: not a positive whole number. "
                    "Fix: unset it or give the number of threads",
                    "DC2003",
                )
            return int(value)
    return available_cores()


def available_cores() -> int:
    """Cores that this process may use by its affinity mask and cgroup quota."""
    cpus = len(os.sched_getaffinity(0))
    quota = _cgroup_quota()
    return max(1, min(cpus, quota) if quota else cpus)


def _cgroup_quota() -> int | None:
    try:  # cgroup v2, then v1
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else max(1, int(limit) // int(period))
    except (OSError, ValueError):
        pass
    try:
        base = Path("/sys/fs/cgroup/cpu")
        quota, window = (int((base / f"cpu.cfs_{n}_us").read_text()) for n in ("quota", "period"))
        return None if quota <= 0 else max(1, quota // window)
    except (OSError, ValueError):
        return None
