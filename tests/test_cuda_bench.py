"""Benches on a GPU: models and kernels, their clock, the peers' routes, and what doctor finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import emulate
from gpu_child import Child, layer

from dccompile.bench import conv_cases, gemm_cases, gpu_kernels, gpu_torch, kernel_bench, problems
from dccompile.bench.peers import PeerError
from dccompile.bench.suite import Form, fitting, usable
from dccompile.cli.main import main
from dccompile.errors import UsageError
from dccompile.machine import GPUS
from dccompile.runtime import driver
from dccompile.workload import EmbeddingBag

# One small shape of each family, and loops for the peaks that the emulator ends in a second.
SMALL = """
from dccompile.bench import conv_cases, embedding_bench, gemm_cases, gpu_measure
small = {"gemm": [(5, 16, 24)], "conv2d": [(1, 16, 16, 5, 5, 1, 1, 1, 0)],
         "depthwise2d": [(1, 16, 16, 5, 5, 16, 3, 1, 1)], "depthwise3d": [], "groupconv2d": []}
conv_cases.deployed = gemm_cases.deployed = lambda family: small[family]
embedding_bench.shapes = lambda: [(4, 50, 16, 3)]
gpu_measure.STREAM_BYTES, gpu_measure._THREADS, gpu_measure._BLOCKS = 1 << 16, 32, 1
gpu_measure._STEPS = gpu_measure._ROUNDS = gpu_measure._CALLS = 1
gpu_measure._SECONDS = 0
"""
QUICK = ("--duration", "20ms", "--warmup", "1ms")


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Child:
    return Child(emulate.toolkit(tmp_path_factory.mktemp("gpu")))


def test_a_model(child: Child, tmp_path: Path) -> None:
    model = layer(tmp_path / "layer.onnx")
    against = ("--against", "torch,onnxruntime,openvino")
    found = child.json("bench", model, "--device", "cuda", *QUICK, *against)
    (row,) = found["rows"]
    assert found["device"] == "Emulated GPU sm_90" and "compile_seconds" in found
    assert 0 < row["p20"] <= row["us"] <= row["p80"] and row["call"]["us"] > 0
    assert row["agrees"] and row["best_ratio"] is None and row["batch"] == 4
    reasons = {name: peer["reason"] for name, peer in row["peers"].items()}
    wanted = {"torch", "torch-fp16", "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino"}
    assert set(reasons) == wanted and all(reasons.values())
    assert "not benched on GPUs" in reasons["openvino"]


@pytest.mark.parametrize("pattern", ("gemm_u8*mma", "embedding_bag_f16*"))
def test_kernels(child: Child, pattern: str) -> None:
    found = child.json("bench", "--kernels", pattern, "--device", "cuda", *QUICK, before=SMALL)
    (result,) = found["kernels"]
    assert result["gpu"] == "Emulated GPU sm_90" and min(result["peaks"].values()) >= 0
    kernels = {row["kernel"] for row in result["rows"]}
    assert kernels and all(usable(k, GPUS["cuda:sm_90"]) for k in _kernels(kernels))
    for row in result["rows"]:
        assert row["correct"] and row["wrong"] is None and row["us"] > 0 and row["gops"] >= 0
        assert row["bound"] in ("mma.s8", "mma.f16", "fma.f32", "memory")
        assert row["copies"] > 1 and row["source"] == "default" and row["machine"] == "cuda:sm_90"
        assert all("finds no GPU" in peer["reason"] for peer in row["peers"].values())
    assert {mean["kernel"] for mean in result["geometric_means"]} == kernels


def _kernels(names: set[str]) -> list[Any]:
    from dccompile import registry

    return [k for k in registry.kernels() if k.name in names]


def test_a_wrong_kernel_is_found(child: Child) -> None:
    wrong = "from dccompile.bench.problems import Problem\nProblem.check = lambda *_: 'off by one'"
    args = ("bench", "--kernels", "gemm_u8*dp4a", "--device", "cuda", *QUICK)
    out, err = child.cli(*args, before=SMALL + wrong, code=5)
    assert "WRONG: off by one" in out and "rows are wrong: gemm_u8s8s32_dp4a" in err
    assert "% of  bound" in out and "vs-torch-int_mm" in out and "measured peaks" in out


def test_short_calls_go_into_graphs(child: Child) -> None:
    child.run(
        """
import ctypes
from dccompile.cuda import replay
from dccompile.runtime import device
gpu, seen = device.find(0), []
count = ctypes.CDLL("libcuda.so.1").emu_calls
def call(name):
    return lambda stream: seen.append((name, stream))
