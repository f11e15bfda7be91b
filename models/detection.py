"""Text detection: Faster-RCNN (Ren et al., 2015) on two stages of the ShuffleNet.

Image (1, 3, 600, 800) -> features of stride 16 -> objectness and offsets of 9 anchors at every
place -> the best 1000, decoded, suppressed to at most 100 proposals and possibly none -> 14 x 14
features of each -> third stage of the ShuffleNet -> scores and boxes of every proposal.

The layers are PyTorch modules. What lies between them, with its data-dependent sizes, is ONNX as
written here: the exporter spells it with many more nodes and has no NonMaxSuppression.
"""

from __future__ import annotations

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper, parser
from torch import nn

from .layers import ConvNorm, fold
from .shufflenet import UNITS, WIDTHS, Trunk, stage
from .tracing import trace as trace_layers

IMAGE = (600, 800)
STRIDE = 16
SIZES, RATIOS = (32, 96, 256), (0.25, 0.5, 1.0)  # of anchors: root of the area, height by width
CLASSES = 2
CANDIDATES, PROPOSALS = 1000, 100
REGION = 14
_CHANNELS = 128  # of the proposal network
_IOU, _SCORE = 0.6, 0.9  # suppress above, drop below
_GROWTH = 4.135  # of a box: at most log(1000 / 16)


