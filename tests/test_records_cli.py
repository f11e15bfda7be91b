"""``dccompile records``: every state of a line by name, merging, pruning, coverage, replaying."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shell as shell_of_tests
from onnx import TensorProto, helper, numpy_helper

from dccompile import fingerprint, machine, records, registry
from dccompile.cli import main as cli
from dccompile.records import Record
from dccompile.tuning import cluster, maintain
from dccompile.workload import Gemm

TARGET = machine.TARGETS["x86-64-v3"]
KERNEL = next(k for k in registry.kernels() if k.name == "gemm_f32f32f32_avx2")
HERE = machine.cpu_type()
WORK = Gemm(64, 128, 96, "f32", "f32", "f32")
OTHER = replace(WORK, m=16)


def made(work: Gemm = WORK, gain: float = 1.2, **changes: Any) -> Record:
    """A valid record in which another candidate than the default won."""
    default = KERNEL.default(work, TARGET)
    params = next(p for p in KERNEL.candidates(TARGET, work) if p != default)
    shape, form = records.split(work)
    record = Record(
        kernel=KERNEL.name,
        target=TARGET.name,
        shape=shape,
        form=form,
        params=asdict(params),
        us=10.0,
        p20=9.5,
        p80=10.5,
        default_us=10.0 * gain,
        gain=gain,
        threads=1,
        tried=12,
        cpu=HERE,
        tvm="0.27.0",
        schedule=fingerprint.schedule(KERNEL),
        date="2026-11-23",
    )
    return replace(record, **changes)


def log(folder: Path, *lines: Record | str, kernel: str = "", target: str = "") -> Path:
    """Writes lines as they are to a log; records are sorted unless told otherwise by the order."""
    path = folder / (target or TARGET.name) / f"{kernel or KERNEL.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else line.to_line() for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


class Shell(shell_of_tests.Shell):
    """Runs ``dccompile records`` in this process."""

    def __call__(self, *args: object, code: int = 0) -> tuple[str, str]:
        """stdout and stderr; fails unless the exit code is `code`, and says why it is."""
        out, err = super().__call__("records", *args, code=code)
        errors = [line for line in err.splitlines() if line.startswith("error DC")]
        assert len(errors) == bool(code) and all(". Fix: " in line for line in errors)
        return out, err

    def json(self, *args: object, code: int = 0) -> dict[str, Any]:
        body = json.loads(self(*args, "--json", code=code)[0])
        assert body["schema"] == "dccompile.records/1" and body["action"] == args[0]
        assert body["environment"]["versions"]["dccompile"]
        return dict(body)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


# ---- verify ----


def test_a_good_folder_verifies(shell: Shell, tmp_path: Path) -> None:
    log(tmp_path, made(OTHER), made(WORK))
    log(tmp_path, "not a winner", target="losers/x86-64-v3")
    out, _ = shell("verify", tmp_path)
    assert out.splitlines()[1].split() == [
        *(f"{TARGET.name}/{KERNEL.name}.jsonl", "2", "2", "0", "0", "0", "0", "0")
    ]
    body = shell.json("verify", tmp_path)
    assert body["problems"] == [] and [f["ok"] for f in body["files"]] == [2]


def test_the_packaged_logs_verify(shell: Shell) -> None:
    shell("verify")


def test_unknown_fields_are_no_problem(shell: Shell, tmp_path: Path) -> None:
    log(tmp_path, made(extra={"host": "rack 7"}))
    shell("verify", tmp_path)


def field(name: str, value: Any) -> Callable[[], str]:
    """The line of a valid record with one field of it changed."""
    return lambda: json.dumps({**json.loads(made().to_line()), name: value}, sort_keys=True)


def without(name: str) -> Callable[[], str]:
    def line() -> str:
        values = json.loads(made().to_line())
        del values[name]
        return json.dumps(values)

    return line


BAD = {
    "torn": (lambda: made().to_line()[:60], "broken", "not JSON"),
    "a list": (lambda: "[1, 2]", "broken", "list"),
    "no params": (without("params"), "broken", "params"),
    "us is text": (field("us", "fast"), "broken", "us"),
    "gain is 0": (field("gain", 0.0), "broken", "gain"),
    "other schedule": (field("schedule", "00000000"), "stale", "00000000"),
    "unknown knob": (field("params", {"mr": 4, "tiles": 2}), "illegal", "tiles"),
    "illegal value": (
        lambda: made(params={**made().params, "mr": 7}).to_line(),
        "illegal",
        "mr=7",
    ),
    "too many registers": (
        lambda: made(params={**made().params, "mr": 12, "nr": 6}).to_line(),
        "illegal",
        "16",
    ),
    "shape of nothing": (field("shape", {"m": 1, "o": 2}), "illegal", "operator"),
    "size 0": (field("shape", {"m": 0, "n": 128, "k": 96}), "illegal", "sizes are positive"),
    "half a character": (field("form", {**made().form, "\ud800": 1}), "illegal", "ud800"),
    "of another operator": (
        field("shape", {"bags": None, "vectors": 8, "dim": 16}),
        "illegal",
        "",
    ),
    "refused": (field("form", {"a": "u8", "b": "s8", "out": "s32"}), "illegal", KERNEL.name),
    "not the representative": (
        lambda: made(form={**made().form, "activation": "clip", "clip": [0.0, 3.0]}).to_line(),
        "illegal",
        "stands for",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_verify_names_what_is_wrong(shell: Shell, tmp_path: Path, name: str) -> None:
    line, state, word = BAD[name]
    path = log(tmp_path, made(OTHER), line())
    out, err = shell("verify", tmp_path, code=7)
    assert "DC7040" in err and "1 of 2 lines" in err
    found = [text for text in out.splitlines() if text.startswith(str(path))]
    assert len(found) == 1 and found[0].startswith(f"{path}:2: {state}: ") and word in found[0]
    counts = shell.json("verify", tmp_path, code=7)["files"][0]
    assert (counts["ok"], counts[state]) == (1, 1)


def test_a_log_of_no_kernel_or_target_is_illegal(shell: Shell, tmp_path: Path) -> None:
    log(tmp_path, made(), kernel="gemm_u1u1s32_avx2")
    log(tmp_path, made(), target="x86-64-v9")
    log(tmp_path, made(), kernel="gemm_f32f32f32_avx512")  # that target lacks the instructions
    reasons = "\n".join(shell.json("verify", tmp_path, code=7)["problems"])
    assert "no kernel is called 'gemm_u1u1s32_avx2'" in reasons
    assert "target 'x86-64-v9'" in reasons and "avx512" in reasons


def test_duplicates_and_order(shell: Shell, tmp_path: Path) -> None:
    log(tmp_path, made(WORK, gain=1.3), made(OTHER), made(WORK, gain=1.1))
    body = shell.json("verify", tmp_path, code=7)
    assert [p.rsplit(":", 3)[1:3] for p in body["problems"]] == [
        ["2", " unsorted"],
        ["3", " duplicate"],
    ]


@pytest.mark.parametrize("action", ["verify", "prune", "replay", "stats"])
def test_no_such_folder(shell: Shell, tmp_path: Path, action: str) -> None:
    where = ["--log"] if action == "stats" else []
    _, err = shell(action, *where, tmp_path / "none", code=2)
    assert "DC2031" in err and "no such folder" in err


# ---- prune ----


def test_prune_drops_what_is_of_no_use(shell: Shell, tmp_path: Path) -> None:
    good = made(OTHER, extra={"host": "rack 7"})
    stale = made(WORK, schedule="00000000")
    path = log(tmp_path, made(WORK, threads=2), stale, good, good, "torn {")
    empty = log(tmp_path, "torn", kernel="conv_u8s8s32_avx2")
    before = path.read_text()
    out, _ = shell("prune", tmp_path, "--dry-run")
    assert "4 lines would be dropped, 2 stay" in out
    assert path.read_text() == before and empty.exists()
    out, _ = shell("prune", tmp_path)
    assert "4 lines dropped, 2 stay" in out and f"{path}:5: broken" in out
    assert path.read_text() == f"{good.to_line()}\n{made(WORK, threads=2).to_line()}\n"
    assert not empty.exists()
    shell("verify", tmp_path)


def test_prune_leaves_good_logs_alone(shell: Shell, tmp_path: Path) -> None:
    path = log(tmp_path, made(OTHER), made(WORK))
    before = path.stat()
    shell("prune", tmp_path)
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


# ---- merge ----


@pytest.mark.parametrize(
    ("here", "there", "wins"),
    [
        ({}, {"date": "2026-11-24"}, "there"),
        ({"date": "2026-11-24"}, {}, "here"),
        ({"gain": 1.1}, {"gain": 1.3}, "there"),
        ({"gain": 1.3}, {"gain": 1.1}, "here"),
        ({"schedule": "00000000", "date": "2026-11-25"}, {}, "there"),
        ({}, {"schedule": "00000000", "date": "2026-11-25"}, "here"),
        ({}, {}, "here"),
    ],
)
def test_merge_keeps_the_better(
    shell: Shell, tmp_path: Path, here: dict[str, Any], there: dict[str, Any], wins: str
) -> None:
    mine, theirs = made(**here, us=1.0), made(**there, us=2.0)
    path = log(tmp_path / "here", mine)
    log(tmp_path / "there", theirs)
    body = shell.json("merge", tmp_path / "there", "--log", tmp_path / "here")
    assert (body["added"], body["replaced"], body["kept"]) == (0, wins == "there", wins == "here")
    assert path.read_text() == f"{(theirs if wins == 'there' else mine).to_line()}\n"


def test_merge_adds_and_leaves_out(shell: Shell, tmp_path: Path) -> None:
    illegal = made(params={"mr": 99})
    log(tmp_path / "a", made(OTHER), made(WORK, cpu="intel-6-143", extra={"host": "rack 7"}))
    log(tmp_path / "b", illegal, "torn {")
    path = log(tmp_path / "logs", made(WORK), "kept as it is")
    out, _ = shell("merge", tmp_path / "a", tmp_path / "b", "--log", tmp_path / "logs")
    assert "2 added, 0 replaced, 1 kept, 2 left out" in out
    texts = path.read_text().splitlines()
    assert len(texts) == 4 and texts[-1] == "kept as it is" and "rack 7" in texts[-2]
    # into a folder that is not there yet, and twice the same
    for added in (2, 0):
        body = shell.json("merge", tmp_path / "a", "--log", tmp_path / "new")
        assert body["added"] == added


def test_merge_into_what_cannot_be_written(shell: Shell, tmp_path: Path) -> None:
    log(tmp_path / "a", made())
    (tmp_path / "file").write_text("")
    _, err = shell("merge", tmp_path / "a", "--log", tmp_path / "file", code=7)
    assert "DC7010" in err and str(tmp_path / "file") in err


# ---- stats ----


def test_stats_of_logs(shell: Shell, tmp_path: Path) -> None:
    default = asdict(KERNEL.default(OTHER, TARGET))
    log(tmp_path, made(OTHER, gain=1.0, params=default), made(WORK, gain=1.44), "torn")
    log(tmp_path, "torn", kernel="gemm_f32f16f32_avx2")
    body = shell.json("stats", "--log", tmp_path)
    by_name = {entry["file"].split("/")[1]: entry for entry in body["files"]}
    mine = by_name[f"{KERNEL.name}.jsonl"]
    assert (mine["records"], mine["tuned"], mine["unused"]) == (2, 1, 1)
    assert mine["mean"] == pytest.approx(1.2) and mine["best"] == 1.44
    assert body["all"]["cpus"] == [HERE]
    out, _ = shell("stats", "--log", tmp_path)
    assert "1.2" in out.splitlines()[2].split() and "lines of no use: 2" in out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two float layers 32 -> 128 -> 16, of an open batch."""
    rng = np.random.default_rng(3)
    values = {"v": rng.standard_normal((32, 128)), "w": rng.standard_normal((128, 16))}
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["h"], name="fc1"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="fc2"),
    ]
    ends = [("x", 32), ("y", 16)]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size]) for n, size in ends]
    constants = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in values.items()]
    graph = helper.make_graph(nodes, "two", infos[:1], infos[1:], constants)
    opset = [helper.make_opsetid("", 17)]
    path = tmp_path_factory.mktemp("stats") / "two.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    )
    return path


