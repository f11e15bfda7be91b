"""The command line: verbs, exit codes, what goes to stdout, and how errors look."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from shell import Shell

from dccompile import console, sources
from dccompile.cli import disassemble, verbs
from dccompile.cli import main as cli
from dccompile.errors import Error, UsageError

K, HIDDEN, WIDE = 13, 32, 8


def tiny_model() -> bytes:
    """x f32[N,13] -> an int8 layer with ReLU -> a float layer -> y f32[N,8]."""
    rng = np.random.default_rng(7)
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w": rng.integers(-127, 128, (K, HIDDEN)).astype(np.int8),
        "w_scale": rng.uniform(0.005, 0.01, HIDDEN).astype(np.float32),
        "w_zero": np.zeros(HIDDEN, np.int8),
        "h_scale": np.float32(0.05),
        "h_zero": np.uint8(0),
        "v": rng.standard_normal((HIDDEN, WIDE)).astype(np.float32),
    }
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"], name="quantize"),
        node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"], name="dequantize"),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], name="weights", axis=1),
        node("MatMul", ["xd", "wd"], ["m"], name="fc1"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("QuantizeLinear", ["r", "h_scale", "h_zero"], ["hq"], name="requantize"),
        node("DequantizeLinear", ["hq", "h_scale", "h_zero"], ["hd"], name="hidden"),
        node("MatMul", ["hd", "v"], ["y"], name="fc2"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", WIDE])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.onnx"
    path.write_bytes(tiny_model())
    return path


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    """The model compiled by the command line, once."""
    path = model.with_suffix(".dcm")
    assert cli.main(["compile", str(model), "-o", str(path), "--target", "host", "-q"]) == 0
    return path


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def python(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, **options
    )


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = "{'numpy', 'tvm', 'tvm_ffi', 'onnx', 'torch', 'rich'} & set(sys.modules)"
    for option in ("--help", "--version"):
        code = "import sys; from dccompile.cli import main as cli; "
        code += f"cli.main(['{option}']); assert not {heavy}"
        done = python("-c", code)
        assert done.returncode == 0 and "dccompile" in done.stdout, done.stderr


def test_every_verb_has_help(shell: Shell) -> None:
    for verb in (*verbs.VERBS, ("models", "export")):
        words = (verb,) if isinstance(verb, str) else verb
        assert "usage: dccompile" in shell(*words, "--help")[0]


def test_module_runs_as_a_script() -> None:
    done = python("-m", "dccompile", "models", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "dccompile.models/1"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("frobnicate",),
        ("compile",),
        ("compile", "no-such-model"),
        ("compile", "."),
        ("check", "m", "--precision", "int4"),
        ("run", "m", "--thr", "1"),
        ("bench",),
        ("bench", "m", "--kernels"),
        ("bench", "--overhead", "--threads", "0"),
        ("bench", "--overhead", "--duration", "fast"),
        ("bench", "--kernels", "no_such_kernel"),
        ("inspect", "no-such-file.dcm"),
        ("models", "export", "no-such-model"),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2(shell: Shell, args: tuple[str, ...]) -> None:
    assert shell.fails(2, *args).startswith("error DC2")


def test_usage_errors_about_a_real_model(shell: Shell, model: Path, compiled: Path) -> None:
    missing = "no-such-folder/m.dcm"
    for args, word in (
        (("compile", model, "--target", "vax"), "vax"),
        (("compile", model, "--shape", "x=1x13"), "NAME:DIM"),
        (("compile", model, "-o", missing), "no-such-folder"),
        (("run", compiled, "--input", "z=random:0"), "no input 'z'"),
        (("run", compiled, "--input", "x=7"), "random:SEED"),
        (("run", compiled, "--input", "x=@gone.npy"), "gone.npy"),
        (("run", compiled, "--expect", "q=@x.npy"), "no output 'q'"),
        (("bench", compiled, "--against", "onnxruntime"), "artifact"),
        (("bench", compiled, "--against", "vaporware"), "vaporware"),
        (("bench", compiled, "--duration", "10ms", "--fail-below", "1"), "no peer"),
        (("inspect", compiled, "--asm", "main_street"), "no such kernel"),
    ):
        err = shell(*args, code=2)[1]
        assert word in err and "Fix: " in err, (args, err)


def test_check_reports_precisions(shell: Shell, model: Path) -> None:
    body = shell.json("check", model)
    assert body["ok"] and not body["problems"]
    by_name = {node["name"]: node for node in body["nodes"]}
    assert by_name["fc1"]["precision"] == "int8"
    assert by_name["fc2"]["precision"] in ("f32", "float32")
    text = shell("check", model)[0]
    assert "fc1" in text and "can be compiled" in text


def test_check_lists_every_problem(shell: Shell, tmp_path: Path) -> None:
    node = helper.make_node
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("x", "y")]
    nodes = [
        node("Frob", ["x"], ["a"], name="first", domain="com.example"),
        node("Nicate", ["a"], ["y"], name="second", domain="com.example"),
    ]
    graph = helper.make_graph(nodes, "bad", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    bad = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path = tmp_path / "bad.onnx"
    path.write_bytes(bad.SerializeToString())
    body = shell.json("check", path, code=3)
    found = " ".join(p["where"] for p in body["problems"])
    assert not body["ok"] and "first" in found and "second" in found
    assert all(p["code"].startswith("DC3") and p["fix"] for p in body["problems"])
    out, _ = shell("check", path, code=3)
    assert out.count("error DC3") == len(body["problems"])
    _, err = shell("compile", path, "-o", tmp_path / "bad.dcm", code=3)
    assert err.count("error DC3") == len(body["problems"])
    assert sorted(os.listdir(tmp_path)) == ["bad.onnx"]


def test_compile_says_what_it_did(shell: Shell, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.dcm"
    out, err = shell("compile", model, "-o", path, "--target", "x86-64-v3", "--explain")
    assert path.is_file() and os.listdir(tmp_path) == ["m.dcm"]
    for word in ("nodes: ", "int8", "kernels for x86-64-v3", "default", str(path), " s\n"):
        assert word in out, word
    assert "compile: " in err and "compile: " not in out


def test_run_saves_and_compares(shell: Shell, compiled: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((5, K)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    folder = tmp_path / "out"
    given = ("run", compiled, "--input", f"x=@{tmp_path / 'x.npy'}")
    body = shell.json(*given, "--output", folder)
    assert body["outputs"][0]["shape"] == [5, WIDE] and os.listdir(folder) == ["y.npy"]
    y = np.load(folder / "y.npy")
    expect = ("--expect", f"y=@{tmp_path / 'ref.npy'}")
    np.save(tmp_path / "ref.npy", y)
    shell(*given, *expect)
    np.save(tmp_path / "ref.npy", y + np.float32(0.5))
    assert "elements differ" in shell.fails(5, *given, *expect, after_output=True)
    shell(*given, *expect, "--atol", "0.6")
    np.save(tmp_path / "ref.npy", y[:2])
    assert "float32[2, 8]" in shell(*given, *expect, code=2)[1]


def test_run_equals_onnxruntime(shell: Shell, model: Path, compiled: Path, tmp_path: Path) -> None:
    import onnxruntime

    shell("run", compiled, "--batch", 4, "--output", tmp_path)
    x = sources.random_array("float32", [4, K], [0, 0])
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), session.run(None, {"x": x})[0], 1e-5)


def test_inspect_reads_without_running(shell: Shell, compiled: Path) -> None:
    body = shell.json("inspect", compiled)
    variant = body["manifest"]["variants"][0]
    out, _ = shell("inspect", compiled)
    for word in ("x", "y", variant["target"], variant["kernels"][0]["name"], "sha256"):
        assert word in out
    done = python("-c", _NO_CODE_LOADED, str(compiled))
    assert done.returncode == 0, done.stderr


_NO_CODE_LOADED = """
import sys
from dccompile.cli import main as cli
assert cli.main(["inspect", sys.argv[1]]) == 0
assert not {"tvm", "tvm_ffi", "onnx"} & set(sys.modules)
"""


def test_inspect_disassembles(
    shell: Shell, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = shell.json("inspect", compiled)["manifest"]["variants"][0]["kernels"][0]
    monkeypatch.setenv("PATH", "")
    assert "objdump" in shell.fails(1, "inspect", compiled, "--asm", kernel["name"])
    monkeypatch.undo()
    import shutil

    if shutil.which("objdump"):
        text = shell("inspect", compiled, "--asm", kernel["name"])[0]
        assert f"{kernel['symbol']}>:" in text and "mm0" in text


def test_disassembly_follows_parallel_loops() -> None:
    listing = """
