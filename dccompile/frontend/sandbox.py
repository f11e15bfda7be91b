"""onnx's C++ code (checker, function inliner, shape inference) in a helper process with limits.

It is not made for hostile models. Measured with onnx 1.23.2: ``Split`` with more outputs than
num_outputs aborts the process, ``LayerNormalization`` with axis 2**31 is a segmentation fault,
``Add`` of vectors with 2**31 - 1 entries takes gigabytes and minutes. What is known is refused
before; whatever else there is ends the helper, and the caller gets an error.

One helper serves all models of a process: it starts in about 0.3 s, in parallel with parsing,
and a call costs less than a millisecond. It ends with its parent.

A message is a line of JSON and then `size` bytes of a serialized ModelProto.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import onnx
import onnx.checker
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError, EncodeError

from dccompile.errors import Error, ModelError, Problem

from .growth import propagates
from .structure import nodes_of, opsets, subgraphs

MEMORY = 2 << 30  # bytes of address space
SECONDS = 30.0  # for one call
_RAISED = (  # what onnx's C++ code and protobuf raise
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    EncodeError,
    DecodeError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
    MemoryError,
)
_CODE = "import sys; del sys.path[0]; from dccompile.frontend.sandbox import serve; serve()"

Reply = tuple[onnx.ModelProto | None, list[str]]


# -- the helper's side --------------------------------------------------------------------------


def check_nodes(model: onnx.ModelProto) -> Reply:
    """One text per node, empty where its attributes and numbers of operands are right."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = opsets(model.opset_import)
    texts = []
    for node, _ in nodes_of(model):
        texts.append("")
        if not any(True for _ in subgraphs(node)):  # those need their scope: see check_model
            try:
                onnx.checker.check_node(node, context)
            except _RAISED as error:
                texts[-1] = str(error) or "not valid"
    return None, texts


def check_model(model: onnx.ModelProto) -> Reply:
    try:
        onnx.checker.check_model(model)
    except _RAISED as error:
        return None, [str(error)]
    return None, []


def inline(model: onnx.ModelProto) -> Reply:
    try:
        return onnx.inliner.inline_local_functions(model, convert_version=True), []
    except _RAISED as error:
        return None, [str(error)]


def infer(model: onnx.ModelProto) -> Reply:
    """The model with types, and what strict inference raised, if it did.

    Data propagation comes second: it is left out where types show that it would grow.
    """
    run = onnx.shape_inference.infer_shapes
    texts: list[str] = []
    done = None
    try:
        done = run(model, strict_mode=False, data_prop=False)
        values = propagates(done)
        done = run(model, strict_mode=False, data_prop=True) if values else done
        done = run(model, strict_mode=True, data_prop=values)
    except _RAISED as error:
        texts.append(str(error))
    return done, texts


_STEPS = {step.__name__: step for step in (check_nodes, check_model, inline, infer)}


def serve() -> None:
    """Answers requests on stdin until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what C++ prints must not mix with replies
    for line in requests:
        header = json.loads(line)
        model = onnx.ModelProto.FromString(requests.read(header["size"]))
        done, texts = _STEPS[header["step"]](model)
        data = done.SerializeToString() if done is not None else b""
        answer = {"texts": texts, "size": len(data), "model": done is not None}
        replies.write(json.dumps(answer).encode() + b"\n" + data)
        replies.flush()


# -- the caller's side ---------------------------------------------------------------------------


class _Helper:
    def __init__(self) -> None:
        paths = os.pathsep.join(filter(None, sys.path))
        environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            text = f"cannot start a helper process: {error.strerror}. Fix: free some memory"
            raise Error(text, "DC1004") from None

    def ask(self, step: str, data: bytes) -> tuple[dict[str, Any], bytes]:
        """Raises OSError when the helper dies, TimeoutError when it takes too long."""
        assert self.process.stdin and self.process.stdout
        header = json.dumps({"step": step, "size": len(data)}).encode()
        self.process.stdin.write(header + b"\n" + data)
        self.process.stdin.flush()
        stream = _read(self.process.stdout, time.monotonic() + SECONDS)
        buffer = bytearray()
        while b"\n" not in buffer:
            buffer += next(stream)
        line, _, rest = bytes(buffer).partition(b"\n")
        answer = json.loads(line)
        body = bytearray(rest)
        while len(body) < answer["size"]:
            body += next(stream)
        return answer, bytes(body)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def _read(pipe: IO[bytes], deadline: float) -> Iterator[bytes]:
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        chunk = os.read(pipe.fileno(), 1 << 20)
        if not chunk:
            raise BrokenPipeError
        yield chunk


_lock = threading.Lock()
_helper: _Helper | None = None


def _ready() -> _Helper:
    global _helper
    if _helper is not None and _helper.process.poll() is not None:
        _stop()
    if _helper is None:
        _helper = _Helper()
    return _helper


def _stop() -> None:
    global _helper
    if _helper is not None:
        _helper.stop()
        _helper = None


def _forget() -> None:
    """In a forked child: the helper is its parent's."""
    global _lock, _helper
    _lock, _helper = threading.Lock(), None


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


def start() -> None:
    """Starts the helper, so that it is ready when the first call comes."""
    with _lock:
        _ready()


def call(step: str, model: onnx.ModelProto) -> Reply:
    """Runs a step; ModelError where the helper died of the model or ran out of time."""
    with _lock:
        try:
            answer, data = _ready().ask(step, model.SerializeToString())
        except TimeoutError:
            reason = f"does not end within {SECONDS:g} s"
        except OSError:
            reason = f"crashes, or needs more than {MEMORY >> 20} MiB"
        except EncodeError:
            reason = "does not fit into 2 GiB without its initializers"
        except BaseException:  # an interrupt: the reply to come would answer the next call
            _stop()
            raise
        else:
            done = onnx.ModelProto.FromString(data) if answer["model"] else None
            return done, answer["texts"]
        _stop()
    found = f"onnx's {step} {reason} on this model; one that the onnx package can read is allowed"
    fix = "the model is damaged or extremely large: export it again"
    raise ModelError([Problem("DC3018", "model", found, fix)])