def test_stats_of_a_model_and_of_its_artifact(shell: Shell, tmp_path: Path, model: Path) -> None:
    artifact = tmp_path / "two.dcm"
    args = ["compile", str(model), "-o", str(artifact), "--target", TARGET.name, "-q"]
    assert cli.main(args) == 0
    options = ("--log", tmp_path, "--target", TARGET.name)
    bare = shell.json("stats", artifact, *options)["models"][0]
    assert bare["counts"] == {"exact": 0, "nearest": 0, "family": 0, "default": 2}
    assert bare["speedup"] is None

    layer = Gemm(None, 128, 32, "f32", "f32", "f32", activation="relu")
    log(tmp_path, made(layer, gain=1.25))
    found = [shell.json("stats", what, *options)["models"][0] for what in (model, artifact)]
    assert found[0] == found[1]
    assert found[0]["counts"] == {"exact": 1, "nearest": 0, "family": 0, "default": 1}
    assert (found[0]["calls"], found[0]["tuned_calls"]) == (2, 1)
    assert found[0]["mean_gain"] == found[0]["speedup"] == pytest.approx(1.25)
    out, _ = shell("stats", artifact, *options)
    assert KERNEL.name in out and "50.0" in out.splitlines()[1].split()
    _, err = shell("stats", artifact, "--log", tmp_path, "--target", "x86-64-v4", code=2)
    assert f"has only {TARGET.name}" in err


