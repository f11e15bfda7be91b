"""The artifact file: written whole and reproducibly, and one test per way in which it can lie."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dccompile.errors import IncompatibleError, UsageError
from dccompile.runtime import artifact, layout
from dccompile.runtime.params import pack_params, parse_header

LIBRARY, PARAMS = "lib/x86-64-v3.so", "params.safetensors"
TENSORS: list[tuple[str, np.ndarray]] = [
    ("weights", np.arange(15, dtype=np.int8).reshape(3, 5)),
    ("bias", np.linspace(-1, 1, 16, dtype=np.float32)),
    ("scale", np.array(0.5, np.float16)),
    ("empty", np.zeros((0, 4), np.int64)),
]
MANIFEST: dict[str, Any] = {
    "format": 1,
    "name": "sample",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 13]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["N*2"]}],
    "symbols": [{"name": "N", "min": 1, "max": 64}],
    "variants": [
        {"target": "x86-64-v3", "features": ["avx2"], "library": LIBRARY, "params": PARAMS}
    ],
    "runtime": {"tvm_ffi": "0.1.14.post1"},
}


def contents() -> dict[str, Any]:
    return {LIBRARY: b"\x7fELF" * 700, PARAMS: pack_params(TENSORS), artifact.RUNTIME: b"pool" * 9}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.dcm"
    artifact.write(path, MANIFEST, contents())
    return path


def refused(path: Path) -> str:
    """The one line with which reading and verifying fails."""
    with pytest.raises(IncompatibleError) as caught:
        with artifact.read(path) as found:
            found.verify()
            for name in found.entries:
                if name.endswith(".safetensors"):
                    found.params(name)
    assert caught.value.code.startswith("DC4")
    text = str(caught.value)
    assert str(path) in text and "Fix: " in text and "\n" not in text
    return text


# Writing


def test_reads_back(sample: Path) -> None:
    with artifact.read(sample) as found:
        found.verify()
        assert found.manifest["name"] == "sample"
        assert bytes(found.entry(LIBRARY)) == contents()[LIBRARY]
        data, table = found.params(PARAMS), found.tensors(PARAMS)
    assert data.__array_interface__["data"][0] % 64 == 0
    assert data.flags.writeable  # or DLPack would refuse it
    assert [*table] == [name for name, _ in TENSORS]
    for name, array in TENSORS:
        stored = table[name]
        assert stored.offset % 64 == 0 and stored.shape == array.shape
        assert data[stored.offset :][: stored.nbytes].tobytes() == array.tobytes()


def test_other_tools_read_it(sample: Path) -> None:
    with zipfile.ZipFile(sample) as file:
        assert file.testzip() is None
        assert [i.filename for i in file.infolist()] == [*contents(), "manifest.json"]
        assert all(i.compress_type == zipfile.ZIP_STORED for i in file.infolist())
        assert json.loads(file.read("manifest.json"))["name"] == "sample"
        raw = file.read(PARAMS)
    with artifact.read(sample) as found:
        assert all(entry.offset % 4096 == 0 for entry in found.entries.values())
    load = pytest.importorskip("safetensors.numpy").load
    tensors = load(raw)
    for name, array in TENSORS:
        np.testing.assert_array_equal(tensors[name], array)


def test_same_arguments_give_the_same_bytes(sample: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.dcm"
    (tmp_path / "lib").write_bytes(contents()[LIBRARY])
    artifact.write(again, copy.deepcopy(MANIFEST), {**contents(), LIBRARY: tmp_path / "lib"})
    assert again.read_bytes() == sample.read_bytes()


def test_sizes_beyond_4_gib(tmp_path: Path) -> None:
    """Built with a hole in the file: its structure is read, its hash would not match."""
    path = tmp_path / "huge.dcm"
    huge = (5 << 30) + 1
    write_raw(path, {LIBRARY: b"code", artifact.RUNTIME: b"pool", PARAMS: huge}, MANIFEST)
    with artifact.read(path) as found:
        assert found.entries[PARAMS].size == huge and len(found.entry(PARAMS)) == huge
    with zipfile.ZipFile(path) as file:
        assert file.getinfo(PARAMS).file_size == huge


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ([("a", np.zeros(1)), ("a", np.zeros(1))], "taken"),
        ([("__metadata__", np.zeros(1))], "taken"),
        ([("a", np.zeros(1, ">f4"))], "cannot be stored"),
        ([("a", np.zeros(1, complex))], "cannot be stored"),
    ],
)
def test_tensors_that_cannot_be_stored(tensors: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack_params(tensors)


def test_a_failed_write_changes_nothing(sample: Path) -> None:
    before = sample.read_bytes()
    with pytest.raises(UsageError, match="cannot be written"):
        artifact.write(sample, MANIFEST, {**contents(), LIBRARY: sample.parent / "missing.so"})
    wrong = copy.deepcopy(MANIFEST)
    wrong["variants"][0]["library"] = "lib/other.so"
    with pytest.raises(ValueError, match="library"):
        artifact.write(sample, wrong, contents())
    for name in ("../escape", "/absolute", "a//b", ".hidden", "manifest.json"):
        with pytest.raises(ValueError, match=r"entry name|manifest\.json"):
            artifact.write(sample, MANIFEST, {name: b""})
    assert sample.read_bytes() == before
    assert os.listdir(sample.parent) == [sample.name]


def test_where_nothing_can_be_written(sample: Path) -> None:
    for path in (sample.parent, sample / "below", sample.parent / "no" / "such"):
        with pytest.raises(UsageError, match="Fix: ") as caught:
            artifact.write(path, MANIFEST, contents())
        assert caught.value.code == "DC2020"


def test_leftovers_of_the_dead_are_swept_and_the_living_spared(sample: Path) -> None:
    import fcntl

    dead, alive = (sample.parent / f".{name}.dcm-tmp" for name in ("dead", "alive"))
    dead.touch()
    with alive.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        artifact.write(sample, MANIFEST, contents())
        assert alive.exists() and not dead.exists()


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
import importlib.util
spec = importlib.util.spec_from_file_location("sample", sys.argv[3])
sample = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sample)
print("ready", flush=True)
while True:
    sample.artifact.write(sys.argv[1], sample.MANIFEST, sample.contents())
"""


