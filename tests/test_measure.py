"""Timing in turns, the measured peaks, and the peers that ours is compared with."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest

from dccompile.bench import measure
from dccompile.bench.peers import PEERS, PeerError, aligned, compare, one_line, parse
from dccompile.errors import UsageError
from dccompile.machine import host


def test_interleave_takes_turns_and_fills_samples() -> None:
    order: list[str] = []
    quiet: list[bool] = []

    def runner(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            quiet.append(not gc.isenabled())
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return run

    found = measure.interleave({"a": runner("a", 1e-5), "b": runner("b", 3e-4)}, 0.02, 0.001)
    rounds = len(found["a"].ns)
    assert rounds == len(found["b"].ns) >= measure.MIN_ROUNDS
    assert found["a"].inner * 1e4 >= 0.5 * measure.MIN_SAMPLE_NS
    assert found["b"].inner == 1
    assert all(quiet) and gc.isenabled()
    turn = ["a"] * (1 + found["a"].inner) + ["b"] * (1 + found["b"].inner)
    assert order[-rounds * len(turn) :] == turn * rounds
    assert measure.ratio(found["b"], found["a"]) > 5


def test_interleave_restores_the_collector_after_an_error() -> None:
    def fails() -> None:
        raise RuntimeError("as asked")

    with pytest.raises(RuntimeError, match="as asked"):
        measure.interleave({"a": fails}, 0.01, 0)
    assert gc.isenabled()


def test_threads_wait_for_idle_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    monkeypatch.setattr(measure, "_settle", lambda: settled.append(1))
    monkeypatch.setattr(measure, "MIN_SAMPLE_PARALLEL_NS", 1000)
    found = measure.interleave({"a": lambda: None, "b": lambda: None}, 0.001, 0, threads=2)
    assert len(settled) == 2 * len(found["a"].ns)


def test_a_loop_times_itself() -> None:
    calls: list[int] = []

    def run(count: int) -> float:
        calls.append(count)
        return 250.0 * count

    found = measure.interleave({"loop": measure.Loop(run)}, 0.001, 0)["loop"]
    assert found.us == found.p20 == found.p80 == 0.25
    assert found.inner * 250 >= measure.MIN_SAMPLE_NS and calls[-1] == found.inner
    assert found.to_json()["samples_ns"][0] == 250.0


def test_ratio_is_taken_pair_by_pair() -> None:
    ours = measure.Samples(np.array([1.0, 10.0, 100.0]), 1)
    other = measure.Samples(np.array([2.0, 20.0, 200.0, 9e9]), 1)
    assert measure.ratio(other, ours) == 2.0
    assert measure.ratio(ours, other) == 0.5


def test_geometric_mean() -> None:
    assert measure.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert np.isnan(measure.geometric_mean([]))


def test_peaks_of_this_host_are_plausible() -> None:
    machine = host()
    rates = {}
    for peak in (measure.int8_peak(machine), measure.fma_peak(machine)):
        rates[peak.instruction] = peak.gops(measure.interleave({"p": peak.loop}, 0.05, 0.01)["p"])
    ints, floats = rates.values()
    # 4 products a lane with vpdpbusd, 2 with vpmaddwd, 1 with an FMA
    assert 1.3 < ints / floats < 6
    assert 5 < floats < 2000  # Gop/s of one core
    assert 0.5 < measure.stream_gbs(machine, mib=64) < 1000


def test_a_peer_that_refuses_says_why_on_one_line() -> None:
    for name in ("onnxruntime", "openvino", "torch", "tvm"):
        with pytest.raises(PeerError) as caught:
            PEERS[name].prepare(b"no model", {"x": np.zeros(1, np.float32)}, 1)
        assert "\n" not in str(caught.value) and len(str(caught.value)) > 10
    assert one_line(ValueError("\n first \n second")) == "ValueError: first"


def test_a_missing_peer_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(PEERS["openvino"]), "module", "no_such_module_here")
    reason = PEERS["openvino"].available()
    assert reason is not None and "pip install openvino" in reason
    with pytest.raises(PeerError, match="not installed"):
        PEERS["openvino"].prepare(b"", {}, 1)


def test_peer_lists() -> None:
    assert [p.name for p in parse("tvm, onnxruntime,tvm")] == ["tvm", "onnxruntime"]
    for text in ("", "oonx", "onnxruntime,nope"):
        with pytest.raises(UsageError):
            parse(text)


def test_compare_counts_steps_and_relative_error() -> None:
    u8 = np.array([1, 250], np.uint8)
    assert compare([u8], [np.array([4, 250], np.uint8)]) == {"steps": 3}
    f = np.array([1.0, -4.0, np.nan], np.float32)
    g = np.array([1.0, -4.4, np.nan], np.float32)
    assert compare([f], [g])["relative"] == pytest.approx(0.4 / 4.4)
    assert compare([f], [np.array([1.0, -4.0, 0.0])])["relative"] == np.inf
    assert compare([u8], [f])["shape"] == "[2] against [3]"
    assert "outputs" in compare([u8], [])["shape"]
    assert compare([np.zeros((0, 3))], [np.zeros((0, 3))]) == {}


def test_aligned_copies() -> None:
    for array in (np.arange(7, dtype=np.int8), np.array(3.0), np.zeros((0, 4), np.float32)):
        copy = aligned(array)
        assert copy.dtype == array.dtype and (copy.ctypes.data % 64 == 0 or not copy.size)
        np.testing.assert_array_equal(copy, array)