# ---- replay ----


class Engine:
    """Answers trials from a list, in order, instead of measuring; the last answer is repeated."""

    def __init__(self, *answers: dict[str, Any] | BaseException) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def machines(self) -> dict[str, list[str]]:
        return {HERE: ["here"]}

    def slots(self, cpu: str) -> int:
        return 1

    def submit(self, request: dict[str, Any], cpu: str) -> Future[dict[str, Any]]:
        assert cpu == HERE
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        future: Future[dict[str, Any]] = Future()
        future.set_result(answer)
        return future


def ok(ratio: float, low: float, high: float, us: float = 4.0) -> dict[str, Any]:
    figures = {"us": us, "p20": us - 0.1, "p80": us + 0.1, "against_us": us * ratio}
    return {"status": "ok", "reason": "", **figures, "ratio": ratio, "low": low, "high": high}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    def use(*answers: dict[str, Any] | BaseException) -> Engine:
        made = Engine(*answers)
        monkeypatch.setattr(cluster, "Local", lambda count: made)
        return made

    yield use


FASTER, LEVEL, SLOWER = ok(1.3, 1.2, 1.4), ok(0.99, 0.97, 1.01), ok(0.8, 0.7, 0.9)
DEFAULT = ok(1.0, 0.99, 1.01, us=5.0)
CRASH = {"status": "crash", "reason": "SIGILL"}
WRONG = {"status": "wrong", "reason": "C[3, 4] is 1, not 2"}


