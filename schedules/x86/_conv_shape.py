"""The geometry of a convolution: which taps an output has, which tiles of outputs look alike.

Outputs are taken in rows (one z, one y, all x), rows in tiles of up to mr neighbours in x. Along
every dimension the taps inside of A are an interval of the kernel; outputs with the same interval
are of one class. A tile's code depends on the classes of its outputs in x only: where a row lies
in y and z is known when it runs, as the interval of (kd, ky) that it has.

    x:   0   1   2   3   4   5   6        kernel 3, pad 1, mr 4
    kx:  12  012 012 012 | 012 012 01     classes: (1, 2) (0, 3) (0, 2)
         tile A            tile B         A: kx 0 of pixels 1-3, then kx 1 and 2 of 0-3

Channels are last, so that neighbouring kx and their channels are one run of bytes of A.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod

from ...workload import Conv

_STRIP = 16 << 10  # elements of a copy of a strip


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def even(total: int, most: int) -> list[int]:
    """`total` in as few parts of at most `most` as possible, nearly equal, larger ones first."""
    parts = ceil_div(total, most)
    return [total // parts + (i < total % parts) for i in range(parts)]


@dataclass(frozen=True)
class Axis:
    """One spatial dimension."""

    size: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0  # padding

    def taps(self, at: int) -> tuple[int, int]:
        """The first tap of output `at` that is inside, and how many are."""
        start = at * self.stride - self.before
        first = max(0, ceil_div(-start, self.dilation))
        last = min(self.kernel, ceil_div(self.size - start, self.dilation))
        return (first, last - first) if last > first else (0, 0)

    @property
    def classes(self) -> list[tuple[int, int]]:
        """Distinct intervals of taps, in the order of the outputs."""
        return list(dict.fromkeys(self.taps(at) for at in range(self.outputs)))

    @property
    def whole(self) -> bool:
        """Whether every output has every tap."""
        return self.classes == [(0, self.kernel)]


@dataclass(frozen=True)
class Run:
    """`taps` taps from `kx` on, of those outputs of a tile that have them."""

    kx: int
    taps: int
    pixels: tuple[int, ...]


@dataclass(frozen=True)
class Tile:
    """mr neighbouring outputs of a row: what its code depends on."""

    mr: int
    runs: tuple[Run, ...]
    classes: tuple[int, ...]  # in x, of every output


@dataclass(frozen=True)
class Segment:
    """`count` equal tiles, one after the other from output x on."""

    tile: Tile
    x: int
    count: int


@dataclass(frozen=True)
class Band:
    """`rows` rows from row `first`, output `pixel` of the image on, of `width` outputs each."""

    first: int
    rows: int
    pixel: int
    width: int
    segments: tuple[Segment, ...]


def tile_of(axis: Axis, x: int, mr: int, classed: bool) -> Tile:
    """The tile of outputs x .. x + mr - 1; `classed`: their classes matter."""
    taps = [axis.taps(x + i) for i in range(mr)]
    have = [
        tuple(i for i, (first, count) in enumerate(taps) if first <= kx < first + count)
        for kx in range(axis.kernel)
    ]
    runs = []
    for pixels, same in groupby(range(axis.kernel), key=lambda kx: have[kx]):
        kxs = list(same)
        if pixels:
            runs.append(Run(kxs[0], len(kxs), pixels))
    known = axis.classes
    return Tile(mr, tuple(runs), tuple(known.index(t) if classed else 0 for t in taps))


def segments(axis: Axis, mr: int, classed: bool) -> tuple[Segment, ...]:
    """A row of outputs in tiles of at most mr."""
    out: list[Segment] = []
    x = 0
    for size in even(axis.outputs, mr):
        tile = tile_of(axis, x, size, classed)
        if out and out[-1].tile == tile:
            out[-1] = Segment(tile, out[-1].x, out[-1].count + 1)
        else:
            out.append(Segment(tile, x, 1))
        x += size
    return tuple(out)


def touched(work: Conv) -> int:
    """Bytes of A, R and C, of an image if their number is open."""
    wide = {"s32": 4, "f32": 4}.get(work.out, 1) + (work.residual is not None)
    pixels = prod(work.size) * work.channels + prod(work.outputs) * work.filters * wide
    return (work.batch or 1) * pixels


class Shape:
    """What the loops of a convolution need to know of `work`.

    - flat: every output has one tap, in its own place, or all of a row, which is its own: rows are
      any outputs one after the other, of all images if their number is known
    - copied: A is read from a copy with bytes to read past its end; if not flat, of a strip: some
      rows of outputs of one image and z, with the padding around it. x, y and z are the strip's
    - joined: neighbouring taps are one run of bytes of A and of whole k-steps
    - span: bytes of A that are read at once where nothing is joined, of `spans` in a row of taps
    """

    def __init__(self, work: Conv) -> None:
        depth = work.group_channels
        dims = zip(
            work.size,
            work.outputs,
            work.kernel,
            work.strides,
            work.dilations,
            (before for before, _ in work.pads),
            strict=True,
        )
        own = [Axis(*values) for values in dims]
        self.work = work
        ones = (1, 1, 1)
        padded = any(p != (0, 0) for p in work.pads)
        own_row = work.kernel == (1, 1, work.size[2]) and work.dilations[2] == 1
        plain = work.strides == ones and not padded
        self.flat = (work.kernel == ones or own_row) and plain
        self.copied = not (depth % 4 == 0 or depth >= 16 or (self.flat and depth >= 4))
        self.images = work.batch
        pixels = work.outputs[0] * work.outputs[1] * work.outputs[2]
        if self.flat:
            if work.batch is not None:
                pixels, self.images = pixels * work.batch, 1
            row = work.kernel[2]
            own = [Axis(1, 1), Axis(1, 1), Axis(pixels * row, pixels, row, row)]
        elif self.copied:
            own = self._strip(own)
        self.z, self.y, self.x = own
        self.pixels = pixels
        whole_rows = work.groups == 1 and self.x.dilation == 1
        self.joined = whole_rows and depth % 4 == 0
        if self.copied and whole_rows:
            self.span, self.spans = self.x.kernel * depth, 1
        else:
            self.span, self.spans = depth, self.x.kernel
        self.span_steps = ceil_div(self.span, 4)
        self.row_steps = self.spans * self.span_steps
        self.steps = self.z.kernel * self.y.kernel * self.row_steps
        # Outputs lack different taps: the part of the sum that stems from A's zero point differs.
        self.classed = work.padded and not self.copied
        self.variants = 1
        if self.classed:
            self.variants = len(self.z.classes) * len(self.y.classes) * len(self.x.classes)

    def _strip(self, own: list[Axis]) -> list[Axis]:
        """As many rows of outputs as what they read fits into the first cache."""
        z, y, x = own
        width = x.size + sum(self.work.pads[2])
        planes, lines = ((axis.kernel - 1) * axis.dilation + 1 for axis in (z, y))
        most = _STRIP // (planes * width * self.work.channels)
        rows = max(1, min(y.outputs, (most - lines) // y.stride + 1))
        rows = ceil_div(y.outputs, ceil_div(y.outputs, rows))
        return [
            Axis(planes, 1, z.kernel, 1, z.dilation),
            Axis((rows - 1) * y.stride + lines, rows, y.kernel, y.stride, y.dilation),
            Axis(width, x.outputs, x.kernel, x.stride, x.dilation),
        ]

    def deferring(self, mr: int) -> bool:
        """Whether a tile of mr outputs can end during the next one: k-steps enough, all alike."""
        return self.flat and self.spans == 1 and self.span >= 8 * mr

    def bands(self, mr: int) -> list[Band]:
        """All rows of an image."""
        if not self.flat:
            row = segments(self.x, mr, self.classed)
            return [Band(0, self.z.outputs * self.y.outputs, 0, self.x.outputs, row)]
        out: list[Band] = []
        first = pixel = 0
        for width, same in groupby(even(self.pixels, mr)):
            rows = len(list(same))
            tile = Tile(width, (Run(0, self.x.kernel, tuple(range(width))),), (0,) * width)
            out.append(Band(first, rows, pixel, width, (Segment(tile, 0, 1),)))
            first, pixel = first + rows, pixel + rows * width
        return out
