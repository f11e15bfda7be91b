"""What there is to tune: tasks of models and of deployed shapes, and which of them come first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dccompile import records, registry
from dccompile.errors import UsageError
from dccompile.machine import TARGETS, host
from dccompile.tuning import tasks
from dccompile.tuning.tasks import Peaks, Task
from dccompile.workload import Conv, EmbeddingBag, Gemm, Interaction

V3, V4 = TARGETS["x86-64-v3"], TARGETS["x86-64-v4"]
PEAKS = Peaks(int8=400.0, f32=100.0, cache=50.0, memory=10.0)
GEMM = Gemm(64, 512, 256, "u8", "s8", "u8", zero_point=3)
CONV = Conv(1, (1, 56, 56), 64, 256, (1, 1, 1), bias="s32")
WIDE = Gemm(None, 1024, 1024, "f32", "f32", "f32")


def variant(machine, *works):
    kernels = [
        {"name": registry.select(w, machine).kernel.name, "workload": w.to_json()} for w in works
    ]
    return {"target": machine.name, "kernels": kernels}


def task(work, machine=V3, **fields):
    return Task(registry.select(work, machine).kernel, machine, work.representative(), **fields)


def test_a_manifest_gives_each_workload_once():
    same = replace(GEMM, zero_point=9)  # another number in the same code
    found = tasks.from_manifest({"variants": [variant(V3, GEMM, CONV, same, WIDE)]}, "m")
    assert [t.uses for t in found] == [{"m": 2}, {"m": 1}, {"m": 1}]
    assert [t.kernel.name for t in found] == [
        "gemm_u8s8s32_avx2", "conv_u8s8s32_avx2", "gemm_f32f32f32_avx2",
    ]  # fmt: skip
    assert found[0].workload == GEMM.representative() == same.representative()
    assert found[0].key == f"gemm_u8s8s32_avx2 {records.key(GEMM)}"
    assert all(t.target is V3 for t in found)


def test_a_manifest_of_two_variants():
    manifest = {"variants": [variant(V4, GEMM), variant(V3, GEMM)]}
    assert [t.target for t in tasks.from_manifest(manifest, "m")] == [V4, V3]
    assert [t.target for t in tasks.from_manifest(manifest, "m", V3.name)] == [V3]
    assert [t.uses for t in tasks.merged(tasks.from_manifest(manifest, "m"))] == [{"m": 1}] * 2


def test_models_share_tasks():
    one = tasks.from_manifest({"variants": [variant(V3, GEMM, GEMM, CONV)]}, "one")
    two = tasks.from_manifest({"variants": [variant(V3, CONV, WIDE)]}, "two")
    other = tasks.from_manifest({"variants": [variant(V4, CONV)]}, "one")
    found = tasks.merged([*one, *two, *other])
    uses = [{"one": 2}, {"one": 1, "two": 1}, {"two": 1}, {"one": 1}]
    assert [t.uses for t in found] == uses
    assert one[1].uses == {"one": 1}  # what was merged is as it was
    assert [t.uses for t in tasks.merged([*found, *one])] == uses


def test_the_space_begins_with_the_default_and_has_nothing_twice():
    for work in (GEMM, CONV, WIDE, EmbeddingBag((1000,), 64, pooling=20), Interaction(27, 64)):
        mine = task(work)
        space = mine.space()
        assert space[0] == mine.default() == mine.kernel.default(mine.workload, V3)
        assert len(set(space)) == len(space) > 1
        assert all(mine.kernel.registers(p) <= V3.registers for p in space)
        space.clear()
        assert mine.space()  # callers have their own


def test_globs():
    mine = task(CONV)
    assert mine.label == "conv_u8s8s32_avx2 1x56x56x64 -> 256, 1x1 -> u8 +s32 bias"
    for good in ("conv_u8s8s32_avx2", "conv_*", "*56x56*", "*, 1x1 -> u8*", "*"):
        assert mine.matches(good), good
    for bad in ("gemm_*", "conv", "*3x3*", ""):
        assert not mine.matches(bad), bad


def test_floors():
    ops, nbytes = 2 * 64 * 512 * 256, 64 * 256 + 256 * 512 + 64 * 512
    assert task(GEMM).floor_us(PEAKS) == pytest.approx(ops / 400e3)
    slow = replace(PEAKS, cache=1.0)
    assert task(GEMM).floor_us(slow) == pytest.approx(nbytes / 1e3)
    # larger than the last cache
    large = Gemm(1, 4096, 4096, "f32", "f32", "f32")
    nbytes = 4 * (4096 * 4096 + 2 * 4096)
    assert task(large).floor_us(PEAKS) == pytest.approx(nbytes / 10e3)
    # 3x3 over 8x8x16 -> 32, padding counts as operations
    conv = Conv(1, (1, 8, 8), 16, 32, (1, 3, 3), pads=((0, 0), (1, 1), (1, 1)))
    assert task(conv).floor_us(PEAKS) == pytest.approx(2 * 64 * 32 * 16 * 9 / 400e3)
    # rows of 68 bytes are two lines each; an index has 8
    bag = EmbeddingBag((10**6,), 60, "u8", bags=10, pooling=100)
    assert task(bag).floor_us(PEAKS) == pytest.approx(10 * 100 * (128 + 8) / 10e3)
    pairs = Interaction(27, 64, bags=64)
    assert task(pairs).floor_us(PEAKS) == pytest.approx(2 * 64 * 351 * 64 / 100e3, rel=0.2)


def test_open_dims_are_the_sum_of_what_they_are_tuned_at():
    for work, sizes in (
        (WIDE, [replace(WIDE, m=1), replace(WIDE, m=64)]),
        (replace(CONV, batch=None), [CONV, replace(CONV, batch=4)]),
        (Interaction(27, 64), [Interaction(27, 64, 1), Interaction(27, 64, 64)]),
    ):
        assert tasks.closed(work) == sizes
        both = sum(task(w).floor_us(PEAKS) for w in sizes)
        assert task(work).floor_us(PEAKS) == pytest.approx(both)
    assert tasks.closed(GEMM) == [GEMM]


def test_time_goes_where_the_model_gains_most():
    often = task(GEMM, uses={"m": 4}, totals={"m": 1000.0})
    once = task(GEMM, uses={"m": 1}, totals={"m": 1000.0})
    assert often.priority(100.0, PEAKS, 0) == pytest.approx(4 * once.priority(100.0, PEAKS, 0))
    assert once.priority(100.0, PEAKS, 0) > once.priority(50.0, PEAKS, 0)
    assert once.priority(100.0, PEAKS, 3) == pytest.approx(once.priority(100.0, PEAKS, 0) / 4)
    floor = once.floor_us(PEAKS)
    half = once.priority(2 * floor, PEAKS, 0)
    assert half == pytest.approx(2 * floor / 1000 / 2)
    assert 0 < once.priority(floor, PEAKS, 0) < half / 2  # at the roofline, by an estimate
    assert once.priority(2 * floor, None, 0) == pytest.approx(2 * floor / 1000)
    assert once.priority(None, PEAKS, 0) > 0  # nothing measured yet


def test_a_small_model_weighs_as_much_as_a_large_one():
    small = task(GEMM, uses={"small": 1}, totals={"small": 100.0})
    large = task(GEMM, uses={"large": 10}, totals={"large": 1000.0})
    both = task(GEMM, uses={"small": 1, "large": 10}, totals={"small": 100.0, "large": 1000.0})
    priorities = [t.priority(50.0, PEAKS, 0) for t in (small, large, both)]
    assert priorities[0] == pytest.approx(priorities[1])
    assert priorities[2] == pytest.approx(2 * priorities[0])


def test_deployed_shapes():
    found = tasks.from_shapes(None, V3)
    assert len({t.key for t in found}) == len(found) > 200
    for mine in found:
        assert mine.kernel is registry.select(mine.workload, V3).kernel
        if getattr(mine.workload, "b_bits", 8) == 7:
            assert "s7" in mine.kernel.name
        if isinstance(mine.workload, EmbeddingBag):
            assert mine.workload.rows[0] * mine.workload.row_bytes <= 1 << 30
    ops = {t.workload.op for t in found}
    assert ops == {"gemm", "conv", "embedding_bag"}
    # no shape has more of the job than another by being slow
    times = {t.priority(us, None, 0) for t, us in zip(found, range(1, 999), strict=False)}
    assert len(times) == 1


@pytest.mark.parametrize(
    ("pattern", "kernel"),
    [
        ("depthwise3d", "depthwise_"),
        ("gemm_u8s7s32_avx2", "gemm_u8s7s32_avx2"),
        ("embedding", "embedding_bag_"),
        ("conv_*, 3x3*", "conv_"),
    ],
)
def test_some_deployed_shapes(pattern, kernel):
    found = tasks.from_shapes(pattern, V3)
    assert found and all(t.kernel.name.startswith(kernel) for t in found)


def test_no_deployed_shape():
    with pytest.raises(UsageError, match=r"'gemm_x': .*Fix: name a family \(gemm, ") as error:
        tasks.from_shapes("gemm_x", V3)
    assert error.value.code == "DC2036"


def test_peaks_of_this_machine():
    peaks = Peaks.measure(host())
    assert peaks is Peaks.measure(host())
    assert peaks.int8 > peaks.f32 > 1 and peaks.cache > 1 and peaks.memory > 1


def test_peaks_of_another_machine():
    far = replace(V4, name="far", features=("a_feature_of_the_future",))
    assert Peaks.measure(far) == Peaks.nominal(far)
    assert Peaks.nominal(far).int8 > Peaks.nominal(V3).int8
