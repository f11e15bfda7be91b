"""torch's single operators on a GPU, for the workloads of ``bench --kernels``.

8-bit products: ``_int_mm``, which is cuBLASLt's s8 x s8 -> s32, and the same in fp16. Convolutions:
cuDNN's in fp16, channels last, its algorithms tried out first; torch has none of 8 bits. Floats: as
they are, without TF32, and in fp16. Bags: ``embedding_bag``; of rows of codes in fp16, for want of
one that reads codes. None of them requantizes: they do less than the kernel beside them.

fp16 operators get what they need to give the kernel's codes but for the last step, the rounding,
and are taken as equal within FP16_STEPS codes, or FP16_RELATIVE of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cuda.replay import Call, Step
from ..workload import INT8_LIMITS, Conv, EmbeddingBag, Gemm
from . import conv_peers
from .gpu_memory import copies
from .peers import PEERS, PeerError, compare, one_line
from .problems import Problem

FP16_STEPS, FP16_RELATIVE = 2, 2e-2
_FLOAT_RELATIVE = 1e-4
_LEAST_M, _MULTIPLE = 17, 8  # of rows, and of K and N, that _int_mm takes

Read = Callable[[Any], np.ndarray]


@dataclass(frozen=True)
class Route:
    """A peer ready to run: `calls` with a copy of the weights each; they start work, no more.

    `differs` compares what the last call gave with what it should be, `steps` and `relative` are
    what may be between them; `note` says what it computes.
    """

    calls: list[Call]
    differs: Callable[[], dict[str, Any]]
    steps: int
    relative: float
    note: str

    def agrees(self, difference: dict[str, Any]) -> bool:
        near = difference.get("steps", 0) <= self.steps
        return near and "shape" not in difference and difference.get("relative", 0) <= self.relative


def names(work: Any) -> list[str]:
    """Routes for a workload."""
    if isinstance(work, Gemm) and work.a != "f32":
        return ["torch-int_mm", "torch-fp16"]
    if isinstance(work, EmbeddingBag):
        return ["torch"] if work.storage in ("f32", "f16") else ["torch-fp16"]
    return ["torch", "torch-fp16"] if work.a == "f32" else ["torch-fp16"]


def prepare(name: str, work: Any, problem: Problem, total: int, place: str = "cuda") -> Route:
    """A route with copies of the weights that fill `total` bytes. Raises PeerError."""
    if reason := missing(place):
        raise PeerError(reason)
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    makers: dict[type, Callable[[Any, Problem, int, str, bool], Route]]
    makers = {Gemm: _gemm, Conv: _conv, EmbeddingBag: _bags}
    maker = _int_mm if name == "torch-int_mm" else makers[type(work)]
    try:
        with torch.inference_mode():
            return maker(work, problem, total, place, name == "torch-fp16")
    except PeerError:
        raise
    except Exception as error:  # whatever the peer throws is its answer
        raise PeerError(one_line(error)) from error


def missing(place: str = "cuda") -> str | None:
    """Why torch cannot be used there; None if it can."""
    if reason := PEERS["torch"].available():
        return reason
    import torch

    if place.startswith("cuda") and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return None


def capture(calls: Sequence[Call]) -> Step | None:
    """The calls as one CUDA graph of torch's; None where that fails."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph):
            for call in calls:
                call(0)
    except Exception:
        return None
    replay: Step = graph.replay
    return replay


def _route(
    make: Callable[[Any], Any],
    weights: Any,
    total: int,
    read: Read,
    expected: np.ndarray,
    half: bool,
    note: str,
) -> Route:
    """`make` computes with the weights, a tensor; `read` makes of that what is `expected`."""
    import torch

    kept = [weights.clone() for _ in range(copies(weights.nbytes, total))]
    last: list[Any] = []

    def start(w: Any) -> Call:
        def call(stream: int) -> None:
            with torch.inference_mode():
                last[:] = [make(w)]

        return call

    def differs() -> dict[str, Any]:
        return compare([read(last[0])], [expected])

    bound = (FP16_STEPS, FP16_RELATIVE) if half else (0, _FLOAT_RELATIVE)
    return Route([start(w) for w in kept], differs, *bound, note)


