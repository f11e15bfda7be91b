"""The points that tuning tries: distinct, legal, the default among them, and every one exact."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
from kernels import listed, load, marked

pytest.importorskip("tvm", reason="the compiler extra is not installed")

from convolution import Case, build, conv, residual

from dccompile.workload import Conv, EmbeddingBag, Gemm, Interaction

# ---- workloads of every operator; a kernel takes those that it does not refuse ----
GEMMS = {
    f"{m}x{n}x{k} {kind}": Gemm(m, n, k, *types)
    for m, n, k in ((1, 1000, 256), (7, 72, 64), (64, 512, 512), (None, 256, 100))
    for kind, types in {"u8": ("u8", "s8", "u8"), "f32": ("f32", "f32", "f32")}.items()
}
EIGHT = {"bias": "s32"}
FLOAT = {"a": "f32", "b": "f32", "out": "f32", "bias": "f32"}
CONVS = {
    "3x3": ((9, 14), 64, 64, 3),
    "pointwise": ((48, 48), 64, 80),  # more than the least chunk
    "own rows": ((20, 20, 4), 36, 136, (1, 1, 4), 1, 0),
    "first": ((20, 20), 3, 32, 3, 2),
    "depthwise": ((12, 14), 80, 80, 3),
    "depthwise 3d": ((3, 7, 7), 64, 64, 3),
    "groups": ((8, 14), 64, 64, 3),
    "open batch": ((6, 6), 16, 64),
}
GROUPS = {"own rows": 4, "depthwise": 80, "depthwise 3d": 64, "groups": 16}


def convolution(label: str, kind: dict[str, str]) -> Conv:
    batch = None if label == "open batch" else 1
    return conv(*CONVS[label], groups=GROUPS.get(label, 1), batch=batch, **kind)


CONVOLUTIONS = {
    f"{label} {kind['bias']}": convolution(label, kind)
    for label in CONVS
    for kind in (EIGHT, FLOAT)
}
CONVOLUTIONS["residual s32"] = residual(CONVOLUTIONS["pointwise s32"], "u8", "u8")
CONVOLUTIONS["residual f32"] = residual(CONVOLUTIONS["pointwise f32"], "f32")
RESIDUALS = "residual s32", "residual f32"
WORKLOADS = {
    **GEMMS,
    **CONVOLUTIONS,
    **{f"bag {s}": EmbeddingBag((50,), 16, s, pooling=3) for s in ("f32", "f16", "u8", "u4")},
    "interaction": Interaction(27, 64),
}

KERNELS = pytest.mark.parametrize("name", marked(listed("")))
CONV_KERNELS = pytest.mark.parametrize(
    "name", marked([n for n in listed("") if n.split("_")[0] in ("conv", "depthwise", "groupconv")])
)


def taken(kernel, workloads):
    found = {label: w for label, w in workloads.items() if w.op == kernel.op}
    if "s7" in kernel.name:
        found = {label: replace(w, b_bits=7) for label, w in found.items() if w.a == "u8"}
    return {label: w for label, w in found.items() if kernel.refuses(w) is None}


@KERNELS
def test_points(name):
    """Distinct, within the space and the registers, each of an effect of its own."""
    kernel, target = load(name)
    names = {field.name for field in fields(kernel.Params)}
    assert set(kernel.SPACE) == names
    whole = set(kernel.candidates(target))
    for label, work in taken(kernel, WORKLOADS).items():
        points = list(kernel.candidates(target, work))
        default = kernel.default(work, target)
        assert points[0] == default, label
        assert len(set(points)) == len(points), label
        assert len({kernel.effect(work, p) for p in points}) == len(points), label
        for params in points[1:]:
            assert params in whole, (label, params)
        assert set(asdict(default)) == names


@CONV_KERNELS
def test_exact(name):
    """Points that are not the default compute what the reference does."""
    kernel, target = load(name)
    cases = []
    for label, work in taken(kernel, CONVOLUTIONS).items():
        if label.rpartition(" ")[0] not in ("residual", "own rows", "open batch", *GROUPS):
            continue
        points = list(kernel.candidates(target, work))
        chosen = [points[-1], points[len(points) // 3]][: 2 if label in RESIDUALS else 1]
        cases += [Case(kernel, target, work, params) for params in dict.fromkeys(chosen)]
    assert cases
    library = build(cases)
    for case in cases:
        for batch in (1,) if case.work.batch else (1, 3):
            case.run(library, batch)


@CONV_KERNELS
def test_knobs_have_an_effect(name):
    """Two points of a workload are two different functions."""
    kernel, target = load(name)
    for work in list(taken(kernel, CONVOLUTIONS).values())[:1]:
        points = list(kernel.candidates(target, work))
        chosen = points[:: max(1, len(points) // 6)]
        code = {str(kernel.build(work, p, target)) for p in chosen}
        assert len(code) == len(chosen)
