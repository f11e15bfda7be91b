"""What MODEL means on the command line, and the inputs that a command feeds it."""

from __future__ import annotations

import atexit
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, UsageError


@dataclass(frozen=True)
class Source:
    """MODEL resolved: `kind` is onnx, dcm or reference; `path` is None for a reference model."""

    kind: str
    name: str
    path: Path | None = None
    seed: int = 0

    def onnx(self) -> bytes | Path:
        """The ONNX model: its file, or the bytes of a reference model."""
        if self.kind == "onnx":
            assert self.path is not None
            return self.path
        if self.kind == "reference":
            from . import models

            if models.size(self.name) >= models.LARGE:
                return _saved(self.name, self.seed)
            return bytes(models.export(self.name, self.seed).SerializeToString())
        raise UsageError(
            f"MODEL '{self.path}': an artifact, this needs the ONNX model. "
            "Fix: name the .onnx file or the reference model that it was compiled from"
        )

    def shapes(
        self, options: Sequence[str], batches: Sequence[int] = (1,)
    ) -> dict[str, tuple[int | str, ...]] | None:
        """What --shape says; by default what a reference model needs for these batches."""
        given = parse_shapes(options)
        if given is None and self.kind == "reference":
            from . import models

            return models.default_shapes(self.name, batches)
        return given

    def compilable(self) -> Any:
        """What `compile` and `check` take."""
        source = self.onnx()
        return str(source) if isinstance(source, Path) else source


@lru_cache(maxsize=1)
def _saved(name: str, seed: int) -> Path:
    """A large reference model as a file that lasts as long as this process."""
    from . import models

    folder = tempfile.TemporaryDirectory(prefix="dccompile-")
    atexit.register(folder.cleanup)
    path = Path(folder.name) / f"{name}.onnx"
    models.save(name, path, seed)
    return path


def resolve(text: str, seed: int = 0) -> Source:
    """A file by its first bytes, whatever its name; else the name of a reference model."""
    path = Path(text)
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4)
        kind = "dcm" if start == b"PK\x03\x04" or path.suffix == ".dcm" else "onnx"
        return Source(kind, path.stem, path)
    from . import models

    names = [name for name, _ in models.names()]
    if text in names:
        return Source("reference", text, None, seed)
    what = "a folder, not a file" if path.is_dir() else "no such file or reference model"
    raise UsageError(
        f"MODEL '{text}': {what}. Fix: give an .onnx or .dcm file, or one of {', '.join(names)}"
    )


_RANGE = re.compile(r"(\d+)(\.\.(\d+))?")


