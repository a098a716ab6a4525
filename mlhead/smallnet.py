"""A small convolutional backbone for the scenes, quick on two CPU cores, with the interface of timm's models."""

from __future__ import annotations

from torch import Tensor, nn

# Channels of each 3x3 convolution, and "pool" for a 2x2 maximum: 40x40 pixels become a 10x10 map. The first convolution
# keeps every pixel: with a stride of 2 there, digits of 8x8 pixels are learned far more slowly.
LAYERS: tuple[int | str, ...] = (16, "pool", 64, "pool", 128, 128)


class SmallNet(nn.Module):
    """3x3 convolutions with batch norm and ReLU, and two poolings: images (B, channels, H, W) -> (B, D, H/4, W/4).

    Args:
        channels: of the images.
        layers: as `LAYERS`.
    """

    def __init__(self, channels: int = 1, layers: tuple[int | str, ...] = LAYERS) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        width = channels
        for layer in layers:
            if isinstance(layer, str):
                parts.append(nn.MaxPool2d(2))
                continue
            parts += [nn.Conv2d(width, layer, 3, padding=1, bias=False), nn.BatchNorm2d(layer), nn.ReLU(inplace=True)]
            width = layer
        self.features = nn.Sequential(*parts)
        self.num_features = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (B, num_features, H/4, W/4)."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """As `forward_features`: there is no classifier."""
        return self.features(x)
