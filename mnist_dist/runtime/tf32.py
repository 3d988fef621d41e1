"""fp32 is fp32 in every place: the TF32 of NVIDIA's tensor cores is off, in matrix products and convolutions.

TF32 rounds what is multiplied to 10 bits, as fp16 has. torch uses it in convolutions (cuDNN) and not in matrix products
(cuBLAS) unless told otherwise; an environment variable (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's containers
set) or a program that calls us may have told it so. Every GPU that has TF32 has native bf16, which `auto` takes and
which is faster: fp32 is for numbers that can be compared with a CPU's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_backends: Any = torch.backends
"""Its types leave out what newer versions have."""


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Turn TF32 off, and restore the earlier setting at the end. Every rank.

    There are two settings of it, of which torch warns not to mix them: `allow_tf32`, and `fp32_precision` since torch
    2.9 (https://docs.pytorch.org/docs/stable/notes/cuda.html). Torch refuses to read the first while they contradict
    each other, and compiled code reads both. So both are set.
    """
    places = (_backends.cudnn, _backends.cudnn.conv, _backends.cudnn.rnn, _backends.cuda.matmul)
    switches = (_backends.cudnn, _backends.cuda.matmul)
    former = [place.fp32_precision for place in places]
    former_switches = [_switch_of(owner) for owner in switches]
    for owner in switches:
        owner.allow_tf32 = False
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for owner, value in zip(switches, former_switches, strict=True):
            if value is not None:
                owner.allow_tf32 = value
        for place, precision in zip(places, former, strict=True):
            place.fp32_precision = precision


def _switch_of(owner: Any) -> bool | None:
    """Read the older setting; `None` if the caller has set the newer one to another value."""
    try:
        return bool(owner.allow_tf32)
    except RuntimeError:
        return None