@pytest.mark.parametrize(
    ("answers", "state", "trials", "gain", "us"),
    [
        ([FASTER], "holds", 1, 1.3, 4.0),
        ([LEVEL], "level", 1, 1.0, 3.96),
        ([SLOWER, SLOWER], "lost", 2, 1.0, 3.2),
        ([SLOWER, FASTER], "holds", 2, 1.3, 4.0),
        ([SLOWER, LEVEL], "level", 2, 1.0, 3.96),
        ([CRASH, DEFAULT], "failed", 2, 1.0, 5.0),
        ([WRONG, CRASH], "failed", 2, None, None),
    ],
)
def test_what_replay_says_and_writes(
    shell: Shell,
    tmp_path: Path,
    engine: Callable[..., Engine],
    answers: list[dict[str, Any]],
    state: str,
    trials: int,
    gain: float | None,
    us: float | None,
) -> None:
    stale = made(schedule="00000000", date="2020-01-01", extra={"host": "rack 7"})
    path = log(tmp_path, stale)
    code = 7 if state in ("lost", "failed") else 0

    used = engine(*answers)
    body = shell.json("replay", tmp_path, code=code)
    assert body["counts"][state] == 1 and len(used.requests) == trials
    assert body["records"][0]["record"] == json.loads(stale.to_line())
    assert used.requests[0]["params"] == stale.params
    assert used.requests[0]["schedule"] == fingerprint.schedule(KERNEL)
    assert path.read_text() == f"{stale.to_line()}\n"

    engine(*answers)
    shell("replay", tmp_path, "--update", code=7 if gain is None else 0)
    record = Record.parse(path.read_text(), KERNEL.name, TARGET.name)
    if gain is None:
        assert record == stale
        return
    default = asdict(KERNEL.default(WORK, TARGET))
    assert record.params == (stale.params if state == "holds" else default)
    assert (record.gain, record.us) == (gain, us) and record.date > "2026"
    assert record.extra == {"host": "rack 7"}
    shell("verify", tmp_path)