def test_kill_9_leaves_the_old_file_or_the_new_one(sample: Path) -> None:
    root = str(Path(artifact.__file__).parents[1])
    expected = sample.read_bytes()
    rng = random.Random(9)
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(sample), root, __file__], stdout=subprocess.PIPE
        )
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert sample.read_bytes() == expected
    artifact.write(sample, MANIFEST, contents())
    assert os.listdir(sample.parent) == [sample.name]


def test_readers_never_see_a_torn_file(sample: Path) -> None:
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            artifact.write(sample, MANIFEST, contents())

    writers = [threading.Thread(target=rewrite) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            with artifact.read(sample) as found:
                found.verify()
    finally:
        stop.set()
        for writer in writers:
            writer.join()


# Damage


@contextlib.contextmanager
def changed(path: Path, offset: int, value: int) -> Any:
    """One byte of the file xored with `value`, for a while."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ value]))
        yield
        file.seek(offset)
        file.write(old)


def accepted(path: Path) -> bool:
    try:
        with artifact.read(path) as found:
            found.verify()
    except IncompatibleError:
        return False
    return True


def test_damage_to_any_byte_is_noticed(sample: Path) -> None:
    """Every byte of the file in turn, in one bit or whole (seeded)."""
    rng = random.Random(20)
    missed = []
    for place in range(sample.stat().st_size):
        with changed(sample, place, rng.choice([1 << rng.randrange(8), 255])):
            missed += [place] if accepted(sample) else []
    assert missed == [] and accepted(sample)


def test_truncated_anywhere(sample: Path) -> None:
    whole = sample.read_bytes()
    rng = random.Random(21)
    lengths = [0, 1, 3, 4, 22, 4095, 4096, len(whole) - 1]
    for length in lengths + [rng.randrange(len(whole)) for _ in range(150)]:
        sample.write_bytes(whole[:length])
        refused(sample)


def test_longer_than_written(sample: Path) -> None:
    whole = sample.read_bytes()
    for data in (whole + b"\0", b"\0" + whole, whole + whole, whole[:5000] + whole):
        sample.write_bytes(data)
        refused(sample)


def test_a_file_that_is_written_into_after_it_was_verified(sample: Path) -> None:
    with artifact.read(sample) as found:
        found.verify()
        code = found.code(LIBRARY)
        with changed(sample, found.entries[LIBRARY].offset + 5, 1):
            assert bytes(code) == contents()[LIBRARY]
            with pytest.raises(IncompatibleError, match="SHA-256"):
                found.code(LIBRARY)


def test_a_file_that_shrinks_while_it_is_read(sample: Path) -> None:
    with artifact.read(sample) as found:
        os.truncate(sample, 3000)
        with pytest.raises(IncompatibleError, match="truncated"):
            found.verify()


# Foreign files


@pytest.mark.parametrize("data", [b"", b"P", b"hello\n" * 2000, b"\x7fELF" * 2000, b"PK\x05\x06"])
def test_not_an_artifact(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "foreign.dcm"
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("comment", [b"", b"dccompile 1 sha256 " + b"0" * 64])
def test_a_plain_zip(tmp_path: Path, comment: bytes) -> None:
    path = tmp_path / "plain.dcm"
    with zipfile.ZipFile(path, "w") as file:
        file.comment = comment
        file.writestr("manifest.json", json.dumps(MANIFEST) + " " * 400)
    refused(path)


def test_missing_folder_and_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.dcm")
    assert "No such file" in refused(tmp_path / "missing.dcm")
    assert "a folder" in refused(tmp_path)
    assert "no regular file" in refused(tmp_path / "pipe.dcm")
    assert "too long" in refused(tmp_path / ("n" * 300))


def test_unreadable(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    assert "Permission denied" in refused(sample)


def test_a_disk_that_fails(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with artifact.read(sample) as found:

        def fail(*args: Any) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(IncompatibleError, match="Input/output error"):
            found.verify()


def test_a_name_that_is_none() -> None:
    with pytest.raises(IncompatibleError, match="null byte"):
        artifact.read("a\0b")


# Lies: files with the right hashes whose statements are wrong


def write_raw(
    path: Path,
    entries: dict[str, Any],
    manifest: Any,
    text: bytes | None = None,
    form: int = 1,
    flaw: int = 0,
) -> None:
    """Writes an artifact without any of the writer's checks; an int entry is a hole of that size.

    `manifest` is completed with the entries unless it has some; `text` replaces its JSON; `form` is
    the format in the comment; `flaw` spoils the manifest's zip checksum.
    """
    table = {
        name: {
            "sha256": hashlib.sha256(b"" if isinstance(data, int) else data).hexdigest(),
            "size": data if isinstance(data, int) else len(data),
            "crc32": 0 if isinstance(data, int) else zlib.crc32(data),
        }
        for name, data in entries.items()
    }
    if text is None:
        full = {"entries": table, **manifest} if isinstance(manifest, dict) else manifest
        text = json.dumps(full).encode()
    rows = []
    with path.open("wb") as file:
        for name, data in [*entries.items(), ("manifest.json", text)]:
            size = data if isinstance(data, int) else len(data)
            crc = 0 if isinstance(data, int) else zlib.crc32(data)
            crc ^= flaw if name == "manifest.json" else 0
            header = layout.local_header(name, file.tell(), size, crc)
            file.write(header)
            rows.append(artifact.Entry(name, file.tell(), size, crc))
            file.seek(data, 1) if isinstance(data, int) else file.write(data)
        digest = hashlib.sha256(text).hexdigest()
        end = layout.directory(rows, file.tell(), digest)
        file.write(end.replace(b"dccompile 1 ", b"dccompile %d " % form))


def plain() -> dict[str, bytes]:
    packed = pack_params(TENSORS)
    return {**contents(), PARAMS: b"".join(bytes(c) for c in packed.chunks())}


def test_the_raw_writer_can_write_a_good_file(sample: Path, tmp_path: Path) -> None:
    path = tmp_path / "raw.dcm"
    write_raw(path, plain(), MANIFEST)
    assert accepted(path)


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *where, last, value = keys

    def change(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in where:
            place = place[key]
        place[last] = value

    return change


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "format of the future": _set("format", 2),
    "format as text": _set("format", "1"),
    "no inputs": lambda m: m.pop("inputs"),
    "inputs no list": _set("inputs", {}),
    "input no object": _set("inputs", 0, "x"),
    "input without name": _set("inputs", 0, "name", ""),
    "name no text": _set("inputs", 0, "name", ["x"]),
    "two inputs alike": lambda m: m["inputs"].append(m["inputs"][0]),
    "unknown dtype": _set("inputs", 0, "dtype", "object"),
    "dtype no text": _set("inputs", 0, "dtype", ["float32"]),
    "no shape": lambda m: m["inputs"][0].pop("shape"),
    "negative dim": _set("inputs", 0, "shape", 1, -13),
    "huge dim": _set("inputs", 0, "shape", 1, 2**63),
    "boolean dim": _set("inputs", 0, "shape", 1, True),
    "fractional dim": _set("inputs", 0, "shape", 1, 1.5),
    "rank of a thousand": _set("inputs", 0, "shape", ["N"] * 1000),
    "unknown symbol": _set("inputs", 0, "shape", 0, "M"),
    "no outputs": _set("outputs", []),
    "symbols no list": _set("symbols", None),
    "symbol that no input has": lambda m: m["symbols"].append({"name": "M", "min": 1, "max": 2}),
    "two symbols alike": lambda m: m["symbols"].append(m["symbols"][0]),
    "empty range": _set("symbols", 0, "min", 65),
    "range no number": _set("symbols", 0, "max", "64"),
    "no variants": _set("variants", []),
    "variant without target": lambda m: m["variants"][0].pop("target"),
    "two variants alike": lambda m: m["variants"].append(m["variants"][0]),
    "features no list": _set("variants", 0, "features", "avx2"),
    "features no text": _set("variants", 0, "features", [2]),
    "library absent": _set("variants", 0, "library", "lib/other.so"),
    "params absent": _set("variants", 0, "params", "other.safetensors"),
    "params no text": _set("variants", 0, "params", 3),
    "runtime absent": lambda m: m.pop("runtime"),
    "ffi no text": _set("runtime", "tvm_ffi", 1),
    "entries no object": _set("entries", []),
    "entry missing in the list": lambda m: m["entries"].pop("extra"),
    "no worker threads": lambda m: m["entries"].pop(artifact.RUNTIME),
    "entry that is not there": _set(
        "entries", "lib/z.so", {"sha256": "0" * 64, "size": 0, "crc32": 0}
    ),
    "entry of another size": _set("entries", LIBRARY, "size", 3),
    "entry of another checksum": _set("entries", LIBRARY, "crc32", 3),
    "entry of another hash": _set("entries", LIBRARY, "sha256", "0" * 64),
    "hash that is none": _set("entries", LIBRARY, "sha256", "Z" * 64),
    "size as text": _set("entries", LIBRARY, "size", "2800"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.dcm"
    manifest = copy.deepcopy(MANIFEST)
    entries = {**plain(), "extra": b"extra"}
    write_raw(path, entries, manifest)
    with artifact.read(path) as honest:
        manifest = honest.manifest
    LIES[lie](manifest)
    write_raw(path, entries, manifest)
    refused(path)


IMAGE = {"cubin": "extra", "ptx": "extra", "kernels": ["k1", "k2"]}
GPU = {
    "target": "cuda:sm_80",
    "features": [],
    "library": LIBRARY,
    "params": "extra",
    "pieces": [[0, 64]],
}

GPU_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no images": lambda v: v.pop("images"),
    "images of a CPU": _set("target", "x86-64-v4"),
    "images no list": _set("images", "extra"),
    "image no object": _set("images", 0, "extra"),
    "cubin absent": _set("images", 0, "cubin", "other"),
    "cubin no text": _set("images", 0, "cubin", ["extra"]),
    "ptx absent": _set("images", 0, "ptx", None),
    "no kernels": _set("images", 0, "kernels", []),
    "kernels no list": _set("images", 0, "kernels", "k1"),
    "kernel no text": _set("images", 0, "kernels", [1]),
    "kernel with a strange name": _set("images", 0, "kernels", ["k 1"]),
    "kernel twice": _set("images", 0, "kernels", ["k1", "k1"]),
    "kernel in two images": lambda v: v["images"].append(IMAGE),
    "no pieces": lambda v: v.pop("pieces"),
    "pieces no list": _set("pieces", "extra"),
    "piece no pair": _set("pieces", 0, [0]),
    "piece no number": _set("pieces", 0, ["0", 64]),
    "piece before params": _set("pieces", 0, [-64, 64]),
    "piece behind params": _set("pieces", 0, [64, 64]),
    "piece off a boundary": _set("pieces", 0, [1, 64]),
    "size off a boundary": _set("pieces", 0, [0, 5]),
    "pieces of no params": _set("params", None),
}


@pytest.mark.parametrize("lie", [None, *GPU_LIES])
def test_a_manifest_that_lies_about_a_gpu(tmp_path: Path, lie: str | None) -> None:
    path = tmp_path / "gpu.dcm"
    manifest = copy.deepcopy(MANIFEST)
    row = {**copy.deepcopy(GPU), "images": [copy.deepcopy(IMAGE)]}
    manifest["variants"].append(row)
    manifest["runtime"]["cuda"] = "13.0"
    if lie is not None:
        GPU_LIES[lie](row)
    write_raw(path, {**plain(), "extra": b"extra"}, manifest)
    if lie is None:
        assert accepted(path)
    else:
        refused(path)


@pytest.mark.parametrize("version", [13, "13", "13.0.1", "V13.0", ""])
def test_a_version_of_cuda_that_is_none(tmp_path: Path, version: Any) -> None:
    manifest = {**MANIFEST, "runtime": {**MANIFEST["runtime"], "cuda": version}}
    write_raw(tmp_path / "v.dcm", plain(), manifest)
    assert "CUDA" in refused(tmp_path / "v.dcm")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1e999}', b"9" * 5000],
    ids=["empty", "cut", "list", "null", "no-utf8", "deep", "infinite", "long-number"],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "none.dcm"
    write_raw(path, plain(), {}, text)
    refused(path)


def test_format_of_the_future(tmp_path: Path) -> None:
    path = tmp_path / "future.dcm"
    write_raw(path, plain(), {**MANIFEST, "format": 2}, form=2)
    assert "install a newer dccompile" in refused(path)


def test_a_manifest_of_another_checksum(tmp_path: Path) -> None:
    path = tmp_path / "crc.dcm"
    write_raw(path, plain(), MANIFEST, flaw=1)
    assert "manifest.json" in refused(path)


def test_no_manifest_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "order.dcm"
    text = json.dumps(MANIFEST).encode()
    rows = [artifact.Entry("manifest.json", 4096, len(text), zlib.crc32(text))]
    header = layout.local_header("manifest.json", 0, len(text), zlib.crc32(text))
    second = layout.local_header("z", len(header) + len(text), 1, zlib.crc32(b"z"))
    at = len(header) + len(text) + len(second)
    rows.append(artifact.Entry("z", at, 1, zlib.crc32(b"z")))
    end = layout.directory(rows, at + 1, hashlib.sha256(text).hexdigest())
    path.write_bytes(header + text + second + b"z" + end)
    assert "last entry" in refused(path)


def test_an_entry_twice(sample: Path) -> None:
    whole = sample.read_bytes()
    end = len(whole) - whole[::-1].index(b"\x02\x01KP") - 4  # the last row: the manifest's
    first = whole.index(b"PK\x01\x02")
    row = whole[first : whole.index(b"PK\x01\x02", first + 4)]
    sample.write_bytes(whole[:end] + row + whole[end:])
    refused(sample)


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 2**62), ("size", 0), ("count", 0), ("count", 2**60), ("at", 2**63), ("at", 0)],
)
def test_a_directory_that_points_elsewhere(sample: Path, field: str, value: int) -> None:
    whole = bytearray(sample.read_bytes())
    record = whole.rindex(b"PK\x06\x06")
    offset = {"count": 24, "size": 40, "at": 48}[field]
    whole[record + offset : record + offset + 8] = value.to_bytes(8, "little")
    sample.write_bytes(whole)
    refused(sample)


@pytest.mark.parametrize("size", [2**63, 2**40, 0])
def test_an_entry_that_claims_another_size(sample: Path, size: int) -> None:
    whole = bytearray(sample.read_bytes())
    row = whole.index(b"PK\x01\x02") + 46 + len(LIBRARY) + 4
    whole[row : row + 16] = size.to_bytes(8, "little") * 2
    sample.write_bytes(whole)
    refused(sample)


def _header(text: Any, data: bytes = bytes(128), length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def _row(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_PARAMS = {
    "too short": b"\1\2",
    "huge header": _header({}, length=2**40),
    "header past the end": _header({}, length=500),
    "no json": _header(b"{"),
    "a list": _header([1]),
    "deep": _header(b"[" * 100_000),
    "row without shape": _header({"a": {"dtype": "U8", "data_offsets": [0, 128]}}),
    "unknown dtype": _header({"a": _row("X8", [128], 0, 128)}),
    "dtype no text": _header({"a": _row(["U8"], [128], 0, 128)}),
    "past the end": _header({"a": _row("U8", [256], 0, 256)}),
    "hole": _header({"a": _row("U8", [64], 64, 128)}),
    "overlap": _header({"a": _row("U8", [128], 0, 128), "b": _row("U8", [64], 64, 128)}),
    "rest unclaimed": _header({"a": _row("U8", [64], 0, 64)}),
    "shape against size": _header({"a": _row("F32", [128], 0, 128)}),
    "negative": _header({"a": _row("U8", [-128], -128, 0)}),
    "overflow": _header({"a": _row("U8", [2**32, 2**32], 0, 128)}),
    "text offsets": _header({"a": _row("U8", [128], "0", 128)}),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_params_that_lie(tmp_path: Path, case: str) -> None:
    path = tmp_path / "params.dcm"
    write_raw(path, {**plain(), PARAMS: BAD_PARAMS[case]}, MANIFEST)
    assert PARAMS in refused(path)


def test_params_header_is_the_specified_one() -> None:
    packed = pack_params(TENSORS)
    file = memoryview(b"".join(bytes(c) for c in packed.chunks()))
    begin, table = parse_header(file, "params")
    assert begin % 64 == 0 and len(file) == packed.size == begin + packed.data_size
    assert {name: t.offset for name, t in table.items()} == packed.offsets
