"""Convolution u8 x s8 -> s32, AVX-512 VNNI.

C[p,o] = sum over ky, kx, c of A[p*stride + ky, kx, c] * B[o/16, ky, (kx, c)/4, o%16, c%4]

Channels are last in A, so that kx and c are one run of bytes; no copy of A with its padding is
made: taps outside of A are left out. A tile is mr neighbouring pixels x nr vectors of filters; in
a k-step, of 4 channels of one tap,

    B panel   nr vectors of 64 bytes, one after the other:  o0: c0 c1 c2 c3 | o1: c0 .. c3 | .. o15
    A         4 bytes of every pixel, mr of them `stride` pixels apart, broadcast to all lanes
    C         mr x nr registers, one vpdpbusd each

so mr*nr cycles where one 512-bit vpdpbusd starts per cycle, against (mr + nr)/2 of loads: all
tiles from 4x2 to 13x2 and 4x4 are within 2 % of each other. A panel is read again for every tile:
with weights that come from L3, 13x2 reads them least often and prefetch hides them (ResNet-50's
53 layers in turn: 18.26 ms without, 17.80 with both). With 1 to 3 channels strips of A
are copied with their padding, so that k-steps may read past the last tap of a row: 7x7x3 has 21
bytes a row, 6 k-steps.

Zen 4 at 3.7 GHz, 1 thread, to u8; peak = 473 Gop/s; % of peak of the taps that are inside:

    3x3 56x56x64 484 us 98.7 %   28x28x128 470 us 99.2 %   14x14x256 446 us 99.5 %
    3x3 7x7x512 403 us 99.4 %    stride 2 56x56x128 481 us 99 %   3x3x3 4x7x7x256 1009 us 99 %
    1x1 56x56 256->64 223 us 97.6 %   14x14 1024->512 438 us 99 %   7x7 2048->512 219 us 99 %
    1x1 56x56 64->256 238 us 91 %, + residual 275 us 79 %   7x7 512->2048 + residual 228 us 95 %
    1x1, 4 groups: 75x100x272 740 us 79 %   38x50x544 643 us 92 %   19x25x1088 612 us 97 %
    7x7x3 224x224 stride 2 595 us 82 %   3x3x3 224x224 stride 2 to 32 75 us 61 %

Where K is small the end of a tile is what counts: 16 k-steps for 16 registers in 56x56 64->256.
68 filters a group are 4 vectors and a half one, whose vpdpbusd takes half a cycle (785 us without).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...machine import Machine
from ...workload import Conv
from ._conv_int import IntegerConv
from ._dot import DotVnni

_COLD_BYTES = 512 << 10  # weights that come from L3 or memory: the fewer passes the better
_WARM_BYTES = 64 << 10  # weights that stay in L2 from call to call


@dataclass(frozen=True)
class Params:
    mr: int = 10  # neighbouring pixels kept in registers
    nr: int = 2  # vectors of filters kept in registers
    prefetch: bool = False  # of the next panel of weights to L2
    defer: bool = False  # store a tile during the k-steps of the next
    chunk: int = 1024  # KiB of A, R and C that stay in L2 while panels pass; 0: all by each panel
    ahead: bool = False  # prefetch what tiles of the next chunk read and write


class ConvVnni(DotVnni, IntegerConv):
    name = "conv_u8s8s32_vnni"
    features = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
    Params: Any = Params
    SPACE: ClassVar = {
        "mr": (1, 2, 4, 5, 7, 8, 9, 10, 12, 13),
        "nr": (1, 2, 3, 4, 5),
        "prefetch": (False, True),
        "defer": (False, True),
        "chunk": (0, 256, 1024),
        "ahead": (False, True),
    }
    gops = 450.0

    def registers(self, params: Params) -> int:
        return params.mr * params.nr + params.nr + 1  # C tile, a step of B, one broadcast of A

    def default(self, workload: Conv, machine: Machine) -> Params:
        vectors, nbytes = self.weights_size(workload)
        runs = workload.groups > 1 and workload.kernel == (1, 1, workload.size[2]) != (1, 1, 1)
        pointwise = workload.kernel == (1, 1, 1) or runs
        if (pointwise and nbytes > _COLD_BYTES) or not (pointwise or workload.channels < 4):
            nr = 2 if vectors % 2 == 0 or vectors % 3 else 3
        elif vectors <= 5:
            nr = vectors
        else:
            # three vectors waste a quarter of the packs, a last panel of one the loads of A
            nr = next((n for n in (4, 5, 2) if vectors % n == 0), 5)
        nr = min(nr, vectors)
        mr = {5: 4, 4: 4, 3: 7, 2: 10, 1: 12}[nr]
        if pointwise and nr == 2:
            mr = 13 if nbytes > _COLD_BYTES else 8
        elif workload.channels < 4 and nr == 2:
            mr = 4 if workload.filters % 16 == 0 else 12  # halves are packed by four
        defer = pointwise and workload.residual is not None and workload.group_channels <= 256
        defer = defer and not runs
        return Params(mr, nr, nbytes > _WARM_BYTES, defer)


KERNEL = ConvVnni()
