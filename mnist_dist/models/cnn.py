"""Convolutional networks for small images; each fits any image size, number of channels and number of classes.

They pool before they mask and rectify. The largest of four values is the same before a ReLU, or a mask of whole
channels, as after it, and its gradient goes to the same place; but only a quarter of the values is left to work on.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from mnist_dist.fast.dropout import Dropout


class SmallCNN(nn.Module):
    """Two 5x5 convolutions, two linear layers: 21,840 weights for 28x28 digits."""

    def __init__(self, *, classes: int, channels: int, image_size: int, dropout: float = 0.25) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(channels, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d(dropout)
        self.fc1 = nn.Linear(20 * side * side, 50)
        self.fc1_drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(50, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        x = functional.relu_(functional.max_pool2d(self.conv1(x), 2))  # (B, 10, 12, 12)
        x = functional.relu_(self.conv2_drop(functional.max_pool2d(self.conv2(x), 2)))  # (B, 20, 4, 4)
        x = functional.relu(self.fc1(x.flatten(1)))  # (B, 50)
        logits: Tensor = self.fc2(self.fc1_drop(x))  # (B, K)
        return logits


class LargeCNN(nn.Module):
    """Two 3x3 convolutions, one pooling: the network of pytorch/examples, 1,199,882 weights for digits."""

    def __init__(self, *, classes: int, channels: int, image_size: int, dropout: float = 0.25) -> None:
        super().__init__()
        side = (image_size - 4) // 2
        self.conv1 = nn.Conv2d(channels, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.conv2_drop = Dropout(dropout / 2)
        self.fc1 = nn.Linear(64 * side * side, 128)
        self.fc1_drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        x = functional.relu_(self.conv1(x))  # (B, 32, 26, 26)
        x = functional.relu_(functional.max_pool2d(self.conv2(x), 2))  # (B, 64, 12, 12)
        x = self.conv2_drop(x)
        x = functional.relu(self.fc1(x.flatten(1)))  # (B, 128)
        logits: Tensor = self.fc2(self.fc1_drop(x))  # (B, K)
        return logits


class FastCNN(nn.Module):
    """A 5x5 and a 3x3 convolution, two linear layers: 138,954 weights for 28x28 digits.

    It does not look at the outermost two pixels, where handwritten digits leave only paper.
    """

    def __init__(self, *, classes: int, channels: int, image_size: int, dropout: float = 0.25) -> None:
        super().__init__()
        side = ((image_size - 8) // 2 - 2) // 2
        self.conv1 = nn.Conv2d(channels, 16, kernel_size=5)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3)
        self.fc1 = nn.Linear(32 * side * side, 256)
        self.fc1_drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score `(B, C, H, W)` images as `(B, K)` logits."""
        x = x[:, :, 2:-2, 2:-2]  # (B, C, 24, 24)
        x = functional.relu_(functional.max_pool2d(self.conv1(x), 2))  # (B, 16, 10, 10)
        x = functional.relu_(functional.max_pool2d(self.conv2(x), 2))  # (B, 32, 4, 4)
        x = functional.relu(self.fc1(x.flatten(1)))  # (B, 256)
        logits: Tensor = self.fc2(self.fc1_drop(x))  # (B, K)
        return logits
