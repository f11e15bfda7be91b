"""The code of a thread of a convolution of groups, see `_groupconv`."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import Any

from ...workload import Conv
from ._conv_epilogue import Constants, ConvEpilogue
from ._depthwise_float import bias_of, float_bytes, float_finish
from ._depthwise_loops import finish, prepare
from ._depthwise_strips import Builder, every, u32
from ._groupconv import Groups
from ._ir import T, address, call, ceil_div, do, i32, local, tirx, when
from ._math import fma

__all__ = ["FloatGrouped", "IntegerGrouped"]


class Grouped(Builder):
    """The loops; a subclass says what a product is, and what follows the sums."""

    sums_of: str  # dtype

    def __init__(self, name: str, workload: Conv, plan: Groups, nbytes: int) -> None:
        self.plan = plan
        super().__init__(name, workload, plan.strips, nbytes)

    @abstractmethod
    def begin(self, slot: Any) -> list[Any]:
        """Loads what the end needs of the filters in W from `slot` on; where their sums start."""

    @abstractmethod
    def product(self, a: Any, w: Any, total: Any) -> Any:
        """total plus a word of A times a word of W, both uint32."""

    @abstractmethod
    def end(self, sums: list[Any], at: Any) -> None:
        """Stores C from `at` on."""

    def thread(self, unit: Any) -> None:
        plan = self.plan
        slot = T.Bind(unit * plan.filters)
        self.group = T.Bind(unit // plan.shares) if plan.shares > 1 else unit
        self.count = None
        filter_ = slot
        if plan.own % plan.filters:
            own = T.Bind(unit % plan.shares * plan.filters) if plan.shares > 1 else i32(0)
            filter_ = T.Bind(self.group * plan.own + own)
            self.count = T.Bind(tirx.min(i32(plan.filters), i32(plan.own) - own))
        self.slot = slot
        self.fill = u32(0)
        starts = self.begin(slot)
        self.sums = local(plan.across * plan.filters, self.sums_of)
        for i in range(plan.across * plan.filters):
            T.buffer_store(self.sums, starts[i % plan.filters], [i])
        self.weights = local(plan.part * plan.deep * plan.filters, "uint32")
        self.raw = local(plan.deep, "uint32")
        total = prod(plan.steps)
        if total == 1:
            self._step(None)
        else:
            with T.serial(i32(0), i32(total)) as step:
                self._step(step)
        for x in range(plan.across):
            sums = [self.sums[x * plan.filters + f] for f in range(plan.filters)]
            with when(every(self.exists(x, 0))):
                self.end(sums, self.out_at(x, 0, filter_))

    def _step(self, step: Any) -> None:
        """Adds `deep` words of channels of a row of the kernel, or of a part of one."""
        plan, work = self.plan, self.work
        first = T.Bind(self.slot * 4)
        if step is not None:
            first = T.Bind(first + step * plan.step_bytes)
        for i in range(plan.part * plan.deep):
            for quad in range(plan.quads):
                target = address(self.weights, i * plan.filters + 4 * quad)
                do("load16", target, address(self.w, first + (4 * i * plan.slots + 16 * quad)))
        numbers = self.digits(step, plan.steps)
        moved, most = self.moves(numbers[:3], plan.steps[:3], (1, 1, plan.part))
        z, y = (
            start if move is None else start + move
            for start, move in zip((self.zin, self.yin), moved[:2], strict=True)
        )
        channel = self.group * plan.group
        count: Any = None
        if not plan.aligned:
            count = i32(min(plan.group, plan.lanes))
        if numbers[3] is not None:
            inner = T.Bind(numbers[3] * (plan.deep * plan.lanes))
            channel = channel + inner
            if not plan.aligned:
                count = T.Bind(tirx.min(i32(plan.lanes), i32(plan.group) - inner))
        base = T.Bind(self.row(z, y, moved[2]) + channel)
        row = [self.inside(dim, 0, moved[dim], most[dim]) for dim in (0, 1)]
        valid_row = every([*row[0], *row[1]])
        valid_row = None if valid_row is None else T.Bind(valid_row)
        for column, used in plan.columns.items():
            here = every(self.inside(2, column, moved[2], most[2]))
            valid = every([v for v in (valid_row, here) if v is not None])
            self.load(0, base + column * work.channels, plan.deep, count, valid)
            for word in range(plan.deep):
                for x, k in used:
                    for f in range(plan.filters):
                        at = x * plan.filters + f
                        w = self.weights[(k * plan.deep + word) * plan.filters + f]
                        value = self.product(self.raw[word], w, self.sums[at])
                        T.buffer_store(self.sums, value, [at])


class IntegerGrouped(Grouped):
    """dp4a of 4 channels."""

    sums_of = "int32"

    def __init__(self, name: str, workload: Conv, plan: Groups) -> None:
        self.constants = Constants(workload, plan.slots, plan.weight_bytes)
        super().__init__(name, workload, plan, self.constants.nbytes)

    def begin(self, slot: Any) -> list[Any]:
        self.epilogue = ConvEpilogue(self.work, self.constants, self.w)
        self.fill = prepare(self.epilogue)
        self.own = self.epilogue.filters(slot, self.plan.filters)
        return [each.start for each in self.own]

    def product(self, a: Any, w: Any, total: Any) -> Any:
        return call("int32", "dp4a_us", a, w, total)

    def end(self, sums: list[Any], at: Any) -> None:
        finish(self, self.epilogue, sums, self.own, at, self.count)


class FloatGrouped(Grouped):
    """A multiply-add of one channel."""

    sums_of = "float32"

    def __init__(self, name: str, workload: Conv, plan: Groups) -> None:
        self.bias = ceil_div(plan.weight_bytes, 64) * 64
        super().__init__(name, workload, plan, float_bytes(workload, plan.weight_bytes, plan.slots))

    def begin(self, slot: Any) -> list[Any]:
        self.own = bias_of(self, self.bias, slot, self.plan.filters)
        return [tirx.const(0, "float32")] * self.plan.filters

    def product(self, a: Any, w: Any, total: Any) -> Any:
        return fma(call("float32", "as_float", a), call("float32", "as_float", w), total)

    def end(self, sums: list[Any], at: Any) -> None:
        float_finish(self, sums, self.own, at, self.count)
