"""The pyramid of a trained checkpoint inside a detector of your own.

python examples/backbone.py outputs/watch/model
"""

import sys

import torch
from torch import nn

from modeling_convtransformer import ConvTransformerBackbone


class YourDetector(nn.Module):
    def __init__(self, folder: str, classes: int):
        super().__init__()
        self.backbone = ConvTransformerBackbone.from_pretrained(
            folder, out_indices=[0, 2, 4]
        )  # three levels of the six
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in self.backbone.channels)

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """(batch, time, n_in) to a list of (batch, ceil(time / stride), classes)."""
        return [head(x) for head, x in zip(self.heads, self.backbone(features).feature_maps, strict=True)]


def main():
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    detector = YourDetector(sys.argv[1], classes=5)
    features = torch.randn(1, 1000, sum(detector.backbone.config.stream_widths))
    for stride, scores in zip(detector.backbone.strides, detector(features), strict=True):
        print(f"stride {stride}: {tuple(scores.shape)}")


if __name__ == "__main__":
    main()