def _int_mm(work: Gemm, problem: Problem, total: int, place: str, half: bool) -> Route:
    """Rows beyond M, and K and N beyond the workload's, are zeros."""
    import torch

    def rounded(size: int) -> int:
        return -(-size // _MULTIPLE) * _MULTIPLE

    a, b = problem.turns[0][0], problem.weights.b
    rows = len(a) if len(a) >= _LEAST_M else 32
    codes = np.zeros((rows, rounded(work.k)), np.int8)
    codes[: len(a), : work.k] = a.astype(np.int16) - (128 if work.a == "u8" else 0)
    columns = np.zeros((rounded(work.n), rounded(work.k)), np.int8)
    columns[: work.n, : work.k] = b.T
    expected = codes.astype(np.float64) @ columns.T.astype(np.float64)
    x, w = (torch.from_numpy(v).to(place) for v in (codes, columns))
    padded = [f"{n} padded to {got}" for n, want, got in (
        ("M", len(a), rows), ("K", work.k, codes.shape[1]), ("N", work.n, len(columns)),
    ) if want != got]  # fmt: skip
    note = "s8 x s8 -> s32" + (f", {', '.join(padded)}" if padded else "")
    # B by columns, as cuBLASLt wants it
    return _route(
        lambda b: torch._int_mm(x, b.t()), w, total, _read, expected.astype(np.int32), False, note
    )


def _gemm(work: Gemm, problem: Problem, total: int, place: str, half: bool) -> Route:
    import torch

    weights, a = problem.weights, problem.turns[0][0]
    wide = weights.b.astype(np.float32)
    if work.a == "f32":
        wide = wide if weights.scale is None else wide * weights.scale
        bias = weights.bias if work.bias == "f32" else None
    else:
        a = a.astype(np.float32) - weights.a_zero
        wide = wide * weights.scale
        bias = None
    kind = torch.float16 if half else torch.float32
    x = torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(place, kind)
    b = torch.from_numpy(np.ascontiguousarray(wide.T)).to(place, kind)
    c = None if bias is None else torch.from_numpy(bias).to(place, kind)
    linear = torch.nn.functional.linear
    read = _codes(work.out, work.zero_point)
    note = "linear in fp16" if half else "linear in f32 without TF32"
    return _route(lambda w: linear(x, w, c), b, total, read, problem.expected, half, note)


def _conv(work: Conv, problem: Problem, total: int, place: str, half: bool) -> Route:
    import torch

    weights, a = problem.weights, problem.turns[0][0].astype(np.float32)
    rank = conv_peers.rank_of(work)
    b = conv_peers.filters_of(work, weights).astype(np.float32)
    bias = np.zeros(work.filters, np.float32) if weights.bias is None else weights.bias
    zero_point = 0
    if work.a != "f32":
        a, zero_point = a - weights.a_zero, weights.zero_point
        b = b * weights.scale.reshape(-1, *[1] * (b.ndim - 1))
        bias = (bias * weights.scale).astype(np.float32)
    kind = torch.float16 if half else torch.float32
    layout = torch.channels_last if rank == 2 else torch.channels_last_3d
    x = torch.from_numpy(np.ascontiguousarray(a[:, 0] if rank == 2 else a)).to(place, kind)
    x = x.movedim(-1, 1)
    w = torch.from_numpy(b).to(place, kind).contiguous(memory_format=layout)
    c = torch.from_numpy(bias).to(place, kind)
    conv = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[rank]
    found = conv_peers.attributes_of(work)
    if found["pads"][:rank] != found["pads"][rank:]:
        raise PeerError("pads the same before and after only")
    geometry = [list(found["strides"]), found["pads"][:rank], list(found["dilations"])]
    codes = _codes(work.out, zero_point)
    note = f"conv{rank}d in {'fp16' if half else 'f32 without TF32'}, channels last"
    return _route(
        lambda w: conv(x, w, c, *geometry, work.groups), w, total,
        lambda y: codes(y.movedim(1, -1)).reshape(problem.expected.shape),
        problem.expected, half, note,
    )  # fmt: skip


def _bags(work: EmbeddingBag, problem: Problem, total: int, place: str, half: bool) -> Route:
    """Each call has the next set of indices, as the kernel beside it."""
    import torch

    (table,) = problem.weights.tables
    rows = torch.empty((work.rows[0], work.dim), device=place, dtype=_row_type(work, torch))
    at = 0
    for block in table:
        values = torch.from_numpy(_values(work, np.ascontiguousarray(block)))
        rows[at : at + len(values)] = values.to(place)
        at += len(values)
    bag = torch.nn.functional.embedding_bag
    last: list[Any] = []
    sets = [torch.from_numpy(turn[0].reshape(len(turn[0]), -1)).to(place) for turn in problem.turns]

    def start(index: Any) -> Call:
        def call(stream: int) -> None:
            with torch.inference_mode():
                last[:] = [bag(index, rows, mode="sum")]

        return call

    def differs() -> dict[str, Any]:
        start(sets[0])(0)
        return compare([_read(last[0].float())], [problem.expected[:, 0]])

    half = work.storage != "f32"
    bounds = 0, FP16_RELATIVE if half else _FLOAT_RELATIVE
    note = f"embedding_bag of {'fp16' if half else 'f32'} rows"
    return Route([start(index) for index in sets], differs, *bounds, note)


def _row_type(work: EmbeddingBag, torch: Any) -> Any:
    return torch.float32 if work.storage == "f32" else torch.float16


def _values(work: EmbeddingBag, rows: np.ndarray) -> np.ndarray:
    """Rows as stored, in floats."""
    if work.storage in ("f32", "f16"):
        return rows
    size = 2 * (2 if work.scale == "f16" else 4)
    parts = np.ascontiguousarray(rows[:, -size:]).view("<f2" if work.scale == "f16" else "<f4")
    codes = rows[:, :-size]
    if work.storage == "u4":
        codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(rows), -1)[:, : work.dim]
    values = codes * parts[:, :1].astype(np.float32) + parts[:, 1:].astype(np.float32)
    return values.astype(np.float16)


def _read(y: Any) -> np.ndarray:
    found: np.ndarray = y.cpu().numpy()
    return found


def _codes(out: str, zero_point: int) -> Read:
    """Floats as they are, codes rounded, for results in their unit."""
    if out not in INT8_LIMITS:
        return lambda y: _read(y.float())
    low, high = INT8_LIMITS[out]

    def read(y: Any) -> np.ndarray:
        return np.clip(np.rint(_read(y.float())) + zero_point, low, high).astype(np.int16)

    return read