class Features(nn.Module):
    """Image to features (1, 544, 38, 50), objectness (1, 9, 38, 50), offsets (1, 36, 38, 50)."""

    def __init__(self) -> None:
        super().__init__()
        anchors = len(SIZES) * len(RATIOS)
        self.trunk = Trunk(UNITS[:2])
        self.proposals = ConvNorm(WIDTHS[2], _CHANNELS, 3)
        self.objectness = nn.Conv2d(_CHANNELS, anchors, 1)
        self.offsets = nn.Conv2d(_CHANNELS, 4 * anchors, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.trunk(x)
        y = self.proposals(features)
        return features, self.objectness(y), self.offsets(y)


class Head(nn.Module):
    """Regions (R, 544, 14, 14) to logits (R, classes) and offsets (R, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = stage(WIDTHS[2], WIDTHS[3], UNITS[2])
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.scores = nn.Linear(WIDTHS[3], CLASSES)
        self.boxes = nn.Linear(WIDTHS[3], 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.mean(self.stage(x)).flatten(1)
        return self.scores(y), self.boxes(y)


def anchors() -> np.ndarray:
    """Center and size (x, y, w, h) of the anchors at the top left place, (9, 4) f32."""
    shapes = [(size * ratio**-0.5, size * ratio**0.5) for size in SIZES for ratio in RATIOS]
    return np.array([(STRIDE / 2, STRIDE / 2, *shape) for shape in shapes], np.float32)


def trace() -> onnx.ModelProto:
    """The whole graph, weights of the layers stripped."""
    image = {"x": np.zeros((1, 3, *IMAGE), np.float32)}
    region = {"regions": np.zeros((1, WIDTHS[2], REGION, REGION), np.float32)}
    outputs = ("features", "objectness", "offsets")
    front = trace_layers(fold(Features()), image, outputs, dynamic=None)
    head = trace_layers(fold(Head()), region, ("logits", "changes"), dynamic="R")
    dims = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in front.graph.output}
    choose, refine = _choose(dims["features"][2:]), _refine()
    whole = onnx.ModelProto()
    whole.CopyFrom(front)
    whole.graph.name = "shufflenet_frcnn"
    for part in (choose, head, refine):
        whole.graph.node.extend(part.graph.node)
        whole.graph.initializer.extend(part.graph.initializer)
    del whole.graph.output[:]
    whole.graph.output.extend(refine.graph.output)
    return whole


def _choose(places: list[int]) -> onnx.ModelProto:
    """Objectness and offsets to proposals (R, 4) and their regions of the features."""
    height, width = places
    shifts = np.zeros((height, width, 1, 4), np.float32)
    shifts[..., 0] = STRIDE * np.arange(width)[:, None]
    shifts[..., 1] = STRIDE * np.arange(height)[:, None, None]
    count = len(anchors())
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        choose (float[1,{WIDTHS[2]},{height},{width}] features,
                float[1,{count},{height},{width}] objectness,
                float[1,{4 * count},{height},{width}] offsets)
            => (float[R,4] proposals, float[R,{WIDTHS[2]},{REGION},{REGION}] regions) {{
            spread = Add (shifts, anchors)
            places = Reshape (spread, rows_of_four)
            last = Transpose <perm = [0, 2, 3, 1]> (objectness)
            chances = Reshape (last, flat)
            split = Reshape (offsets, split_shape)
            ordered = Transpose <perm = [2, 3, 0, 1]> (split)
            changes_of_all = Reshape (ordered, rows_of_four)
            best, which = TopK (chances, candidates)
            start = Gather (places, which)
            center, size = Split <axis = 1> (start)
            change = Gather (changes_of_all, which)
            {_decode("center", "size", "change", "boxes")}
            score = Sigmoid (best)
            all_boxes = Unsqueeze (boxes, zero)
            all_scores = Unsqueeze (score, zero_one)
            kept = NonMaxSuppression (all_boxes, all_scores, proposals_most, iou, least_score)
            index = Gather <axis = 1> (kept, two)
            proposals = Gather (boxes, index)
            how_many = Shape (index)
            image = ConstantOfShape <value = int64[1] {{0}}> (how_many)
            regions = RoiAlign <coordinate_transformation_mode = "half_pixel", mode = "avg",
                output_height = {REGION}, output_width = {REGION}, sampling_ratio = 2,
                spatial_scale = {1 / STRIDE}> (features, proposals, image)
        }}"""
    constants = {
        "shifts": shifts.reshape(-1, 1, 4),
        "anchors": anchors()[None],
        "rows_of_four": np.array([-1, 4]),
        "flat": np.array([-1]),
        "split_shape": np.array([count, 4, height, width]),
        "candidates": np.array([CANDIDATES]),
        "zero": np.array([0]),
        "zero_one": np.array([0, 1]),
        "two": np.array(2),
        "proposals_most": np.array([PROPOSALS]),
        "iou": np.array([_IOU], np.float32),
        "least_score": np.array([_SCORE], np.float32),
    }
    return _model(text, constants, "proposals")


def _refine() -> onnx.ModelProto:
    """Proposals and what the head says of them to boxes (R, 4) and scores (R, classes)."""
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        refine (float[R,4] proposals, float[R,{CLASSES}] logits, float[R,4] changes)
            => (float[R,4] boxes, float[R,{CLASSES}] scores) {{
            low, high = Split <axis = 1> (proposals)
            size = Sub (high, low)
            half_size = Mul (size, half_of_it)
            center = Add (low, half_size)
            {_decode("center", "size", "changes", "boxes")}
            scores = Softmax <axis = 1> (logits)
        }}"""
    return _model(text, {"half_of_it": np.float32(0.5)}, "boxes")


def _decode(center: str, size: str, change: str, boxes: str) -> str:
    """Boxes (x, y, x, y) within the image from centers, sizes and their changes (n, 4)."""
    return f"""
            move, growth = Split <axis = 1> ({change})
            moved_by = Mul (move, {size})
            moved = Add ({center}, moved_by)
            bounded = Min (growth, most_growth)
            factor = Exp (bounded)
            grown = Mul ({size}, factor)
            half = Mul (grown, one_half)
            least = Sub (moved, half)
            most = Add (moved, half)
            corners = Concat <axis = 1> (least, most)
            not_below = Max (corners, none)
            {boxes} = Min (not_below, limits)"""


def _model(text: str, constants: dict[str, np.ndarray], prefix: str) -> onnx.ModelProto:
    """A parsed graph with its constants; what it does not share is named with the prefix."""
    model = parser.parse_model(text)
    height, width = IMAGE
    decoding = {
        "most_growth": np.float32(_GROWTH),
        "one_half": np.float32(0.5),
        "none": np.float32(0),
        "limits": np.array([width, height, width, height], np.float32),
    }
    graph = model.graph
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))
        for name, value in (constants | decoding).items()
    ]
    nodes.extend(graph.node)
    shared = {value.name for value in (*graph.input, *graph.output)}
    for node in nodes:
        node.name = f"{prefix}/{node.output[0]}"
        for names in (node.input, node.output):
            names[:] = [n if n in shared or not n else f"{prefix}/{n}" for n in names]
    del graph.node[:]
    graph.node.extend(nodes)
    return model
