"""Removes channel shuffles between grouped convolutions: the next ones read what they need.

ShuffleNet shuffles the channels that a pointwise convolution in groups makes, before a depthwise
and another one in groups. A depthwise convolution does as well in the order before the shuffle.
The last one then finds the channels of its group g in `parts` runs, at run * C / parts +
g * C / (parts * groups): it is a convolution along an axis of `parts` runs, with a window of all.

    shuffled  (N, H, W, C), groups of C / groups, window 1 x 1 x 1
    as it is  (N, H, W, parts, C / parts), groups of C / parts / groups, window 1 x 1 x parts

A shuffle of what a convolution without groups makes is another order of its filters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from onnx import NodeProto

from .convolutions import DOMAIN, OP, ConvSite
from .editor import Editor, attribute, is_op
from .forms import channel_shuffle

Sites = dict[str, ConvSite]


def absorb_shuffles(editor: Editor, sites: Sites) -> None:
    """Rewrites every shuffle between such 2-D convolutions."""
    for node in editor.nodes:
        found = channel_shuffle(editor, node) if is_op(node, "Reshape") else None
        if found is None:
            continue
        _, merge, parts, order = found
        runs = int(parts[0] or 0)
        if len(parts) == 2 and order == [1, 0]:
            before = _into_filters(editor, sites, node, merge, runs)
            if before or _into_reader(editor, sites, node, merge, runs):
                editor.reindex()


def _into_filters(
    editor: Editor, sites: Sites, node: NodeProto, merge: NodeProto, runs: int
) -> bool:
    """Lets the convolution before the shuffle make its channels in the order after it."""
    conv = editor.producer_of(node.input[0], DOMAIN, OP)
    if conv is None or editor.only_user(node.input[0]) is None:
        return False
    site = _site(sites, conv)
    if site.workload.groups > 1 or site.workload.residual or site.interleave or site.dims:
        return False
    order = _order(site.workload.filters, runs)
    sites[site.name] = _each(site, lambda values: np.ascontiguousarray(values[..., order]))
    return editor.rename_uses(merge.output[0], node.input[0])


def _into_reader(
    editor: Editor, sites: Sites, node: NodeProto, merge: NodeProto, runs: int
) -> bool:
    """Lets the convolution in groups behind the depthwise one read channels where they are."""
    middle = _reader(editor, merge)
    last = None if middle is None else _reader(editor, middle)
    if middle is None or last is None:
        return False
    first, second = _site(sites, middle), _site(sites, last)
    work = second.workload
    plain = max(work.kernel) == max(work.strides) == 1 and work.size[0] == 1
    if not first.workload.depthwise or first.workload.residual or first.interleave:
        return False
    if not plain or any(map(any, work.pads)) or second.rank != 4 or work.groups == 1:
        return False
    if work.group_channels % runs or work.depthwise:
        return False
    middle.input[0] = node.input[0]
    order = _order(first.workload.channels, runs)

    def plainly(values: np.ndarray) -> np.ndarray:
        out = np.empty_like(values)
        out[..., order] = values
        return out

    sites[first.name] = replace(_each(first, plainly), inputs=(node.input[0],))
    sites[second.name] = _in_runs(second, runs)
    return True


def _order(channels: int, runs: int) -> np.ndarray:
    """Where each shuffled channel comes from."""
    return np.arange(channels).reshape(runs, -1).T.reshape(-1)


def _each(site: ConvSite, change: Callable[[np.ndarray], np.ndarray]) -> ConvSite:
    """The site with every constant that has one number per filter changed."""
    old = site.weights
    scale, bias = (None if v is None else change(v) for v in (old.scale, old.bias))
    return replace(site, weights=replace(old, b=change(old.b), scale=scale, bias=bias))


def _reader(editor: Editor, node: NodeProto) -> NodeProto | None:
    """The only reader of a node's output, if it is a convolution that reads it as A."""
    user = editor.only_user(node.output[0])
    mine = user is not None and user.domain == DOMAIN and user.op_type == OP
    return user if mine and user is not None and user.input[0] == node.output[0] else None


def _site(sites: Sites, node: NodeProto) -> ConvSite:
    return sites[attribute(node, "site").decode()]


def _in_runs(site: ConvSite, runs: int) -> ConvSite:
    """The pointwise convolution on channels in the order before the shuffle."""
    work, b = site.workload, site.weights.b
    each = work.group_channels // runs  # of a group in one run
    # Channel j * runs + r of a group is its channel j in run r.
    apart = b.reshape(each, runs, work.filters).transpose(1, 0, 2)
    _, h, w = work.size
    moved = replace(
        work,
        size=(h, w, runs),
        channels=work.channels // runs,
        kernel=(1, 1, runs),
    )
    weights = replace(site.weights, b=np.ascontiguousarray(apart)[None, None])
    return replace(site, workload=moved, weights=weights, dims=(h, w))
