"""Benches of single kernels: their problems, the peers' routes, the choice of cases, the means."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from dccompile import reference, registry
from dccompile.bench import (
    conv_cases,
    conv_peers,
    gemm_cases,
    gemm_peers,
    kernel_bench,
    kernel_means,
    measure,
)
from dccompile.bench.peers import PEERS, PeerError, compare
from dccompile.bench.suite import Form
from dccompile.console import Progress
from dccompile.errors import UsageError
from dccompile.workload import Conv

U8, FLOAT = conv_cases.FORMS[0], conv_cases.FORMS[-1]
CONVS = {
    "pointwise": (1, 20, 24, 5, 6, 1, 1, 1, 0),
    "strided": (2, 8, 16, 9, 7, 1, 3, 2, 1),
    "group": (1, 32, 32, 6, 5, 8, 3, 1, 1),
    "depthwise": (2, 32, 32, 6, 5, 32, 5, 1, 2),
    "volume": (1, 16, 16, 3, 6, 5, 16, 3, 3, 3, 2, 2, 1, 1),
    "volume dense": (1, 3, 8, 3, 6, 5, 1, 3, 5, 5, 1, 1, 1, 2),
}


@pytest.mark.parametrize("form", gemm_cases.FORMS, ids=str)
def test_single_operator_peers_compute_the_workload(form: Form) -> None:
    work = gemm_cases.workload(form, 5, 48, 68)
    weights, a = gemm_cases.problem(work)
    expected = reference.gemm(work, weights, a)
    ran = []
    for name in gemm_peers.names(work):
        try:
            peer = gemm_peers.prepare(name, work, weights, a, 1)
        except PeerError as error:
            missing = PEERS[name.partition("-")[0]].available()
            assert missing or "unsigned 8-bit" in str(error) or "engine" in str(error)
            continue
        peer.call()
        found = compare(peer.outputs(), [expected])
        assert found.get("steps", 0) <= 1 and found.get("relative", 0) < 1e-5, (name, found)
        ran.append(name)
    assert "onnxruntime" in ran


@pytest.mark.parametrize("form", conv_cases.FORMS, ids=str)
@pytest.mark.parametrize("shape", CONVS.values(), ids=CONVS)
def test_convolution_peers_compute_the_workload(shape: tuple[int, ...], form: Form) -> None:
    work = conv_cases.workload(form, shape)
    weights, a = conv_cases.problem(work)
    expected = reference.conv(work, weights, a)
    ran = []
    for name in conv_peers.names(work):
        try:
            peer = conv_peers.prepare(name, work, weights, a, 1)
        except PeerError as error:
            assert PEERS[name.partition("-")[0]].available() or "engine" in str(error), name
            continue
        peer.call()
        found = compare(peer.outputs(), [expected])
        if name == "torch-fbgemm" and form.b_bits == 8:
            continue  # its depthwise sums of two products saturate at 16 bits
        assert found.get("steps", 0) <= 1 and found.get("relative", 0) < 1e-5, (name, found)
        ran.append(name)
    assert "onnxruntime" in ran


@pytest.mark.parametrize("form", (U8, FLOAT), ids=str)
def test_a_chain_is_the_layer_again_and_again(form: Form) -> None:
    work = conv_cases.workload(form, CONVS["group"])
    weights, expected = conv_cases.problem(work)
    a = expected
    for _ in range(3):
        expected = reference.conv(work, weights, expected)
    for name in conv_peers.names(work):
        if conv_peers.layers(work, name) == 1 or PEERS[name.partition("-")[0]].available():
            continue
        peer = conv_peers.prepare(name, work, weights, a, 1, 3)
        peer.call()
        found = compare(peer.outputs(), [expected])
        # a step apart in one layer may be more in the next
        assert found.get("steps", 0) <= 3 and found.get("relative", 0) < 1e-5, (name, found)


def test_only_layers_that_can_follow_themselves_are_chained() -> None:
    def layers(name: str, peer: str, form: Form = U8) -> int:
        return conv_peers.layers(conv_cases.workload(form, CONVS[name]), peer)

    assert layers("group", "openvino") == layers("group", "onnxruntime", FLOAT) > 1
    assert layers("depthwise", "onnxruntime-nhwc") > 1
    for name in ("pointwise", "strided", "volume", "volume dense"):
        assert layers(name, "openvino") == 1
    assert layers("group", "torch-fbgemm") == 1


def test_problems_fill_the_output_range() -> None:
    for form in gemm_cases.FORMS[:3]:
        gemm = gemm_cases.workload(form, 16, 64, 512)
        weights, a = gemm_cases.problem(gemm)
        assert len(np.unique(reference.gemm(gemm, weights, a))) > 60, form
    for name, shape in CONVS.items():
        for form in conv_cases.FORMS[:2]:
            work = conv_cases.workload(form, shape)
            c = reference.conv(work, *conv_cases.problem(work))
            assert len(np.unique(c)) > 60 and np.mean((c == 0) | (c == 255)) < 0.5, (name, form)


def test_convolutions_of_the_shape_set() -> None:
    suite = conv_cases.Convs()
    counts = {family: len(suite.shapes(family)) for family in suite.families}
    assert counts == {"depthwise2d": 19, "depthwise3d": 8, "groupconv2d": 8, "conv2d": 12}
    for family in suite.families:
        for shape in suite.shapes(family):
            work = suite.workload(U8, shape)
            assert work.depthwise == family.startswith("depthwise")
            assert min(work.outputs) >= 1
    work = suite.workload(U8, (1, 144, 144, 4, 28, 28, 144, 3, 5, 5, 1, 2, 1, 2))
    assert work == Conv(
        1,
        (4, 28, 28),
        144,
        144,
        (3, 5, 5),
        (1, 2, 2),
        pads=((1, 1), (2, 2), (2, 2)),
        groups=144,
        bias="s32",
        shifted=True,
        bounded=True,
        padded=True,
    )
    assert suite.label((1, 144, 144, 4, 28, 28, 144, 3, 5, 5, 1, 2, 1, 2)) == (
        "1x4x28x28x144 3x5x5/1x2x2 depthwise"
    )
    assert suite.label((1, 1024, 2048, 14, 14, 1, 1, 2, 0)) == "1x14x14x1024 > 2048 1x1/2"
    assert suite.label((1, 128, 128, 56, 56, 32, 3, 1, 1)) == "1x56x56x128 3x3 32 groups"


def test_shapes_ship_with_the_package() -> None:
    shapes = gemm_cases.shapes()
    assert (64, 512, 512) in shapes and (156800, 8, 36) in shapes


def test_cases_are_the_kernels_that_would_be_chosen() -> None:
    every = kernel_bench.cases(None, None)
    assert {case.form.b_bits for case in every} == {8}
    for form in gemm_cases.FORMS:
        if form.b_bits == 8:
            mine = [c for c in every if c.form == form and c.family == "gemm"]
            assert sum(len(c.shapes) for c in mine) == len(gemm_cases.shapes())
    for case in every:
        for shape in case.shapes:
            work = case.suite.workload(case.form, shape)
            assert registry.select(work, case.machine).kernel is case.kernel
    assert kernel_bench.cases("gemm", None) == [c for c in every if c.family == "gemm"]
    convs = {"depthwise2d", "depthwise3d", "groupconv2d", "conv2d"}
    assert {c.family for c in kernel_bench.cases("*conv2d", None)} <= convs
    named = kernel_bench.cases("gemm_f32*", None)
    assert {c.kernel.name for c in named} >= {"gemm_f32f32f32_avx2", "gemm_f32f16f32_avx2"}
    assert all(len(c.shapes) == len(gemm_cases.shapes()) for c in named)
    with pytest.raises(UsageError, match="depthwise3d"):
        kernel_bench.cases("no_such_kernel", None)


def samples(*us: float) -> measure.Samples:
    return measure.Samples(np.array(us) * 1e3, 1)


def test_a_peer_is_timed_by_its_chain_or_by_its_call() -> None:
    ours = {kernel_bench.OURS: samples(10, 10), kernel_bench.CALL: samples(20, 20)}
    times = ours | {"openvino": samples(100, 110), "openvino x 5": samples(260, 270)}
    chained: dict[str, Any] = {"difference": {}, "layers": 5}
    kernel_bench._compare("openvino", chained, times)
    assert (chained["us"], chained["ratio"], chained["route"]) == (40, 4.0, "chain of 5")
    assert chained["call"]["us"] == 105 and "layers" not in chained
    called: dict[str, Any] = {"difference": {}, "layers": 1}
    kernel_bench._compare("openvino", called, times)
    assert (called["us"], called["ratio"], called["route"]) == (105, 5.25, "call")
    hidden: dict[str, Any] = {"difference": {}, "layers": 5}
    kernel_bench._compare("openvino", hidden, times | {"openvino x 5": samples(90, 95)})
    assert hidden["route"] == "call" and hidden["ratio"] == 5.25


def test_means_per_kernel_and_per_family() -> None:
    def row(kernel: str, family: str, ratio: float | None) -> dict[str, Any]:
        peers = {"openvino": {"reason": "no"} if ratio is None else {"ratio": ratio}}
        return {
            "kernel": kernel,
            "form": "u8s8->u8",
            "machine": "m",
            "family": family,
            "large": family == "b",
            "peak_share": 0.5,
            "peers": peers,
            "best_ratio": ratio,
        }

    found = kernel_means.summary(
        [row("x", "a", 2.0), row("y", "a", 8.0), row("x", "b", 0.5), row("x", "b", None)]
    )
    kernels = {(m["kernel"], m["family"]): m for m in found["geometric_means"]}
    assert kernels["x", "a"]["best"] == 2.0 and kernels["y", "a"]["best"] == 8.0
    families = {m["family"]: m for m in found["family_means"]}
    assert (families["a"]["best"], families["a"]["faster"], families["a"]["shapes"]) == (4.0, 2, 2)
    assert families["a"]["peak_share_large"] is None
    last = families["b"]
    assert (last["best"], last["best_min"], last["faster"], last["shapes"]) == (0.5, 0.5, 0, 2)
    assert last["ratio"] == {"openvino": 0.5} and last["peak_share_large"] == 0.5


def test_what_the_peers_borrow_lives_while_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    prepare = gemm_peers.prepare

    def watched(*args: Any) -> Any:
        peer = prepare(*args)
        made.append(weakref.ref(peer))
        return peer

    def interleave(runners: dict[str, Any], *_: Any) -> dict[str, measure.Samples]:
        assert made and all(peer() is not None for peer in made)
        return {name: samples(1.0) for name in runners}

    monkeypatch.setattr(gemm_peers, "prepare", watched)
    monkeypatch.setattr(measure, "interleave", interleave)
    case = kernel_bench.cases("gemm", None)[0]
    row = kernel_bench.bench_one(case, (5, 48, 68), 1, 0.01, 0.0, ["onnxruntime", "openvino"])
    assert row["correct"] and row["best_ratio"] == 1.0 and row["peers"][row["best_peer"]]["agrees"]


def test_convolutions_are_benched_by_family(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"conv2d": [CONVS["pointwise"], (1, 16, 16, 6, 5, 1, 3, 1, 1)]}
    monkeypatch.setattr(conv_cases, "deployed", lambda family: small.get(family, []))
    cases = kernel_bench.cases("conv2d", None)
    found = kernel_bench.run(cases, 1, 0.05, 0.001, ["onnxruntime"], Progress(quiet=True))
    rows = found["rows"]
    assert {row["form"] for row in rows} == {"u8s8->u8", "f32f32->f32"} and len(rows) == 4
    for row in rows:
        assert row["correct"] and row["family"] == "conv2d" and row["gops"] > 0
        peers = row["peers"].values()
        assert all(p["agrees"] and p["ratio"] > 0 for p in peers)
        chained = "chain of 5" if "3x3" in row["label"] else "call"
        assert {p["route"] for p in peers} <= {chained, "call"}
        assert row["best_ratio"] == min(p["ratio"] for p in peers)
    assert [m["shapes"] for m in found["family_means"]] == [2, 2]
    assert all(times["ours"] > 0 for times in found["call_overhead_us"].values())
