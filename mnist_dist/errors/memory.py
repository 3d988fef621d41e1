"""Who refused memory, and what helps: told from the words of torch, CUDA and NCCL, without importing them."""

from __future__ import annotations

import errno
from typing import Literal

Refusal = Literal["process", "tensors", "driver", "nccl", "shared"]
"""What memory was wanted for.

`process`: Python or the operating system. `tensors`: what torch computes with, on any device, or the work space of
cuBLAS and cuDNN beside it; fewer images at a time take less. `driver`: what CUDA hands out past torch's pool: host
memory that is locked for copies, or a context on a GPU that is full already. `nccl`: buffers of NCCL on the GPU.
`shared`: buffers of NCCL in `/dev/shm`.
"""

_OF_TENSORS = (
    "CUDA out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "Invalid buffer size",  # MPS: more than one buffer may have
    "can't allocate memory",  # the CPU
    "ran out of memory outside PyTorch's allocator",  # cuDNN
    "_ALLOC_FAILED",  # cuBLAS, cuSOLVER, cuFFT and older cuDNN
    "_ALLOCATION_FAILED",  # cuDNN 9
)
_OF_NCCL = ("out of memory", "Failed to CUDA", "Failed to malloc", "Failed to alloc")

_PLAIN = "Memory ran out: free some, or ask for less (smaller images, network or batch)."
WORDS: dict[Refusal, str] = {
    "process": _PLAIN,
    "tensors": _PLAIN,
    "driver": (
        "CUDA was refused memory that torch does not manage: other programs fill the GPU (see nvidia-smi), or the "
        "machine has no more that may be locked for copies (see `free -h`, `ulimit -l` and the container's limit)."
    ),
    "nccl": (
        "NCCL found no memory on the GPU for its own buffers: see in nvidia-smi which other programs or processes use "
        "this GPU, and end them."
    ),
    "shared": (
        "NCCL found no room in /dev/shm: give the container more (`docker run --shm-size=1g`; Kubernetes: an emptyDir "
        "of medium Memory there), or remove what fills it."
    ),
}
"""A message for each, where nothing more is known."""


def refusal_of(error: BaseException) -> Refusal | None:
    """Find what memory was wanted for; None for any other error.

    Args:
        error: What Python, the operating system or torch raised. Of an error of NCCL that does not say why it failed,
            nothing is known.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "process"
    if not isinstance(error, RuntimeError):
        return None
    words = str(error)
    if "NCCL" in words:
        if "shared memory segment" in words:
            return "shared"
        return "nccl" if any(said in words for said in _OF_NCCL) else None
    if any(said in words for said in _OF_TENSORS):
        return "tensors"
    return "driver" if "out of memory" in words else None
