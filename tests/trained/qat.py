"""The model of `digits`, trained on with fake quantization: a QDQ model as training tools export.

Not what `dccompile.quantization` writes: weights are u8 with a zero point, one scale for a tensor,
and lie there as floats before a QuantizeLinear; activations are s8; pairs stand where the author of
the module put them: in front of layers, behind one branch of a sum only, twice in a row, around a
pooling. ``python -m trained.qat`` writes it (``digits_qat.onnx``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import numpy_helper

from . import Trained, arrays, digits

NAME = "digits_qat"


def network(float_model: Any) -> Any:
    """`digits.network` with its batch norms folded, and fake quantization; ranges are unset."""
    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    class Fake(nn.Module):
        """Rounds to 8 bits; the range is that of what passed while `watching`."""

        def __init__(self, least, most):
            super().__init__()
            self.least, self.most = least, most
            self.low = self.high = 0.0
            self.watching = True

        def forward(self, x):
            if self.watching:
                self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
                return x
            scale = float(np.float32((self.high - self.low) / (self.most - self.least)))
            zero = round(self.least - self.low / scale)
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, self.least, self.most)

    def activation():
        return Fake(-128, 127)

    class Layer(nn.Module):
        """A convolution or matrix product with rounded weights behind a rounded input."""

        def __init__(self, layer):
            super().__init__()
            self.input, self.weights, self.layer = activation(), Fake(0, 255), layer

        def forward(self, x):
            x, weights, layer = self.input(x), self.weights(self.layer.weight), self.layer
            if isinstance(layer, nn.Linear):
                return nn.functional.linear(x, weights, layer.bias)
            options = layer.stride, layer.padding, layer.dilation, layer.groups
            return nn.functional.conv2d(x, weights, layer.bias, *options)

    def conv(block):
        layer = Layer(fuse_conv_bn_eval(block.conv, block.norm))
        return nn.Sequential(layer, *([block.act] if hasattr(block, "act") else []))

    class Inverted(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.expand, self.depthwise = conv(block.expand), conv(block.depthwise)
            self.project, self.branch = conv(block.project), activation()

        def forward(self, x):
            return x + self.branch(self.project(self.depthwise(self.expand(x))))

    model = float_model.eval()
    return nn.Sequential(
        conv(model.stem),
        activation(),
        Inverted(model.first),
        conv(model.grouped),
        Inverted(model.second),
        Inverted(model.third),
        conv(model.head),
        activation(),
        model.mean,
        activation(),
        model.flat,
        Layer(model.scores),
        activation(),
    )


def train(epochs: int = 10, batch: int = 50) -> None:
    """Sets the ranges on calibration data, trains on, prints the metrics and writes the model."""
    import torch

    from . import export

    torch.manual_seed(digits.SEED)
    stored = {t.name: numpy_helper.to_array(t) for t in Trained("digits").model().graph.initializer}
    trained = digits.network()
    state = {key: torch.from_numpy(value.copy()) for key, value in stored.items()}
    trained.load_state_dict(state, strict=False)
    model = network(trained)
    calib, data = arrays(Trained("digits").calib), arrays(Trained("digits").val)
    export.run(model, calib)
    for module in model.modules():
        module.watching = False
    before = export.run(model, {"x": data["x"]})
    print(f"before training on: accuracy {digits.accuracy(before, data):.4f}")
    pictures, labels = digits.images()
    rng = np.random.default_rng(digits.SEED)
    target = torch.from_numpy(labels[: digits.TRAINED])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = epochs * (digits.TRAINED // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(epochs):
        seen = digits.inputs(digits.disturb(pictures[: digits.TRAINED], rng, True))
        for pick in torch.randperm(digits.TRAINED).split(batch):
            y = model(torch.from_numpy(seen)[pick])
            loss = torch.nn.functional.cross_entropy(y, target[pick])
            export.step(loss, model, optimizer, schedule, limit=1.0)
    scores = export.run(model, {"x": data["x"]})
    print(f"accuracy {digits.accuracy(scores, data):.4f}")
    export.write(NAME, model, calib)


if __name__ == "__main__":
    train()
