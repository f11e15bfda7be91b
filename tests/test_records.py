"""Tuning logs: what is read and written, which record speaks for a workload, what is warned of."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dccompile import fingerprint, lookup, records
from dccompile.errors import TuningError, UsageError
from dccompile.kernel import Kernel
from dccompile.lookup import Tuning
from dccompile.machine import TARGETS, cpu_type
from dccompile.records import Log, Record
from dccompile.workload import Conv, EmbeddingBag, Gemm, Interaction, Residual, from_json

MACHINE = TARGETS["x86-64-v4"]
WORK = Gemm(64, 512, 512, "u8", "s8", "u8", bias="s32")
CONV = Conv(1, (1, 56, 56), 64, 128, (1, 3, 3), pads=((0, 0), (1, 1), (1, 1)))
WORKLOADS = [
    WORK,
    replace(WORK, m=None, out="f32", activation="clip", clip=(-1.0, 1.0), runtime=True),
    replace(WORK, out="s8", clamp=(3, 9), zero_point=4),
    replace(CONV, residual=Residual("u8", "s8", True), strides=(1, 2, 2)),
    EmbeddingBag((1000, 20), 64, "u8", pooling=20, padding=7),
    Interaction(27, 64, order="upper"),
]


@dataclass(frozen=True)
class Params:
    mr: int = 4
    nr: int = 2
    wide: bool = False


class Fake(Kernel):
    name = "gemm_fake_avx512"
    features = ("avx512f",)
    Params: Any = Params
    SPACE: ClassVar = {"mr": (1, 2, 4, 8), "nr": (1, 2, 4), "wide": (False, True)}

    def refuses(self, workload: Any) -> str | None:
        return None

    def registers(self, params: Params) -> int:
        return params.mr * params.nr + params.nr + 1

    def default(self, workload: Any, machine: Any) -> Params:
        return Params(mr=3) if workload.n == 500 else Params()

    def pack(self, *_: Any) -> Any:
        raise NotImplementedError

    build = pack


class FakeConv(Fake):
    name = "conv_fake_avx512"

    def default(self, workload: Any, machine: Any) -> Params:
        return Params()


KERNEL, CONV_KERNEL = Fake(), FakeConv()


def record(workload: Any = WORK, kernel: Kernel = KERNEL, **changes: Any) -> Record:
    shape, form = records.split(workload.representative())
    values: dict[str, Any] = {
        "params": {"mr": 8, "nr": 2, "wide": False},
        **dict.fromkeys(("us", "p20", "p80"), 40.0),
        **{"default_us": 44.0, "gain": 1.1, "threads": 1, "tried": 16, "cpu": "amd-25-17"},
        **{"tvm": "0.27.0", "date": "2026-11-23", "schedule": fingerprint.schedule(kernel)},
    }
    return Record(kernel.name, MACHINE.name, shape, form, **{**values, **changes})


def put(folder: Path, *found: Record) -> Path:
    for one in found:
        records.update(folder, one.target, one.kernel, [one])
    return folder / MACHINE.name / f"{found[0].kernel}.jsonl"


def find(
    folder: Path, work: Any = WORK, cpu: str | None = "amd-25-17", kernel: Kernel = KERNEL
) -> tuple[lookup.Found | None, list[str]]:
    tuning = Tuning(folder, MACHINE.name, cpu)
    found = tuning.find(kernel, work, MACHINE)
    assert tuning.find(kernel, work, MACHINE) == found
    return found, tuning.warnings


# ---- workloads ----


@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.op)
def test_workloads_come_back_from_json(work: Any) -> None:
    again = from_json(json.loads(json.dumps(work.to_json())))
    assert again == work
    assert hash(again) == hash(work)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"op": "pool"}, "pool"),
        ({"op": None}, "None"),
        ({"n": "512"}, "n is '512'"),
        ({"n": True}, "n is True"),
        ({"rows": 3}, "rows"),
        ({"clamp": [1, 2, 3]}, "clamp"),
        ({"clip": [[1.0], 2.0]}, "clip"),
    ],
)
def test_what_is_no_workload_is_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word.replace("[", r"\[")):
        from_json({**WORK.to_json(), **change})
    lacking = WORK.to_json()
    del lacking["k"]
    with pytest.raises(ValueError, match="lacks k"):
        from_json(lacking)


@pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.op)
def test_a_record_gives_its_workload_back(work: Any) -> None:
    one = record(work)
    assert one.workload == work.representative() == one.workload.representative()
    assert one.key == records.key(work)
    assert Record.parse(one.to_line(), one.kernel, one.target) == one


def test_numbers_of_an_epilogue_need_no_records_of_their_own() -> None:
    base = replace(WORK, clamp=(3, 9))
    assert records.key(replace(base, zero_point=7, clamp=(0, 100))) == records.key(base)
    assert records.key(base) != records.key(WORK)
    clipped = replace(WORK, out="f32", activation="clip", clip=(0.0, 1.0))
    assert records.key(clipped) == records.key(replace(clipped, clip=(-3.0, 2.5)))
    bags = EmbeddingBag((10,), 4, padding=3)
    assert records.key(bags) == records.key(replace(bags, padding=4))
    assert records.key(bags) != records.key(replace(bags, padding=None))


# ---- files ----


def test_a_log_is_sorted_by_numbers_and_has_one_line_each(tmp_path: Path) -> None:
    sizes = [512, 64, 1024, 64]
    path = put(tmp_path, *(record(replace(WORK, n=n), tried=i) for i, n in enumerate(sizes)))
    log = Log.read(path)
    assert [r.shape["n"] for r in log.records] == [64, 512, 1024]
    assert log.records[0].tried == 3  # the later one, in the place of the earlier
    assert log.broken == []
    assert path.read_bytes() == b"".join(r.to_line().encode() + b"\n" for r in log.records)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_unknown_fields_and_unreadable_lines_stay(tmp_path: Path) -> None:
    strange = '{"not": "a record"}\r'
    marker = b"<<<<<<< \xff main"
    path = put(tmp_path, record())
    known = json.loads(path.read_text()) | {"note": {"by": "hand", "form": {}}}
    path.write_bytes(f"{strange}\n\n{json.dumps(known)}\n".encode() + marker)
    put(tmp_path, record(replace(WORK, m=7)))
    lines = path.read_bytes().split(b"\n")
    assert lines[2:] == [strange.encode(), marker, b""]
    log = Log.read(path)
    assert [r.extra for r in log.records] == [{}, {"note": {"by": "hand", "form": {}}}]
    assert [(b.line, b.text.encode(errors="surrogateescape")) for b in log.broken] == [
        (3, strange.encode()),
        (4, marker),
    ]
    assert "without the fields" in log.broken[0].reason
    assert "not JSON" in log.broken[1].reason


def test_lines_in_another_order_or_spelling_are_records(tmp_path: Path) -> None:
    path = put(tmp_path, record(), record(replace(WORK, m=7)))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    text = "\r\n".join(json.dumps(dict(reversed(row.items()))) for row in rows)
    path.write_bytes(text.encode())  # and no end of the last line
    assert len(Log.read(path).records) == 2
    found, warnings = find(tmp_path)
    assert found is not None and found.source == "exact"
    assert warnings == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"us": "fast"}, "us is 'fast'"),
        ({"gain": float("nan")}, "gain is nan"),
        ({"p20": -1.0}, "p20 is -1.0"),
        ({"threads": True}, "threads is True"),
        ({"params": [1]}, "params"),
        ({"cpu": None}, "cpu is None"),
    ],
)
def test_broken_records_are_told_by_field(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = put(tmp_path, record())
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    (broken,) = Log.read(path).broken
    assert reason in broken.reason
    found, warnings = find(tmp_path)
    assert found is None
    assert len(warnings) == 1 and "line 1" in warnings[0] and reason in warnings[0]


@pytest.mark.parametrize("end", [1, 20, 150, -2])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, end: int) -> None:
    path = put(tmp_path, record(), record(replace(WORK, m=65)))
    first, second, _ = path.read_text().split("\n")
    path.write_text(first + "\n" + second[:end])
    log = Log.read(path)
    assert [r.shape["m"] for r in log.records] == [64]
    assert [b.line for b in log.broken] == [2]
    found, warnings = find(tmp_path)
    assert found is not None and found.source == "exact"
    assert any("line 2 is no record" in w and "records prune" in w for w in warnings)


def test_a_line_that_only_looks_like_a_record_is_told(tmp_path: Path) -> None:
    path = put(tmp_path, record())
    path.write_text(path.read_text().replace('"tried":16', '"tried":1,6'))
    log = Log.read(path)
    assert (len(log.entries), log.records) == (1, [])
    assert [(b.line, "not JSON" in b.reason) for b in log.broken] == [(1, True)]
    found, warnings = find(tmp_path)
    assert found is None
    assert "line 1 is no record: not JSON" in warnings[0]


def test_processes_that_update_one_log_lose_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "import test_records as t\n"
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "for i in range(20): t.put(Path(sys.argv[1]), t.record(replace(t.WORK, m={} + i)))"
    )
    paths = [str(Path(__file__).parent)]
    jobs = [
        subprocess.Popen([sys.executable, "-c", script.format(start), str(tmp_path), *paths])
        for start in (100, 110, 200)
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    log = Log.read(tmp_path / MACHINE.name / f"{KERNEL.name}.jsonl")
    assert sorted(r.shape["m"] for r in log.records) == [*range(100, 130), *range(200, 220)]
    assert log.broken == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(TuningError, match=r"logs.*Fix: name a folder that can be written") as error:
        put(tmp_path / "logs", record())
    assert (error.value.code, error.value.exit_code) == ("DC7010", 7)
    (tmp_path / MACHINE.name).write_text("a file where the target's folder should be")
    with pytest.raises(TuningError, match=MACHINE.name):
        put(tmp_path, record())


def test_options_that_name_logs(tmp_path: Path) -> None:
    assert lookup.logs("none") is None
    assert lookup.logs(tmp_path) == tmp_path
    packaged = lookup.logs(None)
    assert packaged == records.packaged() and packaged.is_dir()
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "absent", tmp_path / "file", ""):
        with pytest.raises(UsageError, match=r"folder.*Fix: name a folder") as error:
            lookup.logs(wrong)
        assert error.value.code == "DC2030"
    host = lookup.cpus(["host", "x86-64-v3"])
    assert list(host.values()).count(cpu_type()) == 1
    assert lookup.cpus(["x86-64-v3", "x86-64-v4"]) == {"x86-64-v3": None, "x86-64-v4": None}


# ---- which record speaks ----


def test_the_exact_record_comes_before_near_ones(tmp_path: Path) -> None:
    put(tmp_path, record(), record(replace(WORK, m=63), params={"mr": 2, "nr": 4, "wide": True}))
    found, warnings = find(tmp_path, replace(WORK, zero_point=3))
    assert found is not None and warnings == []
    assert (found.source, found.params) == ("exact", Params(8, 2, False))
    assert found.record_id == record().id
    assert "1.10x" in found.why and "2026-11-23" in found.why


def test_the_nearest_record_within_the_limit(tmp_path: Path) -> None:
    wide = {"mr": 2, "nr": 4, "wide": True}
    put(tmp_path, record(replace(WORK, m=32)), record(replace(WORK, m=80), params=wide))
    found, _ = find(tmp_path)
    assert found is not None
    assert (found.source, found.params) == ("nearest", Params(2, 4, True))
    assert "80x512x512" in found.why
    for far in (replace(WORK, m=320), replace(WORK, m=None), replace(WORK, out="s8")):
        assert find(tmp_path, far) == (None, [])


def test_where_the_default_won_nearby_it_is_the_default_of_this_workload(tmp_path: Path) -> None:
    ours = {"mr": 4, "nr": 2, "wide": False}
    for params, gain in ((ours, 1.0), ({**ours, "nr": 1}, 1.015)):
        folder = tmp_path / str(gain)
        put(folder, record(params=params, gain=gain))
        found, _ = find(folder, replace(WORK, n=500))
        assert found is not None
        assert (found.source, found.params) == ("nearest", Params(mr=3))
        assert "so this one has its default" in found.why


def test_records_of_another_cpu_come_last(tmp_path: Path) -> None:
    other = record(cpu="intel-6-143", params={"mr": 1, "nr": 1, "wide": True})
    put(tmp_path, other)
    for work, cpu, source in (
        (WORK, "amd-25-17", "family"),
        (replace(WORK, m=60), "amd-25-17", "family"),
        (WORK, "intel-6-143", "exact"),
        (WORK, None, "exact"),
        (replace(WORK, m=60), None, "nearest"),
    ):
        found, _ = find(tmp_path, work, cpu)
        assert found is not None
        assert (found.source, found.params) == (source, Params(1, 1, True))
    assert "intel-6-143" in find(tmp_path)[0].why  # type: ignore[union-attr]
    put(tmp_path, record(replace(WORK, m=60)))
    found, _ = find(tmp_path)
    assert found is not None
    assert (found.source, found.params.mr) == ("nearest", 8)
    put(tmp_path, record())
    assert find(tmp_path)[0].params.mr == 8  # type: ignore[union-attr]
    assert find(tmp_path, cpu=None)[0].record.cpu == "amd-25-17"  # type: ignore[union-attr]


def test_other_versions_of_the_schedule_are_counted_and_not_used(tmp_path: Path) -> None:
    put(tmp_path, record(schedule="0" * 8), record(replace(WORK, m=63), schedule="1" * 8))
    put(tmp_path, record(replace(WORK, m=9)))
    found, (warning,) = find(tmp_path)
    assert found is None
    assert f"{MACHINE.name}/{KERNEL.name}.jsonl" in warning
    assert "2 of 3 records" in warning and "records replay --update" in warning
    assert str(tmp_path) not in warning


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"mr": 5, "nr": 2, "wide": False}, "mr=5, allowed are 1, 2, 4, 8"),
        ({"mr": 4, "nr": 2, "wide": 0}, "wide=0"),
        ({"mr": 4, "nr": [2], "wide": False}, "nr="),
        ({"mr": 4, "nr": 2}, "has mr, nr, wide"),
        ({"mr": 4, "nr": 2, "wide": False, "x": 1}, "params mr, nr, wide, x"),
        ({"mr": 8, "nr": 4, "wide": False}, "37 registers, x86-64-v4 has 32"),
    ],
)
def test_illegal_params_are_a_warning_and_the_next_record(
    tmp_path: Path, params: dict[str, Any], word: str
) -> None:
    put(tmp_path, record(params=params))
    found, (warning,) = find(tmp_path)
    assert found is None
    assert word in warning and "64x512x512" in warning and "records prune" in warning
    put(tmp_path, record(replace(WORK, m=63)))
    assert find(tmp_path)[0].source == "nearest"  # type: ignore[union-attr]


def test_a_default_outside_of_the_space_is_legal_only_where_it_is_the_default(
    tmp_path: Path,
) -> None:
    odd = {"mr": 3, "nr": 4, "wide": False}
    put(tmp_path, record(replace(WORK, n=500), params=odd))
    found, warnings = find(tmp_path, replace(WORK, n=500))
    assert found is not None and found.params == Params(3, 4)
    assert find(tmp_path) == (None, []) and warnings == []


@pytest.mark.parametrize("shape", [{"m": 64, "n": "512", "k": 512}, {"m": 64, "n": 512, "q": 1}])
def test_a_shape_of_no_workload_is_a_warning(tmp_path: Path, shape: dict[str, Any]) -> None:
    put(tmp_path, replace(record(), shape=shape))
    found, (warning,) = find(tmp_path)
    assert found is None
    assert "line 1 is no record" in warning


@pytest.mark.parametrize(
    "change", [{"strides": [1, 0, 0]}, {"groups": 0}, {"size": [1, 10**400, 1]}, {"batch": -1}]
)
def test_impossible_sizes_are_a_warning_at_most(tmp_path: Path, change: dict[str, Any]) -> None:
    whole = record(CONV, CONV_KERNEL)
    put(tmp_path, replace(whole, shape=whole.shape | change), replace(whole, tried=3))
    found, warnings = find(tmp_path, replace(CONV, filters=192), kernel=CONV_KERNEL)
    assert found is not None and found.record.tried == 3
    assert len(warnings) <= 1


def test_a_log_that_cannot_be_read_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / MACHINE.name / f"{KERNEL.name}.jsonl").mkdir(parents=True)
    found, (warning,) = find(tmp_path)
    assert found is None
    assert "None of its records is used" in warning
    assert find(tmp_path / "absent") == (None, [])
    assert Tuning(None, MACHINE.name, None).find(KERNEL, WORK, MACHINE) is None


def test_convolutions_are_near_only_with_the_same_window_and_groups(tmp_path: Path) -> None:
    put(tmp_path, record(CONV, CONV_KERNEL))
    near = [
        replace(CONV, size=(1, 60, 60)),
        replace(CONV, filters=192),
        replace(CONV, pads=((0, 0), (1, 0), (1, 0))),
    ]
    far = [
        replace(CONV, kernel=(1, 5, 5), pads=((0, 0), (2, 2), (2, 2))),
        replace(CONV, strides=(1, 2, 2), size=(1, 112, 112)),
        replace(CONV, groups=64, filters=64),
        replace(CONV, groups=2),
        replace(CONV, batch=None),
        replace(CONV, size=(1, 28, 28)),
    ]
    for work in near + far:
        found, warnings = find(tmp_path, work, kernel=CONV_KERNEL)
        assert (found is not None and found.source == "nearest") == (work in near), work
        assert warnings == []


def test_the_best_of_equal_records_is_the_latest_of_the_fewest_threads(tmp_path: Path) -> None:
    path = put(tmp_path, record(date="2026-01-01"))
    later = record(date="2026-02-01", params={"mr": 1, "nr": 1, "wide": False})
    threads = record(threads=2, date="2026-03-01", params={"mr": 2, "nr": 1, "wide": False})
    with path.open("a") as file:  # as a merge by git may leave them
        file.write(threads.to_line() + "\n" + later.to_line() + "\n")
    assert find(tmp_path)[0].params.mr == 1  # type: ignore[union-attr]


def test_ten_thousand_records(tmp_path: Path) -> None:
    path = tmp_path / MACHINE.name / f"{KERNEL.name}.jsonl"
    path.parent.mkdir()
    rows = [record(replace(WORK, n=n)).to_line() for n in range(1, 10001)]
    path.write_text("\n".join(rows) + "\n")
    log = Log.read(path)
    assert (len(log.entries), log.broken) == (10000, [])
    assert find(tmp_path)[0].source == "exact"  # type: ignore[union-attr]
    assert find(tmp_path, replace(WORK, n=10003))[0].record.shape["n"] == 10000  # type: ignore


# ---- versions of schedules ----


def test_comments_are_no_other_version(tmp_path: Path) -> None:
    code = 'X = "a # b"\n\ndef f(x):\n    return x  # why\n'
    same = '"""About."""\n# more\nX = "a # b"  # c\n\n\ndef f(x):\n    """Says."""\n    return x\n'
    assert fingerprint.stripped(code) == fingerprint.stripped(same)
    for other in (code.replace("# b", "# c"), code.replace("return x", "return -x")):
        assert fingerprint.stripped(code) != fingerprint.stripped(other)


def test_a_version_is_of_all_files_that_are_imported(tmp_path: Path) -> None:
    texts = {
        "a": "from ._b import f\nfrom ...kernel import g\nfrom . import _d as x, _g",
        "_b": "if X:\n    from ._c import (\n    h as _e,\n)",
        "_c": "from . import (\n    _f as y,\n    # _e,\n)",
        "_d": '"""\nfrom ._e import a\n"""',
        **dict.fromkeys(("_e", "_f", "_g"), ""),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    found = [p.stem for p in fingerprint.imported_files(tmp_path / "a.py")]
    assert found == ["_b", "_c", "_d", "_f", "_g", "a"]


def test_versions_of_kernels_differ() -> None:
    from dccompile import registry

    versions = [fingerprint.schedule(k) for k in registry.kernels()]
    assert len(set(versions)) == len(versions)
    assert all(len(v) == 8 and int(v, 16) >= 0 for v in versions)


def test_imports_are_found_as_python_finds_them() -> None:
    folder = Path(fingerprint.__file__).parents[1] / "schedules" / "x86"
    for path in folder.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names |= {node.module} if node.module else {a.name for a in node.names}
        found = {p.stem for p in fingerprint.imported_files(path)}
        assert names <= found
        assert all((folder / f"{name}.py").is_file() for name in found)


def test_tables_beyond_any_cache_share_a_record(tmp_path: Path) -> None:
    huge = EmbeddingBag((40_000_000, 30), 64, "u8", pooling=20)
    work = huge.representative()
    assert sum(work.rows) * work.row_bytes <= 1 << 30 and work.rows[1] == 30
    more = replace(huge, rows=(50_000_000, 30))
    assert records.key(more) == records.key(huge) != records.key(replace(huge, rows=(1000, 30)))