replay.LONG_NS = 0.0
plain = replay.replay(gpu, [call("a"), call("b")])
del seen[:]
assert plain.run(5) >= 0 and [name for name, _ in seen] == list("ababab")
assert {stream for _, stream in seen} == {0} and count(b"cuGraphLaunch") == 0
replay.LONG_NS, replay.SAMPLE_NS, replay.MOST = 1e18, 1e18, 2
del seen[:]
short = replay.replay(gpu, [call(name) for name in "abc"])
assert [name for name, stream in seen if stream] == list("abca")  # two graphs of two calls
del seen[:]
assert short.run(5) >= 0 and not seen
assert count(b"cuGraphLaunch") == 4, count(b"cuGraphLaunch")  # one is not timed, three are 6 calls
class Fails:
    def __call__(self, calls):
        return None
assert replay.replay(gpu, [call("a")], Fails())._calls == 1
"""
    )


@pytest.mark.parametrize("kind", ("gemm", "conv", "bags"))
def test_torch_computes_the_workload(kind: str) -> None:
    """On the CPU, which has all these operators too."""
    pytest.importorskip("torch")
    works: dict[str, list[Any]] = {
        "gemm": [gemm_cases.workload(f, m, 48, 68) for f in gemm_cases.FORMS for m in (5, 20)],
        "conv": [
            conv_cases.workload(form, shape)
            for form in (conv_cases.FORMS[0], conv_cases.FORMS[-1])
            for shape in (
                (1, 20, 24, 5, 6, 1, 1, 1, 0),
                (2, 8, 16, 9, 7, 1, 3, 2, 1),
                (2, 32, 32, 6, 5, 32, 5, 1, 2),
                (1, 16, 16, 3, 6, 5, 16, 3, 3, 3, 2, 2, 1, 1),
            )
        ],
        "bags": [
            EmbeddingBag((500,), 20, s, "f16" if s == "u4" else "f32", bags=5, pooling=7)
            for s in ("f32", "f16", "u8", "u4")
        ],
    }
    for work in works[kind]:
        (problem,) = problems.make(work)
        for name in gpu_torch.names(work):
            route = gpu_torch.prepare(name, work, problem, 3000, "cpu")
            for call in route.calls:
                call(0)
            difference = route.differs()
            assert route.agrees(difference), (work, name, difference)
            assert not route.agrees({"steps": 3}) and not route.agrees({"relative": 0.1})


def test_torch_without_a_gpu() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    work = gemm_cases.workload(Form("u8", "s8", "u8"), 5, 16, 24)
    with pytest.raises(PeerError, match="finds no GPU"):
        gpu_torch.prepare("torch-fp16", work, problems.make(work)[0], 1)


def test_kernels_of_gpus_are_chosen_for_gpus_alone() -> None:
    gpu = GPUS["cuda:sm_80"]
    for case in kernel_bench.cases("gemm_f32f32*", None):
        assert not case.kernel.features[0].startswith("sm_")
    cases = gpu_kernels.cases(None, gpu)
    assert {c.family for c in cases} > {"gemm", "conv2d", "depthwise3d", "embedding"}
    assert all(c.kernel.features[0].startswith("sm_") for c in cases)
    assert {fitting(c.kernel, gpu) for c in cases} == {gpu}
    with pytest.raises(UsageError, match="no such kernel"):
        gpu_kernels.cases("gemm_*_avx2", gpu)
    with pytest.raises(UsageError, match="no such kernel"):
        gpu_kernels.cases("embedding_bag_*_avx2", gpu)


def test_without_a_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "LIBRARY", "libnone.so.1")
    monkeypatch.setattr(driver, "_driver", None)
    for what in (["dlrm-mlp"], ["--kernels"]):
        assert main(["bench", *what, "--device", "cuda"]) == 4
        assert "DC4020: no NVIDIA driver" in capsys.readouterr().err
    assert main(["bench", "--kernels", "--device", "gpu"]) == 2
    assert main(["doctor"]) == 0
    assert "no NVIDIA driver" in capsys.readouterr().out


def test_doctor(child: Child) -> None:
    body = child.run(f"import os; os.environ['EMU_DEVICES'] = '2'\n{_DOCTOR}")[0]
    assert body == "2 13.0 sm_90 emulated-gpu-sm-90 nvcc None\n"
    out, _ = child.cli("doctor")
    assert "Emulated GPU sm_90, sm_90" in out and "cuda compiler" in out


_DOCTOR = """
from dccompile.cli.doctor import cuda_compiler, gpus
found = gpus()
last = found["devices"][-1]
print(len(found["devices"]), found["driver"], last["arch"], last["kind"], cuda_compiler()["kind"],
      found["reason"])
"""
