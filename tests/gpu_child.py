"""Programs and commands on the emulated GPU, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MAIN = "import sys; from dccompile.cli.main import main; sys.exit(main(sys.argv[1:]))"


class Child:
    """Runs Python with the stand-ins for nvcc and the driver; `arch` is that of the GPU."""

    def __init__(self, toolkit: Any, arch: int = 90) -> None:
        self._toolkit, self._arch = toolkit, arch

    def run(self, source: str, *args: Any, code: int = 0, **settings: Any) -> tuple[str, str]:
        """Output and errors of a program, which must end with this exit code."""
        environment = self._toolkit.environment(**{"arch": self._arch, **settings})
        done = subprocess.run(
            [sys.executable, "-c", source, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**environment, "DCCOMPILE_CACHE": "off"},
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout, done.stderr

    def cli(self, *args: Any, before: str = "", code: int = 0) -> tuple[str, str]:
        """A command, after statements that `before` has."""
        return self.run(f"{before}\n{MAIN}", *args, code=code)

    def json(self, *args: Any, before: str = "") -> Any:
        return json.loads(self.cli(*args, "--json", before=before)[0])


def layer(path: Path, m: int = 4, k: int = 24, n: int = 16) -> Path:
    """A model of one product, in f32."""
    w = np.random.default_rng(0).normal(size=(k, n)).astype(np.float32)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [m, width])
        for name, width in (("x", k), ("y", n))
    ]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "layer",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(w, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return path
