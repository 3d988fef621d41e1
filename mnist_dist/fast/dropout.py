"""Saves CPU time in dropout: `large_cnn` trains an eighth more images per second.

It draws 16 random bits per value, where torch draws and compares a double. It drops other values than `nn.Dropout`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 1 << 16
"""Values that a 16-bit random number can have."""


class Dropout(nn.Module):
    """Dropout like `nn.Dropout`, which draws 16 random bits per value on a CPU instead of a double.

    Which values are dropped depends on the generator and on the order of `x` in memory.

    Args:
        p: Probability of a zero, in [0, 1]; rounded to a multiple of 2**-16. The scale matches the rounded value.

    Raises:
        ValueError: `p` is not in [0, 1].
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"A dropout probability is between 0 and 1, not {p}.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with values dropped and the others scaled up while training, else `x` unchanged."""
        dropped = round(self.p * LEVELS)
        if not self.training or x.device.type != "cpu" or dropped in (0, LEVELS) or torch.compiler.is_compiling():
            return functional.dropout(x, self.p, self.training)
        words = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        places = torch.empty_like(x)  # without gaps, in the order of x
        kept = words.as_strided(places.size(), places.stride()) >= dropped - LEVELS // 2
        return x * kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))

    def extra_repr(self) -> str:
        """Return the arguments that `repr` shows."""
        return f"p={self.p}"