def test_replay_of_illegal_parameters(
    shell: Shell, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    path = log(tmp_path, made(params={"mr": 99}))
    used = engine(DEFAULT)
    _, err = shell("replay", tmp_path, "--update")
    assert "illegal: params" in err
    default = asdict(KERNEL.default(WORK, TARGET))
    assert [r["params"] for r in used.requests] == [default]
    record = Record.parse(path.read_text(), KERNEL.name, TARGET.name)
    assert (record.params, record.gain, record.us, record.default_us) == (default, 1.0, 5.0, 5.0)


def test_replay_of_a_default(shell: Shell, tmp_path: Path, engine: Callable[..., Engine]) -> None:
    default = asdict(KERNEL.default(WORK, TARGET))
    log(tmp_path, made(params=default, gain=1.0))
    used = engine(SLOWER)  # than itself: noise
    assert shell.json("replay", tmp_path)["counts"]["holds"] == 1
    assert len(used.requests) == 1


def test_replay_says_what_it_skips(
    shell: Shell, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    log(tmp_path, made(OTHER, cpu="intel-6-143"), made(WORK), made(WORK, threads=4))
    log(tmp_path, made(), kernel="gemm_u1u1s32_avx2")
    used = engine(FASTER)
    body = shell.json("replay", tmp_path)
    assert body["counts"] == {"holds": 1, "level": 0, "lost": 0, "failed": 0, "skipped": 3}
    reasons = " ".join(row["reason"] for row in body["records"])
    assert "intel-6-143" in reasons and "4 threads" in reasons and "gemm_u1u1s32" in reasons
    assert len(used.requests) == 1


def test_replay_selects(shell: Shell, tmp_path: Path, engine: Callable[..., Engine]) -> None:
    log(tmp_path, made(OTHER), made(WORK))
    engine(FASTER)
    for option, count in (
        (("--task", "*16x128x96*"), 1),
        (("--task", "gemm_f32*"), 2),
        (("--task", "conv_*"), 0),
        (("--target", "x86-64-v4"), 0),
    ):
        assert len(shell.json("replay", tmp_path, *option)["records"]) == count


def test_an_interrupted_replay_keeps_what_it_has(
    shell: Shell, tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    path = log(tmp_path, made(OTHER, schedule="00000000"), made(WORK, schedule="00000000"))
    engine(FASTER, KeyboardInterrupt())
    _, err = shell("replay", tmp_path, "--update", code=7)
    assert "DC7042" in err and "stopped after 1 records" in err
    states = [line.state for line in maintain.scan(tmp_path)[0].lines]
    assert states == ["ok", "stale"] and len(path.read_text().splitlines()) == 2


@pytest.mark.avx2
def test_replay_measures(shell: Shell, tmp_path: Path) -> None:
    """A tile of one register against the default, and the default by itself, for real."""
    if machine.missing_features(TARGET.features):
        pytest.skip("this CPU lacks AVX2")
    worst = min(KERNEL.candidates(TARGET), key=KERNEL.registers)
    default = asdict(KERNEL.default(OTHER, TARGET))
    path = log(tmp_path, made(OTHER, params=default, gain=1.0), made(WORK, params=asdict(worst)))
    body = shell.json("replay", tmp_path, "--duration", "50ms", "--update")
    assert [row["state"] for row in body["records"]] == ["holds", "lost"]
    assert body["records"][1]["high"] < 1
    default = asdict(KERNEL.default(WORK, TARGET))
    now = Record.parse(path.read_text().splitlines()[1], KERNEL.name, TARGET.name)
    assert (now.params, now.gain) == (default, 1.0) and now.us == now.default_us > 0
    shell("verify", tmp_path)
