"""The code of a thread of a depthwise convolution of bytes, see `_depthwise`."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from ...workload import INT8_LIMITS, Conv
from ._conv_epilogue import Constants, ConvEpilogue, Filter
from ._depthwise import Windows
from ._depthwise_strips import Builder, every, u32
from ._ir import T, address, call, do, i32, local, tirx, when

__all__ = ["Depthwise", "finish", "prepare"]


def permute(a: Any, b: Any, order: int) -> Any:
    return T.Bind(call("uint32", "permute", a, b, u32(order)))


def prepare(end: ConvEpilogue) -> Any:
    """Loads the numbers of the epilogue; returns what is outside of A, 4 bytes."""
    work = end.workload
    padded = work.padded and any(p > 0 for pair in work.pads for p in pair)
    end.prepare(fill=padded)
    return end.number("fill") if padded else u32(0)


def finish(
    to: Builder, end: ConvEpilogue, sums: list[Any], own: list[Filter], at: Any, count: Any
) -> None:
    """Stores C of the sums of neighbouring filters from `at` on; `count` of them, None: all.

    The sums have begun with the filters' `start`.
    """
    own = [replace(each, start=i32(0)) for each in own]
    added: list[Any] = [None] * len(sums)
    if to.r is not None:
        words = to.added(at, len(sums), count)
        added = [end.residual(words[i // 4], i % 4) for i in range(len(sums))]
    values = [end.value(*three) for three in zip(sums, own, added, strict=True)]
    if count is None and to.work.out in INT8_LIMITS:
        to.put(at, end.words(values))
    else:
        to.store(at, values, count)


class Depthwise(Builder):
    def __init__(self, name: str, workload: Conv, plan: Windows) -> None:
        self.plan = plan
        self.constants = Constants(workload, plan.slots, plan.weight_bytes)
        super().__init__(name, workload, plan.strips, self.constants.nbytes)

    def thread(self, unit: Any) -> None:
        work, plan = self.work, self.plan
        end = ConvEpilogue(work, self.constants, self.w)
        self.fill = prepare(end)
        self.channel = T.Bind(unit * plan.channels)
        self.count = None
        if work.channels % 4:
            self.count = T.Bind(tirx.min(i32(4), i32(work.channels) - self.channel))
        own = end.filters(self.channel, plan.channels)
        size = plan.across * plan.down * plan.channels
        self.sums = local(size, "int32")
        for i in range(size):
            T.buffer_store(self.sums, own[i % plan.channels].start, [i])
        self.weights = local(plan.part[1] * len(plan.uses) * plan.channels, "uint32")
        self.raw = local(len(self._rows()) * plan.words, "uint32")
        total = prod(plan.parts)
        if total == 1:
            last = {x: column for column, used in plan.columns.items() for x, _ in used}

            def ready(column: int) -> None:
                for x in range(plan.across):
                    if last[x] == column:
                        self._end(end, x, own)

            self._part(None, ready)
        else:
            with T.serial(i32(0), i32(total)) as part:
                self._part(part, lambda column: None)
            for x in range(plan.across):
                self._end(end, x, own)

    def _rows(self) -> list[int]:
        """Rows of A of a part, from the strip's first on."""
        plan = self.plan
        step = plan.share * self.work.strides[1]
        groups = range(plan.down // plan.share)
        return sorted({g * step + row for g in groups for rows in plan.windows for row in rows})

    def _part(self, part: Any, after: Any) -> None:
        """Adds a part of the kernel; calls `after` with every column once it is done."""
        work, plan = self.work, self.plan
        self._load_weights(part)
        moved, most = self.moves(part, plan.parts, (1, *plan.part))
        depth = self.inside(0, 0, moved[0], most[0])
        z = self.zin if moved[0] is None else self.zin + moved[0]
        bases, rows_in = {}, {}
        for row in self._rows():
            y = self.yin + row if moved[1] is None else self.yin + moved[1] + row
            bases[row] = T.Bind(self.row(z, y, moved[2]) + self.channel)
            rows_in[row] = every([*depth, *self.inside(1, row, moved[1], most[1])])
            if rows_in[row] is not None:
                rows_in[row] = T.Bind(rows_in[row])
        for column, used in plan.columns.items():
            here = every(self.inside(2, column, moved[2], most[2]))
            here = None if here is None else T.Bind(here)
            for i, row in enumerate(self._rows()):
                valid = every([v for v in (rows_in[row], here) if v is not None])
                place = bases[row] + column * work.channels
                self.load(i * plan.words, place, plan.words, self.count, valid)
            self._multiply(used)
            after(column)

    def _load_weights(self, part: Any) -> None:
        plan = self.plan
        first = T.Bind(self.channel * 4)
        if part is not None:
            first = T.Bind(first + part * (plan.part[1] * plan.column_bytes))
        for i in range(plan.part[1] * len(plan.uses)):
            for word in range(plan.words):
                target = address(self.weights, i * plan.channels + 4 * word)
                do("load16", target, address(self.w, first + (4 * i * plan.slots + 16 * word)))

    def _multiply(self, used: list[tuple[int, int]]) -> None:
        """All products of the column that is in `raw`."""
        plan = self.plan
        where = {row: i * plan.words for i, row in enumerate(self._rows())}
        for word in range(plan.words):
            made: dict[Any, Any] = {}
            for group in range(plan.down // plan.share):
                first = group * plan.share * self.work.strides[1]
                turned = [
                    self._turned([where[first + row] + word for row in rows], made)
                    for rows in plan.windows
                ]
                for x, k in used:
                    for n, use in enumerate(plan.uses):
                        y = group * plan.share + use.place
                        for lane in range(4):
                            channel = 4 * word + lane
                            at = (y * plan.across + x) * plan.channels + channel
                            weight = (k * len(plan.uses) + n) * plan.channels + channel
                            value = call(
                                "int32",
                                "dp4a_us",
                                turned[use.window][lane],
                                self.weights[weight],
                                self.sums[at],
                            )
                            T.buffer_store(self.sums, value, [at])

    def _turned(self, rows: list[int], made: dict[Any, Any]) -> list[Any]:
        """The operands of 4 channels, of a window of rows in `raw`."""
        if len(rows) == 1:
            return [self.raw[rows[0]]] * 4

        def pair(a: int, b: int) -> tuple[Any, Any]:
            if (a, b) not in made:
                two = self.raw[a], self.raw[b]
                made[a, b] = permute(*two, 0x5140), permute(*two, 0x7362)
            found: tuple[Any, Any] = made[a, b]
            return found

        low, high = pair(rows[0], rows[1])
        if len(rows) == 2:
            return [low, low, high, high]
        key = tuple(rows)
        if key not in made:
            if len(rows) == 3:
                third = self.raw[rows[2]]
                orders = ((low, 0x4410), (low, 0x5532), (high, 0x6610), (high, 0x7732))
                made[key] = [permute(two, third, order) for two, order in orders]
            else:
                others = pair(rows[2], rows[3])
                made[key] = [
                    permute(a, b, order)
                    for a, b in ((low, others[0]), (high, others[1]))
                    for order in (0x5410, 0x7632)
                ]
        out: list[Any] = made[key]
        return out

    def _end(self, end: ConvEpilogue, x: int, own: list[Filter]) -> None:
        plan = self.plan
        for y in range(plan.down):
            first = (y * plan.across + x) * plan.channels
            sums = [self.sums[first + i] for i in range(plan.channels)]
            with when(every(self.exists(x, y))):
                finish(self, end, sums, own, self.out_at(x, y, self.channel), self.count)