0000000000001000 <__tvm_ffi_k>:
    1000:\tlea    rdi,[rip+0x1a]        # 1020 <other+0x10>
    1007:\tlea    rax,[rip+0x9]         # 9000 <a_constant>
    100e:\tret

0000000000001010 <other>:
    1010:\tret
    1020:\tvaddps ymm0,ymm0,ymm1
    1024:\tret
    1028:\tcall   1020 <other+0x10>
"""
    found = list(disassemble._select(listing.splitlines(), {"k"}))
    assert [line.split()[0] for line in found] == [
        "0000000000001000", "1000:", "1007:", "100e:",
        "0000000000001020", "1020:", "1024:", "1028:",
    ]  # fmt: skip


def test_a_damaged_artifact_exits_4(shell: Shell, compiled: Path, tmp_path: Path) -> None:
    data = bytearray(compiled.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "damaged.dcm"
    path.write_bytes(data)
    for verb in ("inspect", "run", "bench"):
        assert shell.fails(4, verb, path).startswith("error DC4")
    path.write_bytes(data[: len(data) // 2])
    assert shell.fails(4, "run", path).startswith("error DC4")


def test_bench_compares_with_peers(shell: Shell, model: Path) -> None:
    args = ("bench", model, "--batch", "1,4", "--against", "onnxruntime,torch")
    args = (*args, "--duration", "100ms", "--warmup", "1ms", "--fail-below")
    body = shell.json(*args, "1e-6")
    assert body["compile_seconds"] > 0
    assert [row["batch"] for row in body["rows"]] == [1, 4]
    for row in body["rows"]:
        peer = row["peers"]["onnxruntime"]
        assert peer["agrees"] and peer["ratio"] > 0 and len(peer["samples_ns"]) >= 5
        assert row["us"] > 0 and row["per_second"] > 0 and row["best_ratio"] == peer["ratio"]
        assert row["peers"]["torch"]["reason"]
    assert "times the best peer" in shell.fails(6, *args, "1e6", after_output=True)


def test_bench_prints_a_table(
    shell: Shell, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dccompile.bench import model_bench as bench

    monkeypatch.setattr(bench, "artifact_of", lambda *_: (compiled, {}))
    quick = ("--duration", "20ms", "--warmup", "1ms")
    given = ("bench", compiled.with_suffix(".onnx"), "--against", "onnxruntime,torch", *quick)
    out, _ = shell(*given)
    rows = {line.split()[2]: line for line in out.splitlines()[2:]}
    assert "[p20, p80]" in out and set(rows) == {"dccompile", "onnxruntime", "torch"}
    assert "not run: " in rows["torch"] and "relative" in rows["onnxruntime"]


def test_bench_reports_a_model_that_no_peer_agrees_with(
    shell: Shell, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dccompile.bench import model_bench as bench

    monkeypatch.setattr(bench, "artifact_of", lambda *_: (compiled, {}))
    monkeypatch.setattr(bench, "compare", lambda *_: {"relative": 0.5})
    quick = ("--duration", "20ms", "--warmup", "1ms")
    given = ("bench", compiled.with_suffix(".onnx"), "--against", "onnxruntime", *quick)
    assert "no peer agrees" in shell.fails(5, *given, after_output=True)


def test_bench_kernels(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from dccompile import machine
    from dccompile.bench import gemm_cases

    monkeypatch.setattr(gemm_cases, "shapes", lambda: [(5, 48, 68), (12, 256, 256)])
    suffix = machine.host().isa
    args = ("bench", "--kernels", f"gemm_u8s8s32_{suffix}", "--duration", "20ms")
    args = (*args, "--against", "onnxruntime,openvino")
    body = shell.json(*args)
    rows = body["kernels"][0]["rows"]
    assert {tuple(row["shape"]) for row in rows} == {(5, 48, 68), (12, 256, 256)}
    assert all(row["correct"] and 0 < row["peak_share"] < 1.5 for row in rows)
    assert body["kernels"][0]["geometric_means"][0]["best"] > 0
    assert body["kernels"][0]["call_overhead_us"]
    out, _ = shell(*args)
    assert "12x256x256" in out and "% peak" in out and "geometric mean" in out


def test_bench_overhead(shell: Shell) -> None:
    routes = shell.json("bench", "--overhead", "--duration", "50ms")["overhead"]["routes"]
    assert 0 < routes["m.bind(...)()"]["us"] <= routes["m.run(None, feeds)"]["us"] * 1.5


def test_models_exports_a_reference_model(shell: Shell, tmp_path: Path) -> None:
    names = [m["name"] for m in shell.json("models")["models"]]
    assert "dlrm" in names
    path = tmp_path / "m.onnx"
    shell("models", "export", "dlrm-mlp", "-o", path, "--seed", "3")
    first = path.read_bytes()
    shell("models", "export", "dlrm-mlp", "-o", path, "--seed", "3")
    assert path.read_bytes() == first and os.listdir(tmp_path) == ["m.onnx"]
    shell("models", "export", "dlrm-mlp", "-o", path)
    assert path.read_bytes() != first


def test_doctor(shell: Shell) -> None:
    body = shell.json("doctor")
    assert body["targets"]["x86-64-v3"]["runs"] and body["peers"]["onnxruntime"]["version"]
    out, _ = shell("doctor")
    for word in ("cpu", "threads", "linker", "numpy", "peer openvino"):
        assert word in out


def test_unexpected_errors_are_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> int:
        raise ZeroDivisionError("in\nthe verb")

    monkeypatch.setitem(verbs.VERBS, "doctor", broken)
    assert "ZeroDivisionError: in." in shell.fails(1, "doctor")
    assert "Traceback" in shell("doctor", "-vv", code=1)[1]


def test_own_errors_show_a_traceback_only_with_vv(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: object) -> int:
        raise Error("as asked. Fix: ask otherwise", "DC6123")

    monkeypatch.setitem(verbs.VERBS, "doctor", refused)
    assert shell.fails(6, "doctor") == "error DC6123: as asked. Fix: ask otherwise"
    assert "Traceback" in shell("doctor", "-vv", code=6)[1]


def test_an_interrupt_is_quiet(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(verbs.VERBS, "doctor", interrupted)
    out, err = shell("doctor", code=130)
    assert out == "" and "Traceback" not in err


def test_a_missing_extra_says_what_to_install(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_tvm(_: object) -> int:
        raise ModuleNotFoundError("No module named 'tvm'", name="tvm.relax")

    monkeypatch.setitem(verbs.VERBS, "doctor", needs_tvm)
    assert "pip install 'dccompile[compile]'" in shell.fails(2, "doctor")


def test_a_closed_pipe_is_quiet() -> None:
    code = "from dccompile.cli.main import entry; entry()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"], stdout=writer, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writer)
    assert done.returncode == cli.EXIT_PIPE and done.stderr == b""


def test_tables_align_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(("name", "us"), [("a", 1.25), ("long name", 12345.678), ("none", None)])
    assert capsys.readouterr().out.splitlines() == [
        "name          us",
        "a           1.25",
        "long name  12346",
        "none           -",
    ]


def test_options_that_are_read_by_hand() -> None:
    assert sources.parse_shapes(["x:1..64x13", "a:b:2"]) == {"x": ("1..64", 13), "a:b": (2,)}
    assert sources.parse_shapes([]) is None
    assert [sources.parse_seconds(t) for t in ("3s", "200ms", "1m", "0.5")] == [3, 0.2, 60, 0.5]
    assert sources.parse_counts(["1,2", "2", "4"], "--threads") == [1, 2, 4]
    for wrong in ("x", "x:", "x:ax2", ":3", "x:1..", "x:-1"):
        with pytest.raises(UsageError):
            sources.parse_shapes([wrong])


def test_saved_outputs_never_share_a_file(tmp_path: Path) -> None:
    arrays = {"a/b": np.zeros(1), "a_b": np.ones(2), "..": np.ones(3)}
    paths = sources.save_arrays(str(tmp_path), arrays)
    assert len({*paths}) == 3 and all(path.parent == tmp_path for path in paths)
    assert [np.load(path).size for path in paths] == [1, 2, 3]


def test_input_files_with_objects_or_archives_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "z.npz", a=np.zeros(1))
    (tmp_path / "t.npy").write_bytes(b"\x93NUMPY")
    for name in ("o.npy", "z.npz", "t.npy", "gone.npy"):
        with pytest.raises(UsageError, match="Fix: "):
            sources.load_array(str(tmp_path / name), "--input x")
