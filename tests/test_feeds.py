"""Calibration data: cut into feeds of the model's batch, every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dccompile.errors import InputError
from dccompile.frontend.gate import Value
from dccompile.quantization.feeds import read
from dccompile.runtime.tensors import TensorSpec

OPEN = (TensorSpec("x", "float32", ("N", 3)), TensorSpec("index", "int64", ("N", 2)))
FIXED = (TensorSpec("x", "float32", (4, 3)),)
RANDOM = np.random.default_rng(2)


def samples(count: int, **more: np.ndarray) -> dict[str, np.ndarray]:
    x = RANDOM.standard_normal((count, 3)).astype(np.float32)
    return {"x": x, "index": RANDOM.integers(0, 9, (count, 2)), **more}


def saved(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def sizes(feeds: Any) -> list[int]:
    return [len(feed["x"]) for feed in feeds]


def test_a_file_is_cut_into_feeds(tmp_path: Path) -> None:
    data = samples(70)
    path = saved(tmp_path / "calib.npz", data)
    feeds = list(read(str(path), OPEN))
    assert sizes(feeds) == [32, 32, 6]
    for name in data:
        assert np.array_equal(np.concatenate([feed[name] for feed in feeds]), data[name])
        assert all(feed[name].flags.c_contiguous for feed in feeds)
    assert sizes(read(path, OPEN, batch=50)) == [50, 20]
    x = {"x": data["x"][:12]}
    assert sizes(read(saved(tmp_path / "fixed.npz", x), FIXED)) == [4, 4, 4]
    assert sizes(read(x, FIXED)) == [4, 4, 4]


def test_values_of_the_gate_are_inputs_too() -> None:
    inputs = [Value("x", "float32", ("N", 3)), Value("index", "int64", None)]
    feed = samples(5)
    assert sizes(read([feed], inputs)) == [5]


def test_columns_first_arrays_become_rows_first() -> None:
    data = samples(40)
    turned = {name: np.asfortranarray(array) for name, array in data.items()}
    for source in turned, [turned]:
        for feed in read(source, OPEN):
            assert feed["x"].flags.c_contiguous and len(feed["x"]) in (32, 8, 40)


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for name, count in (("b", 2), ("a", 33), ("c", 4)):
        saved(tmp_path / f"{name}.npz", samples(count))
    (tmp_path / "notes.txt").write_text("not data")
    assert sizes(read(tmp_path, OPEN)) == [32, 1, 2, 4]


def test_inputs_without_the_batch_belong_to_every_feed() -> None:
    inputs = (*OPEN, TensorSpec("table", "float32", (9, 2)), TensorSpec("t", "float32", ()))
    table = np.ones((9, 2), np.float32)
    data = samples(40, table=table, t=np.array(2, np.float32))
    feeds = list(read(data, inputs))
    assert sizes(feeds) == [32, 8]
    assert all(f["table"] is table and f["t"].shape == () for f in feeds)


def test_labels(tmp_path: Path) -> None:
    data = samples(40, label=np.arange(40), names=np.array(["a", "b"]))
    path = saved(tmp_path / "val.npz", data)
    feeds = list(read(path, OPEN, "--val", extra=True))
    assert [feed["label"].tolist() for feed in feeds] == [[*range(32)], [*range(32, 40)]]
    assert feeds[0]["names"].tolist() == ["a", "b"]
    with pytest.raises(InputError, match="array 'label' is no input, the inputs are 'x', 'index'"):
        list(read(path, OPEN))


def test_random_samples() -> None:
    feeds = list(read("random:70", OPEN))
    assert sizes(feeds) == [32, 32, 6]
    assert feeds[0]["x"].dtype == np.float32 and feeds[0]["index"].dtype == np.int64
    x = np.concatenate([feed["x"] for feed in feeds])
    assert abs(x.mean()) < 0.3 and 0.8 < x.std() < 1.2
    again = np.concatenate([feed["x"] for feed in read("random:50", OPEN, batch=7)])
    assert np.array_equal(again, x[:50])
    assert sizes(read("random:8", FIXED)) == [4, 4]


def test_an_iterable_is_passed_through_as_it_comes() -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(samples(5))
            yield taken[-1]

    feeds = read(endless(), OPEN)
    first = next(feeds)
    assert first["x"] is taken[0]["x"] and len(taken) == 1


NAN = samples(40)
NAN["x"][33, 1] = np.nan
INF = samples(3)
INF["x"][2, 0] = -np.inf
SHORT = samples(40)
SHORT["index"] = SHORT["index"][:39]
WRONG: dict[str, tuple[Any, Any, str, str]] = {
    "missing": ({"y": samples(2)["x"]}, FIXED, "DC2121", "'x' is missing, the arrays are 'y'"),
    "empty feed": ([{}], FIXED, "DC2121", "'x' is missing, the arrays are none"),
    "double": (
        [{"x": np.zeros((4, 3))}],
        FIXED,
        "DC2122",
        r"feed 0: input 'x' is float64\[4,3\], allowed is float32\[4,3\]",
    ),
    "swapped bytes": ([{"x": np.zeros((4, 3), ">f4")}], FIXED, "DC2122", "convert it"),
    "columns": (
        {"x": np.zeros((4, 5), np.float32)},
        FIXED,
        "DC2122",
        r"float32\[4,5\], allowed is float32\[samples,3\]",
    ),
    "rank": ({"x": np.zeros(3, np.float32)}, FIXED, "DC2122", r"float32\[3\]"),
    "number": ({"x": np.float32(1)}, FIXED, "DC2126", "'x' is a float32, allowed is a numpy array"),
    "scalar": ({"x": np.zeros((), np.float32)}, FIXED, "DC2122", r"float32\[\]"),
    "batch": ([{"x": np.zeros((5, 3), np.float32)}], FIXED, "DC2122", r"is float32\[5,3\]"),
    "nan": (NAN, OPEN, "DC2124", r"input 'x' holds nan at \[33, 1\]"),
    "inf": ([samples(2), INF], OPEN, "DC2124", r"feed 1: input 'x' holds -inf at \[2, 0\]"),
    "counts": (SHORT, OPEN, "DC2125", "40 in 'x', 39 in 'index' samples"),
    "feed counts": ([SHORT], OPEN, "DC2122", "dim 'N' is 40 in 'x' and 39 in 'index'"),
    "rest": (
        {"x": np.zeros((10, 3), np.float32)},
        FIXED,
        "DC2125",
        "10 samples, the model's batch is 4 .*Fix: leave out 2 or add 2",
    ),
    "none": ({"x": np.zeros((0, 3), np.float32)}, FIXED, "DC2123", "no samples"),
    "no feeds": ([], FIXED, "DC2123", "no samples"),
    "no random": ("random:0", FIXED, "DC2123", "no samples"),
    "random rest": ("random:6", FIXED, "DC2125", "6 samples"),
    "random what": ("random:many", FIXED, "DC2120", "not random:N"),
    "random open": (
        "random:2",
        (TensorSpec("x", "float32", ("N", "L")),),
        "DC2122",
        r"input 'x' is float32\[N,L\], only the batch may be open",
    ),
    "lists": ([{"x": [[1.0, 2.0, 3.0]]}], FIXED, "DC2126", "'x' is a list"),
    "not a feed": ([np.zeros((4, 3))], FIXED, "DC2126", "feed 0: ndarray, allowed is a dict"),
    "not iterable": (3, FIXED, "DC2126", "int, allowed are a path"),
    "no file": ("nowhere.npz", FIXED, "DC2120", "'nowhere.npz': no such file or folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data(name: str) -> None:
    source, inputs, code, message = WRONG[name]
    with pytest.raises(InputError, match=f"^--data.*{message}") as error:
        list(read(source, inputs, "--data"))
    assert error.value.code == code
    assert "Fix: " in str(error.value) and "\n" not in str(error.value)


def pickled(path: Path) -> None:
    np.savez(path, x=np.array([{}, None]))


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((4, 3), np.float32))


def text(path: Path) -> None:
    path.write_text("x,y\n1,2\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def damaged(path: Path) -> None:
    np.savez(path, x=np.zeros((4, 3), np.float32))
    raw = bytearray(path.read_bytes())
    raw[150] ^= 255  # in the data
    path.write_bytes(raw)


def truncated(path: Path) -> None:
    np.savez(path, x=np.zeros((400, 3), np.float32))
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize("lie", [pickled, one_array, text, empty, damaged, truncated])
def test_a_file_that_is_no_npz(lie: Any, tmp_path: Path) -> None:
    path = tmp_path / "calib.npz"
    lie(path)
    with pytest.raises(InputError, match=r"calib\.npz': not in \.npz format") as error:
        list(read(path, FIXED))
    assert error.value.code == "DC2120" and "\n" not in str(error.value)


def test_a_wrong_path_is_found_before_the_first_feed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a folder without \.npz files"):
        read(tmp_path, FIXED)
