"""The compiler's stages, in order: read, recover, place, fuse, plan, generate code.

Everything here runs in the compiler's child process (`worker`), or in `checker` without the last
stage.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tvm import tirx

from . import aot, codegen, linker
from .cache import Cache
from .cuda import build, hostlib
from .errors import TuningError, UnsupportedError
from .frontend import accumulation, convert, gate, operators, recover
from .generic import legalize
from .lookup import Tuning
from .machine import Gpu, Machine
from .runtime import params
from .runtime.params import Stream

_DEVICE = aot.Memory(hostlib.copy, hostlib.read)


@dataclass
class Front:
    """A model after the front end: validated, quantized operators recovered."""

    graph: gate.Graph
    recovered: recover.Recovered


@dataclass
class Lowered:
    """A model lowered for one machine, ready for code generation."""

    machine: Machine
    units: list[codegen.Unit]  # `main` and `plan` together, then every function that main calls
    program: aot.Program
    placed: list[convert.Placed]
    unscheduled: dict[str, str]  # functions that the generic schedule left alone, and why
    warnings: list[str]  # about the tuning logs
    pieces: list[list[int]]  # of params that a GPU needs: first bytes and sizes
    images: list[dict[str, Any]] = field(default_factory=list)  # of a GPU, once generated


@dataclass
class Constants:
    """The params of an artifact: every distinct constant of every variant, once."""

    arrays: list[tuple[str, np.ndarray | Stream]] = field(default_factory=list)
    offsets: dict[bytes, int] = field(default_factory=dict)
    size: int = 0

    def place(self, array: np.ndarray | Stream) -> int:
        """Byte offset of the constant in params, a multiple of 64."""
        if isinstance(array, Stream):
            key = array.key
        else:
            array = np.ascontiguousarray(array)
            digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
            key = digest.digest()
        if key not in self.offsets:
            self.offsets[key] = self.size
            self.arrays.append((f"c{len(self.arrays)}", array))
            self.size += -(-array.nbytes // params.ALIGN) * params.ALIGN
        return self.offsets[key]

    def write(self, path: Path) -> None:
        """Writes the params file."""
        packed = params.pack_params(self.arrays)
        planned = dict(zip((n for n, _ in self.arrays), self.offsets.values(), strict=True))
        if packed.offsets != planned:
            raise AssertionError("the params file is laid out otherwise than the code expects")
        with path.open("wb") as file:
            for chunk in packed.chunks():
                file.write(chunk)


class Pieces:
    """The constants of one variant for a GPU, side by side as its device memory has them.

    `runs` are first bytes and sizes in params of what is copied there, one behind the other.
    """

    def __init__(self, constants: Constants) -> None:
        self.runs: list[list[int]] = []
        self._constants = constants
        self._offsets: dict[tuple[int, int], int] = {}
        self._size = 0

    def place(self, array: np.ndarray | Stream) -> int:
        """Byte offset of the constant in device memory, a multiple of 64."""
        begin = self._constants.place(array)
        nbytes = -(-array.nbytes // params.ALIGN) * params.ALIGN
        if (begin, nbytes) not in self._offsets:
            self._offsets[begin, nbytes] = self._size
            self._size += nbytes
            if self.runs and sum(self.runs[-1]) == begin:
                self.runs[-1][1] += nbytes
            else:
                self.runs.append([begin, nbytes])
        return self._offsets[begin, nbytes]


def front(
    model: str | bytes,
    shapes: dict[str, Any] | None,
    precision: str,
    embedding: str = "keep",
    calibrated: bool = False,
) -> Front:
    """Reads, validates, recovers. Raises ModelError or UnsupportedError listing every problem.

    `calibrated`: sums that the model's metadata say stay in 16 bits are not proven to.
    """
    graph = gate.read(model, shapes)
    facts = accumulation.read_facts(graph.model) if calibrated else None
    recovered = recover.recover(graph.model, graph.constants, precision, embedding, facts)
    problems = [*gate.unknown_operators(graph.model), *operators.hazards(recovered.model)]
    if problems:
        raise UnsupportedError(problems)
    return Front(graph, recovered)


def lower(
    front: Front, machine: Machine, constants: Constants, tuning: Tuning | None = None
) -> Lowered:
    """Everything up to code generation for one machine; adds its constants.

    Kernels have the parameters of the `tuning` logs of this machine, where these speak of them.
    """
    imported = convert.to_relax(front.recovered, machine, front.graph.symbols, tuning)
    mod, unscheduled = legalize.fuse(imported.mod, machine)
    bounds = {name: high for name, (_, high) in front.graph.symbols.items()}
    requirements = [(r.condition, r.message) for r in imported.requirements]
    computed = [(c.symbol, c.bound) for c in imported.computed]
    own = Pieces(constants)
    place, memory = constants.place, aot.HOST
    if isinstance(machine, Gpu):
        place, memory = own.place, _DEVICE
    functions, program = aot.lower(
        mod, bounds, place, imported.streams, requirements, computed, memory
    )
    left = {codegen.symbol(name, mod[name]): why for name, why in unscheduled.items()}
    units = _units(functions, imported.placed, machine)
    warnings = tuning.warnings if tuning else []
    return Lowered(machine, units, program, imported.placed, left, warnings, own.runs)


def kernels(low: Lowered) -> list[dict[str, Any]]:
    """What a manifest says about the hand-written kernels of a variant."""
    return [
        {
            "symbol": p.symbol,
            **p.choice.to_json(),
            "workload": p.choice.workload.to_json(),
            "node": p.site.name,
        }
        for p in low.placed
    ]


def refuse_untuned(model: str, lowered: Sequence[Lowered]) -> None:
    """Raises TuningError, listing them, where kernels have no tuning record."""
    for low in lowered:
        lacking = {
            f"{p.choice.kernel.name} ({p.choice.workload.describe()})": None
            for p in low.placed
            if p.choice.source == "default"
        }
        if lacking:
            target = low.machine.name
            count = f"{len(lacking)} kernel{'s have' if len(lacking) > 1 else ' has'}"
            raise TuningError(
                f"'{model}' for {target}: {count} no tuning record, --require-tuned allows none: "
                f"{'; '.join(lacking)}. Fix: dccompile tune MODEL --target {target}",
                "DC7020",
            )


def _units(
    functions: dict[str, tirx.PrimFunc], placed: list[convert.Placed], machine: Machine
) -> list[codegen.Unit]:
    kernels = {p.symbol: p.choice for p in placed}
    entry = {name: functions.pop(name) for name in ("main", "plan")}
    host = machine.host if isinstance(machine, Gpu) else machine
    units = [codegen.entry_unit(entry, sorted(functions), host)]
    for symbol, func in sorted(functions.items()):
        if symbol in kernels:
            units.append(codegen.kernel_unit(symbol, kernels[symbol], machine))
        else:
            units.append(codegen.function_unit({symbol: func}, machine))
    return units


def generate(
    lowered: Sequence[Lowered],
    libraries: Sequence[Path],
    cache: Cache,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the shared library of each variant; arguments as for `codegen.objects`.

    The kernels of a GPU's variant go into a folder beside its library, of the library's name.
    """
    with tempfile.TemporaryDirectory(dir=libraries[0].parent) as folder:
        units = [u for low in lowered for u in low.units]
        paths = codegen.objects(units, Path(folder), cache, processes, progress)
        for low, library in zip(lowered, libraries, strict=True):
            mine = [paths[u.key] for u in low.units]
            if isinstance(low.machine, Gpu):
                mine = _unpacked(low, mine, library.with_suffix(""))
            linker.link(mine, library)


def _unpacked(low: Lowered, paths: list[Path], folder: Path) -> list[Path]:
    """The object files to link; writes the kernels' code and notes it in `low.images`."""
    folder.mkdir()
    objects = paths[:1]
    kernels: list[str] = []
    for path in paths[1:]:
        built = build.unpack(path.read_bytes())
        objects.append(path.with_suffix(".host.o"))
        objects[-1].write_bytes(built.host)
        image: dict[str, Any] = {"kernels": list(built.kernels)}
        for kind, code in (("cubin", built.cubin), ("ptx", built.ptx)):
            file = folder / f"{built.kernels[0]}.{kind}"
            file.write_bytes(code)
            image[kind] = f"lib/{folder.name}/{file.name}"
        low.images.append(image)
        kernels += built.kernels
    hostlib.build(kernels, paths[0].with_suffix(".launch.o"))
    return [*objects, paths[0].with_suffix(".launch.o")]
