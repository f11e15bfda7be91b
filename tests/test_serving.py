"""What a server relies on: weights shared between processes, huge pages, one artifact for all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import graphs
import numpy as np
import pytest

import dccompile as dc

ROWS, DIM = 400_000, 32  # 51 MB in float32

CHILD = """
import os, sys
import numpy as np
import dccompile as dc
path = sys.argv[1]
module = dc.load(path, threads=1)
index = np.arange(400_000).reshape(-1, 100)
module(index)
print("ready", flush=True)
sys.stdin.readline()
sizes = {}
mine = False
for line in open("/proc/self/smaps"):
    word = line.split()
    if not word[0].endswith(":"):
        mine = path in line
    elif mine and word[0] in ("Rss:", "Pss:"):
        sizes[word[0]] = sizes.get(word[0], 0) + int(word[1])
print(sizes["Rss:"], sizes["Pss:"], flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = graphs.Graph()
    index = g.input("index", ["N", 100], "int64")
    rows = g.op("Gather", g.constant(g.random.normal(size=(ROWS, DIM))), index, axis=0)
    model = g.model(g.op("ReduceSum", rows, g.constant([1], "int64"), keepdims=0, out="y"))
    path = tmp_path_factory.mktemp("serving") / "table.dcm"
    dc.compile(model, targets="host").save(path)
    return path


def test_four_processes_share_one_copy_of_the_weights(table: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(table)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        totals = []
        for child in children:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            totals.append([int(v) for v in child.stdout.readline().split()])
    finally:
        for child in children:
            child.kill()
            child.wait()
    table_kib = ROWS * DIM * 4 // 1024
    resident, proportional = (sum(column) for column in zip(*totals, strict=True))
    assert resident > 3.9 * table_kib  # every process has all of it
    assert proportional < 1.2 * table_kib  # and all of them one copy


def test_huge_pages_change_nothing_but_the_memory(table: Path) -> None:
    index = np.random.default_rng(0).integers(0, ROWS, (5, 100))
    expected = dc.load(table)(index)
    np.testing.assert_array_equal(dc.load(table, huge_pages=True)(index)[0], expected[0])
