"""Trials of kernels: data, races, and what a server makes of candidates that misbehave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import tvm
import tvm_ffi

from dccompile import registry
from dccompile.bench import problems
from dccompile.generic import legalize, stack
from dccompile.machine import TARGETS, cpu_type, missing_features
from dccompile.tuning import children, race, server
from dccompile.tuning.turns import Turns
from dccompile.workload import Conv, EmbeddingBag, Gemm, Interaction, Residual

MACHINE = TARGETS["x86-64-v3"]
GEMM = Gemm(8, 24, 32, "f32", "f32", "f32")
PADS = ((0, 0), (1, 1), (1, 1))


def conv(channels=16, filters=24, **more):
    given = {"kernel": (1, 3, 3), "pads": PADS, **more}
    return Conv(1, (1, 9, 9), channels, filters, **given)


# One or more of every operator, and of everything that its data must have.
WORKLOADS = {
    "gemm": Gemm(5, 40, 70, "u8", "s8", "u8", bias="s32", clamp=(1, 254)),
    "gemm_s8": Gemm(5, 40, 70, "s8", "s8", "s8", bias="f32", bounded=True),
    "gemm_open": Gemm(None, 24, 70, "u8", "s8", "f32", activation="sigmoid", bias="f32"),
    "gemm_runtime": Gemm(6, 24, 70, "u8", "s8", "f32", runtime=True, b_zero=True),
    "gemm_s32": Gemm(6, 24, 70, "s8", "s8", "s32", runtime=True, bias="s32"),
    "gemm_f16": Gemm(6, 24, 70, "f32", "f16", "f32", bias="f32", activation="relu"),
    "gemm_codes": Gemm(6, 24, 70, "f32", "s8", "f32", bias="f32", activation="relu"),
    "conv": conv(bias="s32", shifted=True, clamped=True, padded=True),
    "conv_open": replace(conv(out="s8", bias="f32"), batch=None),
    "conv_f32": conv(a="f32", b="f32", out="f32", bias="f32", activation="clip", clip=(0.0, 6.0)),
    "conv_residual": conv(residual=Residual("u8"), bias="s32", shifted=True),
    "conv_inner": conv(residual=Residual("s8", "u8", True), out="s8"),
    "conv_residual_f32": conv(a="f32", b="f32", out="f32", residual=Residual("f32")),
    "depthwise": conv(filters=16, groups=16, bias="s32", b_bits=7),
    "groups": conv(32, 32, groups=4, out="f32", bias="f32"),
    "bags": EmbeddingBag((90, 7, 30), 20, "u8", bags=5, pooling=12, weighted=True, negative=True),
    "bags_u4": EmbeddingBag((90,), 21, "u4", "f16", layout="offsets", padding=0, index="s32"),
    "bags_f16": EmbeddingBag((90,), 16, "f16", layout="lengths", mode="mean"),
    "bags_f32": EmbeddingBag((90,), 16, layout="offsets+1", bags=9, weighted=True),
    "interaction": Interaction(5, 16),
}


def request(work, **more):
    choice = registry.select(work, MACHINE)
    both = choice.params, choice.params
    asked = server.request(choice.kernel, MACHINE.name, work, *both, seconds=0.01, seed=3)
    return {**asked, **more}


def bad(kind, **more):
    return request(GEMM, **{"kernel": f"gemm_bad_{kind}", "schedule": None, **more})


@pytest.fixture(scope="module")
def good():
    if missing_features(MACHINE.features):
        pytest.skip("not this CPU's instructions")
    with server.Server() as own:
        yield own


@pytest.fixture(scope="module")
def pids(tmp_path_factory):
    return tmp_path_factory.mktemp("hang") / "pids"


@pytest.fixture(scope="module")
def worse(pids):
    class Worse(server.Server):
        entry = (str(Path(__file__).with_name("bad_server.py")),)

    before = os.environ.copy()
    os.environ["HANG_PID"] = str(pids)
    with Worse() as own:
        yield own
    os.environ.clear()
    os.environ.update(before)


# ---- data ----
@pytest.mark.parametrize("name", WORKLOADS)
def test_problems(name):
    work = WORKLOADS[name]
    made, again = problems.make(work, 7), problems.make(work, 7)
    assert len(made) == (2 if name in ("gemm_open", "conv_open") or _open(work) else 1)
    for one, same in zip(made, again, strict=True):
        np.testing.assert_array_equal(one.expected, same.expected)
        assert one.check(same.expected) is None
        assert len(np.unique(one.expected)) > min(20, one.expected.size // 4)
        if work.op in ("gemm", "conv") and work.a != "f32":
            assert {0, 255} == {one.turns[0][0].min(), one.turns[0][0].max()} or work.a == "s8"
        if getattr(work, "out", "") in ("u8", "s8") and one.expected.size > 100:
            inside = np.ptp(np.percentile(one.expected, (10, 90)))
            assert 50 < inside < 250
    other = problems.make(work, 8)[0]
    assert made[0].expected.size == other.expected.size
    assert "values differ" in made[0].check(other.expected)


def _open(work):
    return work.op in ("embedding_bag", "interaction") and work.bags is None


def test_difference_is_named():
    (problem,) = problems.make(WORKLOADS["gemm"])
    got = problem.expected.copy()
    want = int(got[2, 3])
    got[2, 3] ^= 1
    reason = f"1 of 200 values differ, the first at (2, 3): {want ^ 1}, not {want}"
    assert problem.check(got) == reason
    (problem,) = problems.make(GEMM)
    got = problem.expected.copy()
    got[0, 0] = np.nan
    assert "1 of 192 values differ" in problem.check(got)
    assert problem.check(problem.expected * np.float32(1 + 1e-6)) is None


def test_large_tables_repeat_a_block(monkeypatch):
    monkeypatch.setattr(problems, "_BLOCK", 4096)
    work = EmbeddingBag((1000, 3), 16, "u8", bags=40, pooling=30, negative=True)
    kernel = registry.select(work, MACHINE).kernel
    (problem,) = problems.make(work)
    plain = [np.concatenate(list(table)) for table in problem.weights.tables]
    assert [t.shape for t in plain] == [(1000, 24), (3, 24)]
    index = problem.turns[0][0].reshape(-1)
    for table, rows in zip(problem.weights.tables, plain, strict=True):
        at = index[abs(index) < len(rows)]
        np.testing.assert_array_equal(table[at], rows[at])
    w = problems.pack(kernel, work, problem.weights, None)
    np.testing.assert_array_equal(
        w, kernel.pack(work, replace(problem.weights, tables=plain), None)
    )


# ---- time ----
class Fake:
    """Calls that take a given time in nanoseconds, round after round."""

    def __init__(self, *ns):
        self.ns, self.rounds, self.calls = ns, 0, 0

    def run(self, calls, place=0):
        self.rounds += 1
        self.calls += calls + 1
        return calls * self.ns[self.rounds % len(self.ns)]


def test_race():
    found = race.race([Fake(100_000)], [Fake(110_000)], 0.1)
    assert (found["us"], found["against_us"], found["ratio"]) == (100.0, 110.0, 1.1)
    assert found["low"] == found["high"] == 1.1 and found["rounds"] >= 11


def test_race_of_several_sizes():
    ours, theirs = [Fake(100_000), Fake(400_000)], [Fake(200_000), Fake(200_000)]
    found = race.race(ours, theirs, 0.05)
    assert (found["us"], found["ratio"]) == (500.0, 1.0)


def test_losers_stop_early():
    slow = Fake(200_000)
    found = race.race([slow], [Fake(100_000)], 100)
    assert found["ratio"] == 0.5 and 0.01e9 < 200_000 * slow.calls < 0.04e9
    slow = Fake(105_000, 104_000)
    found = race.race([slow], [Fake(100_000)], 100)
    assert 0.95 < found["high"] < 0.98 and 104_000 * slow.calls < 0.1e9
    even = Fake(100_200)
    found = race.race([even], [Fake(100_000)], 0.5)
    assert found["high"] > 0.995 and 100_200 * even.calls > 0.2e9


def test_a_long_kernel_has_few_rounds():
    slow = Fake(500_000_000)
    assert race.race([slow], [Fake(450_000_000)], 0.15)["rounds"] == 5
    middle = Fake(10_000_000)
    assert race.race([middle], [Fake(10_000_000)], 0.15)["rounds"] == 11


def test_incumbent_alone():
    both = [Fake(100_000, 102_000)]
    found = race.race(both, both, 0.1)
    assert found["ratio"] == found["low"] == found["high"] == 1.0
    assert both[0].calls * 101_000 < 0.12e9


def test_bounds_hold_the_median():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        ratios = rng.lognormal(0.01, 0.1, 41)
        rows = [[(1000.0, 1000.0 * r)] for r in ratios]
        found = race._summary(rows)
        assert found["low"] <= found["ratio"] <= found["high"]
        held += found["low"] <= np.exp(0.01) <= found["high"]
    assert 0.92 < held / 300 < 0.995


def test_turns():
    seen = []
    function = tvm_ffi.convert(lambda a, b: seen.append((a.shape[0], b.shape[0])))
    tensors = [tvm_ffi.from_dlpack(np.zeros(n, np.float32)) for n in range(1, 6)]
    calls = Turns([function], [(tensors[4], t) for t in tensors[:3]])
    assert calls.run(4) >= 0
    assert seen == [(5, n) for n in (1, 2, 3, 1, 2)], "one untimed call, then four"
    assert calls.run(1) >= 0
    assert seen[5:] == [(5, 3), (5, 1)], "goes on where it was"

    other = Turns([function, tvm_ffi.convert(lambda a, b: seen.append("other"))], [tensors[:2]])
    for place in range(3):
        other.run(1, place)
    assert seen[7:] == [(1, 2), (1, 2), "other", "other", (1, 2), (1, 2)]

    def fails(a):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        Turns([tvm_ffi.convert(fails)], [(tensors[0],)]).run(3)


# ---- code ----
@pytest.mark.parametrize("name", ["gemm", "depthwise", "bags"])
def test_passes_left_out_change_no_code(name, tmp_path):
    choice = registry.select(WORKLOADS[name], MACHINE)
    func = choice.kernel.build(choice.workload, choice.params, MACHINE)
    func = func.with_attr("global_symbol", "kernel")
    marked = func.with_attr("dcc.kernel", choice.kernel.name)
    code = []
    for path, one in (("a", func), ("b", marked)):
        module = stack.build(tvm.IRModule({"kernel": one}), legalize.target_of(MACHINE))
        module.write_to_file(str(tmp_path / path), "o")
        code.append((tmp_path / path).read_bytes())
    assert code[0] == code[1]


# ---- trials ----
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_operator(good, name):
    work = WORKLOADS[name]
    result = good.run(request(work))
    assert result["status"] == "ok", result["reason"]
    assert result["us"] > 0 and result["p20"] <= result["us"] <= result["p80"]
    assert result["ratio"] == 1.0 and result["rounds"] >= 5
    assert result["cpu"] == cpu_type() and result["worker"] and result["seconds"] > 0


def test_candidate_and_incumbent(good):
    small, large = {"mr": 1, "nr": 1, "lanes": 8}, {"mr": 4, "nr": 2, "lanes": 8}
    result = good.run(request(Gemm(64, 64, 256, "f32", "f32", "f32"), params=small, against=large))
    assert result["status"] == "ok", result["reason"]
    assert result["low"] <= result["ratio"] <= result["high"]
    assert {"build", "llvm", "link", "pack", "check", "race"} <= result["parts"].keys()
    again = good.run(request(Gemm(64, 64, 256, "f32", "f32", "f32"), params=large, against=small))
    assert again["status"] == "ok" and "llvm" not in again["parts"], "both are compiled already"


def test_what_cannot_be_built(good):
    result = good.run(request(GEMM, params={"mr": 4, "nr": 2, "lanes": 8, "depth": 1}))
    assert (result["status"], "depth" in result["reason"]) == ("error", True)
    result = good.run(request(GEMM, workload={**GEMM.to_json(), "n": "many"}))
    assert result["status"] == "error" and "n is 'many'" in result["reason"]
    result = good.run(request(GEMM, workload=WORKLOADS["gemm"].to_json()))
    assert result["status"] == "error" and "refuses" in result["reason"]


REFUSED = {
    "schedule": ("00000000", "00000000 is asked for"),
    "versions": ({"dccompile": "0.0.9"}, "0.0.9 is asked for"),
    "target": ("x86-64-v9", "target x86-64-v9 is not known"),
    "kernel": ("gemm_none", "kernel gemm_none is not known"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused(good, field):
    value, reason = REFUSED[field]
    result = good.run(request(GEMM, **{field: value}))
    assert result["status"] == "refused" and reason in result["reason"]


def test_refused_by_the_cpu(monkeypatch):
    monkeypatch.setattr(children, "missing_features", lambda features: ["avx2"])
    assert "x86-64-v3 needs avx2" in children.refusal(request(GEMM))


# ---- candidates that misbehave ----
def test_wrong(worse):
    result = worse.run(bad("wrong"))
    assert result["status"] == "wrong" and "of 192 values differ" in result["reason"]
    assert "us" not in result, "what is wrong is not timed"


def test_crash(worse):
    result = worse.run(bad("abort"))
    assert result["status"] == "crash"
    assert result["reason"] == "SIGABRT: LLVM ERROR: out of registers"
    result = worse.run(bad("exit"))
    assert (result["status"], result["reason"]) == ("crash", "exit code 3")


def test_error(worse):
    result = worse.run(bad("raise"))
    assert result["status"] == "error"
    assert result["reason"] == "mr=99: 16 are the most. Fix: take fewer"


def test_noise_is_no_result(worse):
    assert worse.run(bad("noise"))["status"] == "ok"


def test_hang_is_killed_at_its_limit(worse, pids):
    result = worse.run(bad("hang", limit=1.5))
    assert (result["status"], result["reason"]) == ("timeout", "killed at its limit of 1.5 s")
    assert _ended(pids)
    assert worse.run(request(GEMM))["status"] == "ok"


def test_server_that_dies_is_started_again(worse):
    result = worse.run(bad("kill"))
    assert (result["status"], result["reason"]) == ("crash", "the server died: SIGKILL")
    assert worse.run(request(GEMM))["status"] == "ok"


def test_server_that_does_not_start():
    class Broken(server.Server):
        entry = ("-c", "raise OSError('no such disk')")

    with Broken() as own:
        result = own.run(request(GEMM))
    assert result["status"] == "crash"
    assert result["reason"] == "the server died: exit code 1: OSError: no such disk"


def _ended(pids):
    """Whether the processes of a file end within seconds."""
    end = time.monotonic() + 10
    left = [int(pid) for pid in pids.read_text().split()]
    pids.unlink()
    while left and time.monotonic() < end:
        left = [pid for pid in left if _runs(pid)]
        time.sleep(0.02)
    return not left


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@contextmanager
def _hanging(worse, pids):
    """A server in the middle of a trial."""
    thread = threading.Thread(target=worse.run, args=(bad("hang", limit=100),))
    worse.run(request(GEMM))
    thread.start()
    while not (pids.exists() and pids.read_text().endswith(" ")):
        time.sleep(0.01)
    yield worse._process
    thread.join(30)
    assert not thread.is_alive()


def test_killed_server_takes_its_trial_along(worse, pids):
    with _hanging(worse, pids) as process:
        assert os.getsid(process.pid) != os.getsid(0), "Ctrl-C of this terminal reaches it"
        trial_pid, other = map(int, pids.read_text().split())
        process.kill()
    pids.write_text(str(trial_pid))
    os.kill(other, signal.SIGKILL)
    assert _ended(pids)


def test_server_ends_with_its_user(worse, pids, tmp_path):
    """In the middle of a trial too, and leaves nothing behind."""
    code = (
        "import json, sys; from dccompile.tuning.server import Server\n"
        f"Server.entry = {worse.entry!r}\n"
        f"Server().run(json.loads({__import__('json').dumps(bad('hang', limit=100))!r}))"
    )
    folder = tmp_path / "temporary"
    folder.mkdir()
    user = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)})
    while not (pids.exists() and pids.read_text().endswith(" ")):
        assert user.poll() is None
        time.sleep(0.01)
    assert list(folder.iterdir())
    user.kill()
    user.wait()
    assert _ended(pids)
    end = time.monotonic() + 10
    while list(folder.iterdir()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not list(folder.iterdir())


def test_interrupted_request_has_no_answer_later(worse, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(server, "_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            worse.run(bad("wrong"))
    assert worse.run(request(GEMM))["status"] == "ok"


def test_run_here():
    first = server.run_here(request(GEMM, schedule="00000000"))
    second = server.run_here(request(GEMM, versions={"tvm": "0"}))
    assert first["status"] == second["status"] == "refused"
    assert first["worker"] == second["worker"]
    server._own(os.getpid()).close()