def parse_shapes(options: Sequence[str]) -> dict[str, tuple[int | str, ...]] | None:
    """``x:1x3x224x224`` or ``x:1..64x13`` per input, as `compile` takes them; None for none."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for option in options:
        name, colon, text = option.rpartition(":")
        dims = text.split("x")
        if not colon or not name or not all(_RANGE.fullmatch(d) for d in dims):
            raise UsageError(
                f"--shape {option!r}: not NAME:DIMxDIM with DIM a number or a range LOW..HIGH. "
                "Fix: write for example --shape x:1..64x13"
            )
        shapes[name] = tuple(d if ".." in d else int(d) for d in dims)
    return shapes or None


def parse_seconds(text: str) -> float:
    """``3s``, ``200ms``, ``1m`` or a plain number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s|m)?", text.strip())
    if not match:
        raise UsageError(f"duration {text!r}: not a time. Fix: write 3s, 200ms or 1m")
    return float(match[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[match[2] or "s"]


def parse_counts(options: Iterable[str], option: str) -> list[int]:
    """Positive whole numbers of repeated or comma-separated options, in order, each once."""
    values: list[int] = []
    for text in options:
        for part in text.split(","):
            if not part.strip().isdigit() or int(part) < 1:
                raise UsageError(
                    f"{option} {text!r}: not a positive whole number. Fix: write {option} 1,2"
                )
            values.append(int(part))
    return list(dict.fromkeys(values))


def make_inputs(
    specs: Iterable[Any], options: Sequence[str] = (), batch: int = 1
) -> dict[str, np.ndarray]:
    """One array per input: what ``NAME=@FILE.npy`` and ``NAME=random:SEED`` say, else random:0.

    `specs` have name, dtype and shape; every open dim of a random input gets `batch`.
    """
    wanted = list(specs)
    given = _assignments(options, [s.name for s in wanted])
    return {
        s.name: _one(s, given.get(s.name, "random:0"), batch, index)
        for index, s in enumerate(wanted)
    }


def _assignments(options: Sequence[str], names: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not (value.startswith("@") or re.fullmatch(r"random:\d+", value)):
            raise UsageError(
                f"--input {option!r}: not NAME=@FILE.npy or NAME=random:SEED. "
                "Fix: write for example --input x=@x.npy"
            )
        if name not in names:
            raise UsageError(
                f"--input {option!r}: the model has no input '{name}', it has {', '.join(names)}. "
                "Fix: name one of these"
            )
        given[name] = value
    return given


def load_array(path: str, option: str) -> np.ndarray:
    """An array of a .npy file; pickled objects are refused."""
    try:
        value = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(f"{option} '{path}': no such file. Fix: check the path") from None
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{option} '{path}': not an array in .npy format ({error}). "
            "Fix: write it with numpy.save"
        ) from None
    if not isinstance(value, np.ndarray):
        raise UsageError(f"{option} '{path}': an .npz archive. Fix: save one array with numpy.save")
    return value


def _one(spec: Any, text: str, batch: int, index: int) -> np.ndarray:
    if text.startswith("@"):
        return load_array(text[1:], f"--input {spec.name}")
    seed = int(text.partition(":")[2])
    shape = [d if isinstance(d, int) else batch for d in spec.shape]
    return random_array(spec.dtype, shape, [seed, index])


def random_array(dtype: str, shape: Sequence[int], seed: Sequence[int]) -> np.ndarray:
    """Standard normal floats, all codes of an 8-bit type, 0 or 1 for other integers (indices)."""
    rng = np.random.default_rng(list(seed))
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    if kind.itemsize == 1 and kind.kind in "iu":
        limits = np.iinfo(kind)
        return rng.integers(limits.min, limits.max + 1, shape).astype(kind)
    return rng.integers(0, 2, shape).astype(kind)


def save_arrays(folder: str, arrays: Mapping[str, np.ndarray]) -> list[Path]:
    """Writes NAME.npy for each, every file whole or not at all; returns the paths."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        files = _file_names(list(arrays))
        return [_save(target / files[name], value) for name, value in arrays.items()]
    except OSError as error:
        raise UsageError(
            f"--output '{folder}': {error.strerror or error}. "
            "Fix: give a folder that can be written"
        ) from None


def _file_names(names: list[str]) -> dict[str, str]:
    """A file for each output: its name without what a file name may not hold, each once."""
    files: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^\w.\-]", "_", name).lstrip(".") or "output"
        while f"{stem}.npy" in files.values():
            stem += "_"
        files[name] = f"{stem}.npy"
    return files


def _save(path: Path, value: np.ndarray) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, value, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_expected(
    outputs: Mapping[str, np.ndarray], options: Sequence[str], rtol: float, atol: float
) -> list[str]:
    """Compares outputs with ``NAME=@FILE.npy``; returns one line per mismatch."""
    bad = []
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not value.startswith("@"):
            raise UsageError(f"--expect {option!r}: not NAME=@FILE.npy. Fix: write y=@ref.npy")
        if name not in outputs:
            raise UsageError(
                f"--expect {option!r}: the model has no output '{name}', "
                f"it has {', '.join(outputs)}. Fix: name one of these"
            )
        want = load_array(value[1:], f"--expect {name}")
        got = outputs[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            raise InputError(
                f"--expect '{name}': the file holds {want.dtype}{list(want.shape)}, the output is "
                f"{got.dtype}{list(got.shape)}. Fix: give the reference of this output"
            )
        close = np.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
        if not close.all():
            gap = np.abs(got.astype(np.float64) - want.astype(np.float64))
            where = np.unravel_index(int(np.argmax(np.where(close, 0, gap))), gap.shape)
            place = [int(i) for i in where]
            bad.append(
                f"output '{name}': {int((~close).sum())} of {close.size} elements differ, most at "
                f"{place}: {got[where]} where {want[where]} was expected"
            )
    return bad
