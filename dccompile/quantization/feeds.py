"""Calibration and validation data: from files or Python to checked feeds, one at a time.

A feed is {input name: array}, what one call of the model takes. In a file every array holds all
samples; it is cut into feeds of the model's batch.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InputError
from ..runtime.tensors import describe
from ..sources import random_array

BATCH = 32  # samples of a feed where the model leaves its batch open

Feed = dict[str, np.ndarray]


class Input(Protocol):
    """What is read of an input: a runtime TensorSpec, or a Value of the gate."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...] | None: ...


def read(
    source: str | os.PathLike[str] | Iterable[Mapping[str, np.ndarray]],
    inputs: Sequence[Input],
    what: str = "--calib",
    *,
    extra: bool = False,
    batch: int = BATCH,
) -> Iterator[Feed]:
    """Feeds for a model with these inputs; a wrong path is found at once, wrong data on the way.

    `source` is an .npz file, a folder of them (in the order of their names), ``random:N`` for N
    random samples, one mapping of arrays as in a file, or an iterable of feeds. The batch is the
    first open leading dim of an input, else the first input's leading dim: arrays of inputs that
    begin with it are cut, into feeds of at most `batch` samples where it is open, else of exactly
    the model's batch; arrays of other inputs belong to every feed whole. Where `extra`, further
    arrays (labels) are allowed too, and cut if they have as many rows as there are samples.

    Raises InputError, which names `what`: DC2120 no such data or not in .npz format, DC2121 a
    missing or unknown array, DC2122 dtype or shape, DC2123 no samples, DC2124 NaN or inf, DC2125
    samples that cannot be cut into feeds, DC2126 not a mapping of arrays.
    """
    reader = _Reader(tuple(inputs), what, extra, batch)
    if isinstance(source, str) and source.startswith("random:"):
        return reader.counted(reader.random(source))
    if isinstance(source, (str, os.PathLike)):
        return reader.counted(reader.files(_files(Path(source), what)))
    if isinstance(source, Mapping):
        return reader.counted(reader.cut(source, "the arrays given"))
    if not isinstance(source, Iterable):
        raise InputError(
            f"{what}: {type(source).__name__}, allowed are a path, 'random:N' and an iterable of "
            "{name: array}. Fix: give one of these",
            "DC2126",
        )
    return reader.counted(reader.feeds(source))


def _files(path: Path, what: str) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InputError(
                f"{what} '{path}': a folder without .npz files. Fix: write some with numpy.savez",
                "DC2120",
            )
        return files
    if not path.is_file():
        raise InputError(
            f"{what} '{path}': no such file or folder. Fix: give an .npz file, a folder of them, "
            "or random:N",
            "DC2120",
        )
    return [path]


