"""Compiling for GPUs on a machine without one: code for the architectures named, and no source."""

from __future__ import annotations

import re

import numpy as np
import pytest
from dccompile.models import weights
from onnx import TensorProto, numpy_helper

pytest.importorskip("tvm", reason="the compiler extra is not installed")

import dccompile as dc
from dccompile import cache, machine, models, pipeline, schedules
from dccompile.cache import Cache
from dccompile.cuda import toolchain
from dccompile.errors import Error
from dccompile.runtime import artifact

ARCHS = ("sm_80", "sm_90")
TARGETS = [f"cuda:{arch}" for arch in ARCHS]
CUDA = {name.removeprefix("cuda.") for name in schedules.KERNELS if name.startswith("cuda.")}
SMALL = [name for name, _ in models.names() if models.size(name) < models.LARGE]


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    """NVRTC where it is: 0.06 s a kernel, nvcc takes 0.5."""
    monkeypatch.setenv(toolchain.VARIABLE, "nvrtc")
    try:
        toolchain.find()
    except Error:
        monkeypatch.delenv(toolchain.VARIABLE)
    try:
        toolchain.find()
    except Error as error:
        pytest.skip(str(error))


def architecture(cubin):
    """The sm number that an ELF file of a GPU is for: the low byte of e_flags, or the next one."""
    assert cubin[:4] == b"\x7fELF" and cubin[18:20] == (190).to_bytes(2, "little")  # EM_CUDA
    flags = int.from_bytes(cubin[48:52], "little")
    return {flags & 0xFF, flags >> 8 & 0xFF}


def check_images(path, targets):
    """Every variant's kernels are machine code and PTX for its architecture; nothing is source."""
    with artifact.read(path) as file:
        file.verify()
        variants = {v["target"]: v for v in file.manifest["variants"]}
        assert list(variants) == list(targets)
        for target in targets:
            variant = variants[target]
            arch = target.partition(":")[2]
            assert variant["images"] and not variant["unscheduled"]
            for image in variant["images"]:
                assert int(arch[3:]) in architecture(bytes(file.entry(image["cubin"])))
                ptx = bytes(file.entry(image["ptx"])).decode()
                assert f".target {arch}" in ptx
                for kernel in image["kernels"]:
                    assert re.search(rf"\.entry {kernel}\(", ptx)
        names = list(file.manifest["entries"])
    assert not [name for name in names if name.endswith((".cu", ".cuh", ".ll"))]
    return variants


@pytest.mark.parametrize("name", SMALL)
def test_every_reference_model_compiles(name, tmp_path):
    made = dc.compile(models.export(name), targets=TARGETS, name=name)
    variants = check_images(made.save(tmp_path / "model.dcm"), TARGETS)
    for variant in variants.values():
        nodes = [n for n in made.manifest["nodes"] if n["kernel"]]
        assert len(variant["kernels"]) >= len({n["site"] for n in nodes}) > 0
        assert all(k["name"] in CUDA for k in variant["kernels"])


def outside(name, folder):
    """A model whose tables are too large for memory, with tables of zeros that take no room."""
    model = models._family(name).graph(models._base(name))
    at = 0
    for tensor in model.graph.initializer:
        if weights.is_table(tensor):
            nbytes = 4 * int(np.prod(tensor.dims))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "tables"), ("offset", at), ("length", nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            at += -(-nbytes // 4096) * 4096
        elif tensor.data_type == TensorProto.FLOAT and not tensor.raw_data:
            zeros = np.zeros(tuple(tensor.dims), np.float32)
            tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    with (folder / "tables").open("wb") as file:
        file.truncate(at)
    path = folder / "model.onnx"
    path.write_bytes(models._finish(name, model).SerializeToString())
    return path


@pytest.mark.parametrize("name", sorted({name for name, _ in models.names()} - set(SMALL)))
def test_every_large_reference_model_compiles(name, tmp_path):
    """Its code: the tables, gigabytes of them, are not written."""
    front = pipeline.front(str(outside(name, tmp_path)), None, "keep", "int8")
    constants = pipeline.Constants()
    lowered = [pipeline.lower(front, machine.resolve(target), constants) for target in TARGETS]
    pipeline.generate(lowered, [tmp_path / f"{arch}.so" for arch in ARCHS], Cache(cache.folder()))
    for low, arch in zip(lowered, ARCHS, strict=True):
        assert {"embedding_bag_u8f32_warp"} < {p.choice.kernel.name for p in low.placed} <= CUDA
        for image in low.images:
            code = tmp_path / arch / image["cubin"].rpartition("/")[2]
            assert int(arch[3:]) in architecture(code.read_bytes())
