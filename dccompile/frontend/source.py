"""From a path, bytes or ModelProto to a private ModelProto, or one clear reason why not."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import onnx
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, EncodeError, Message

from dccompile.errors import ModelError, Problem

PROTOBUF_LIMIT = 2**31 - 1  # bytes: no protobuf message may be larger
_MAX_DEPTH = 100  # of messages: protobuf's own limit when it parses

_MAGIC = (
    (b"PK\x03\x04", "a zip archive (a .dcm artifact, a TorchScript or .pt file?)"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89HDF", "an HDF5 file (Keras)"),
    (b"\x7fELF", "an ELF binary"),
    (b"\x93NUMPY", "a .npy array"),
    (b"version https://git-lfs", "a Git LFS pointer: run 'git lfs pull'"),
)


def _fail(code: str, where: str, found: str, fix: str) -> ModelError:
    return ModelError([Problem(code, where, found, fix)])


def load(
    model: str | os.PathLike[str] | bytes | onnx.ModelProto,
) -> tuple[onnx.ModelProto, Path | None]:
    """Returns a copy that the caller may change, and the folder its external data may lie in."""
    if isinstance(model, onnx.ModelProto):
        return _copy(model), None
    if isinstance(model, (bytes, bytearray, memoryview)):
        return _parse(bytes(model), "model bytes"), None
    try:
        path = Path(os.fspath(model))
    except TypeError:
        raise _fail(
            "DC3001",
            f"model of type {type(model).__name__}",
            "not a model; a path, bytes or onnx.ModelProto is allowed",
            "pass the path of an .onnx file",
        ) from None
    return _parse(_read(path), f"file {str(path)!r}"), path.parent


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    where = "ModelProto"
    _inspect(model, where)  # protobuf overflows the stack on what is nested too deep
    try:
        return _parse(model.SerializeToString(), where, inspect=False)
    except EncodeError:  # more than 2 GiB in memory
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy


def _read(path: Path) -> bytes:
    where = f"file {str(path)!r}"
    try:
        mode = os.stat(path)
        if stat.S_ISDIR(mode.st_mode):
            fix = "pass the .onnx file inside it"
            raise _fail("DC3001", where, "a folder; a regular file is allowed", fix)
        if not stat.S_ISREG(mode.st_mode):
            found = "not a regular file (a pipe or a device); a regular file is allowed"
            raise _fail("DC3001", where, found, "save the model to a file")
        if mode.st_size > PROTOBUF_LIMIT:
            raise _fail(
                "DC3001",
                where,
                f"{mode.st_size} bytes; at most {PROTOBUF_LIMIT} are allowed in one protobuf",
                "save with onnx.save(..., save_as_external_data=True)",
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check the path and its permissions"
        raise _fail("DC3001", where, f"cannot be read: {reason}", fix) from None


def _parse(data: bytes, where: str, inspect: bool = True) -> onnx.ModelProto:
    if not data:
        fix = "export the model again"
        raise _fail("DC3002", where, "empty; a serialized ONNX ModelProto is allowed", fix)
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            found = f"{kind}; a serialized ONNX ModelProto is allowed"
            raise _fail("DC3002", where, found, "pass the .onnx file itself")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except (DecodeError, RuntimeError, ValueError, RecursionError) as error:
        text = data[:512].isascii() and all(b >= 32 or b in b"\t\r\n" for b in data[:512])
        found = "a text file" if text else f"not a valid protobuf message ({_first_line(error)})"
        fix = (
            "save it in binary form with onnx.save"
            if text
            else "the file is truncated, damaged or not ONNX: export or copy it again"
        )
        raise _fail(
            "DC3002", where, f"{found}; a serialized ONNX ModelProto is allowed", fix
        ) from None
    if not model.HasField("graph"):
        fix = "the file is truncated, damaged or not ONNX: export or copy it again"
        raise _fail("DC3002", where, "holds no graph; an ONNX model has one", fix)
    if inspect:
        _inspect(model, where)
    return model


@cache
def _text_and_messages(kind: Descriptor) -> tuple[list[str], list[str], list[str]]:
    """Names of a message's text fields, single messages and repeated messages."""
    text = [f.name for f in kind.fields if f.type == f.TYPE_STRING]
    inner = [f for f in kind.fields if f.type == f.TYPE_MESSAGE]
    single = [f.name for f in inner if not f.is_repeated]
    return text, single, [f.name for f in inner if f.is_repeated]


def _inspect(model: onnx.ModelProto, where: str) -> None:
    """Refuses names that are not UTF-8 (protobuf gives bytes, unasked) and deep nesting."""
    stack: list[tuple[Message, int]] = [(model, 1)]
    while stack:
        message, depth = stack.pop()
        if depth > _MAX_DEPTH:
            found = f"messages nested deeper than {_MAX_DEPTH}; protobuf files cannot store more"
            raise _fail("DC3009", where, found, "flatten the nested If, Loop or Scan nodes")
        text, single, repeated = _text_and_messages(message.DESCRIPTOR)
        for name in text:
            value = getattr(message, name)
            values = (value,) if isinstance(value, (str, bytes)) else value
            if not all(isinstance(v, str) for v in values):
                found = f"field {name!r} of a {message.DESCRIPTOR.name} is not UTF-8 text; "
                fix = "the file is damaged: export or copy it again"
                raise _fail("DC3002", where, found + "names in UTF-8 are allowed", fix)
        inner = [getattr(message, name) for name in single if message.HasField(name)]
        for name in repeated:
            inner += getattr(message, name)
        stack += [(child, depth + 1) for child in inner]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