class _Reader:
    def __init__(self, inputs: tuple[Input, ...], what: str, extra: bool, batch: int) -> None:
        self.inputs, self.what, self.extra, self.largest = inputs, what, extra, batch
        leads = [spec.shape[0] for spec in inputs if spec.shape]
        opens = [lead for lead in leads if isinstance(lead, str)]
        self.lead: int | str | None = [*opens, *leads, None][0]

    def counted(self, feeds: Iterator[Feed]) -> Iterator[Feed]:
        """The same, but none at all is an error."""
        empty = True
        for feed in feeds:
            empty = False
            yield feed
        if empty:
            raise InputError(
                f"{self.what}: no samples. Fix: give at least one, better a hundred", "DC2123"
            )

    def files(self, paths: list[Path]) -> Iterator[Feed]:
        for path in paths:
            yield from self.cut(self._load(path), f"'{path}'")

    def feeds(self, source: Iterable[Any]) -> Iterator[Feed]:
        for number, feed in enumerate(source):
            here = f"feed {number}"
            if not isinstance(feed, Mapping):
                raise InputError(
                    f"{self.what}, {here}: {type(feed).__name__}, allowed is a dict of arrays. "
                    "Fix: yield {name: array} for every call",
                    "DC2126",
                )
            arrays = self._named(feed, here)
            for spec in self.inputs:
                self._check(spec, arrays[spec.name], here, whole=True)
            self._agree(arrays, here)
            yield arrays

    def random(self, source: str) -> Iterator[Feed]:
        """Feeds of standard normal values; every sample depends on its number alone."""
        count = re.fullmatch(r"random:(\d+)", source)
        if not count:
            raise InputError(
                f"{self.what} '{source}': not random:N. Fix: write for example random:64", "DC2120"
            )
        total = int(count[1])
        for spec in self.inputs:
            if any(dim != self.lead for dim in spec.shape or "?" if isinstance(dim, str)):
                raise InputError(
                    f"{self.what} '{source}': input '{spec.name}' is {_signature(spec)}, only the "
                    f"batch may be open. Fix: fix the others with --shape, or give data",
                    "DC2122",
                )
        first = 0
        for size in self._cuts(total, f"'{source}'"):
            yield {
                spec.name: self._random(spec, first, size, index)
                for index, spec in enumerate(self.inputs)
            }
            first += size

    def _random(self, spec: Input, first: int, size: int, index: int) -> np.ndarray:
        assert spec.shape is not None
        rest = [int(dim) for dim in spec.shape[1:]]
        if not self._is_cut(spec):
            return random_array(spec.dtype, [int(dim) for dim in spec.shape], [0, index])
        rows = [random_array(spec.dtype, rest, [n, index]) for n in range(first, first + size)]
        return np.stack(rows)

    def cut(self, held: Mapping[str, np.ndarray], here: str) -> Iterator[Feed]:
        """Feeds from arrays that hold all samples."""
        arrays = self._named(held, here)
        counts = {}
        for spec in self.inputs:
            array = arrays[spec.name]
            self._check(spec, array, here, whole=not self._is_cut(spec))
            if self._is_cut(spec):
                counts[spec.name] = len(array)
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in '{name}'" for name, count in counts.items())
            raise InputError(
                f"{self.what}, {here}: {found} samples, the same number is allowed. Fix: give "
                "every input the same samples",
                "DC2125",
            )
        total = next(iter(counts.values()), 1)
        first = 0
        for size in self._cuts(total, here):
            feed = {
                name: array[first : first + size]
                if name in counts or (name not in self._names and _rows(array) == total)
                else array
                for name, array in arrays.items()
            }
            self._agree(feed, here)
            yield feed
            first += size

    @property
    def _names(self) -> list[str]:
        return [spec.name for spec in self.inputs]

    def _is_cut(self, spec: Input) -> bool:
        return spec.shape is not None and spec.shape[:1] == (self.lead,)

    def _cuts(self, total: int, here: str) -> Iterator[int]:
        """Samples of each feed."""
        fixed = isinstance(self.lead, int)
        size = self.lead if isinstance(self.lead, int) else self.largest
        if self.lead is None:
            size = total
        if fixed and size and total % size:
            raise InputError(
                f"{self.what}, {here}: {total} samples, the model's batch is {size} and allows "
                f"multiples of it. Fix: leave out {total % size} or add {size - total % size}",
                "DC2125",
            )
        for first in range(0, total, max(size, 1)):
            yield min(size, total - first)

    def _load(self, path: Path) -> Feed:
        try:
            loaded = np.load(path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("one array of a .npy file")
            with loaded:
                return {name: loaded[name] for name in loaded.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            fix = "write it with numpy.savez, arrays of numbers only"
            raise InputError(
                f"{self.what} '{path}': not in .npz format ({reason}). Fix: {fix}", "DC2120"
            ) from None

    def _named(self, held: Mapping[str, np.ndarray], here: str) -> Feed:
        """A dict of row-major arrays that has all the inputs, and others only if allowed."""
        held = dict(held)
        has = ", ".join(f"'{name}'" for name in held) or "none"
        for name in self._names:
            if name not in held:
                raise InputError(
                    f"{self.what}, {here}: input '{name}' is missing, the arrays are {has}. "
                    "Fix: name them as the model's inputs",
                    "DC2121",
                )
        for name, array in held.items():
            if name not in self._names and not self.extra:
                wanted = ", ".join(f"'{name}'" for name in self._names)
                raise InputError(
                    f"{self.what}, {here}: array '{name}' is no input, the inputs are {wanted}. "
                    "Fix: leave it out",
                    "DC2121",
                )
            if not isinstance(array, np.ndarray):
                raise InputError(
                    f"{self.what}, {here}: '{name}' is a {type(array).__name__}, allowed is a "
                    "numpy array. Fix: use numpy.asarray",
                    "DC2126",
                )
        return {name: np.asarray(array, order="C") for name, array in held.items()}

    def _check(self, spec: Input, array: np.ndarray, here: str, whole: bool) -> None:
        """Dtype, shape (but for the number of samples, unless `whole`) and values."""
        shape = spec.shape
        fits = shape is None or array.ndim == len(shape)
        if fits and shape:
            pairs = list(zip(array.shape, shape, strict=True))[not whole :]
            fits = all(got == want or isinstance(want, str) for got, want in pairs)
        if array.dtype != spec.dtype or not fits:
            dims = ["samples", *(shape or ())[1:]] if not whole else shape
            fix = "convert it" if array.dtype != spec.dtype else "give arrays of this shape"
            raise InputError(
                f"{self.what}, {here}: input '{spec.name}' is {describe(array.dtype, array.shape)}"
                f", allowed is {describe(spec.dtype, dims if dims is not None else '?')}. "
                f"Fix: {fix}, nothing is cast or broadcast",
                "DC2122",
            )
        if array.dtype.kind == "f" and array.size and not _all_finite(array):
            index = np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape)
            raise InputError(
                f"{self.what}, {here}: input '{spec.name}' holds {array[index]} at "
                f"{[int(i) for i in index]}, finite values are allowed. Fix: correct the data",
                "DC2124",
            )

    def _agree(self, feed: Feed, here: str) -> None:
        """Dims of the same name are equal."""
        found: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            for got, want in zip(feed[spec.name].shape, spec.shape or (), strict=False):
                if not isinstance(want, str) or want == "?":
                    continue
                other, name = found.setdefault(want, (got, spec.name))
                if other != got:
                    raise InputError(
                        f"{self.what}, {here}: dim '{want}' is {other} in '{name}' and {got} in "
                        f"'{spec.name}', one size is allowed. Fix: give both the same",
                        "DC2122",
                    )


def _signature(spec: Input) -> str:
    return describe(spec.dtype, spec.shape if spec.shape is not None else "?")


def _rows(array: np.ndarray) -> int | None:
    return len(array) if array.ndim else None


def _all_finite(array: np.ndarray) -> bool:
    # NaN and inf survive min and max, which make no array of their own
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
