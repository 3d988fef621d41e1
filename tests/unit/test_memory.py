"""Recorded messages of memory that was refused, each as its library wrote it, to message and exit code.

Where a text is not of this machine, its source is named: an issue, or the strings of torch 2.14.1's and NCCL 2.30.7's
libraries. All stand there as RuntimeErrors or as kinds of it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import DistBackendError

from mnist_dist.cli import _as_ours
from mnist_dist.config import load
from mnist_dist.errors import DeviceMemoryError, memory
from mnist_dist.run.build import _out_of_memory
from mnist_dist.runtime.join import _is_lost_peer

ASYNCHRONOUS = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.26.2\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\n"
)

REFUSED = {
    # torch's allocator; murong-xu/CADS #4
    "CUDA, torch's pool": (torch.OutOfMemoryError, "tensors",
        "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB of which 12.73 GiB "
        "is free. Including non-PyTorch memory, this process has 18.73 GiB memory in use. Of the allocated memory 9.08 "
        "GiB is allocated by PyTorch, and 9.35 GiB is reserved by PyTorch but unallocated. If reserved but unallocated "
        "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
        "documentation for Memory Management  "
        "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"),
    # another program holds most of the GPU; Tianhao-Qi/Mask2DiT #4
    "CUDA, beside another program": (torch.OutOfMemoryError, "tensors",
        "CUDA out of memory. Tried to allocate 35.60 GiB. GPU 0 has a total capacity of 79.33 GiB of which 26.16 GiB "
        "is free. Process 76883 has 53.16 GiB memory in use. Of the allocated memory 11.97 GiB is allocated by "
        "PyTorch, and 40.69 GiB is reserved by PyTorch but unallocated."),
    # libc10_cuda.so
    "CUDA, a fraction": (torch.OutOfMemoryError, "tensors",
        "CUDA out of memory. Allocation was preemptively rejected because it would exceed per_process_memory_fraction "
        "limit. Requested size: 2.00 GiB"),
    # cublasCreate has no room beside torch's pool; QwenLM/Qwen3 #873
    "cuBLAS": (RuntimeError, "tensors", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    # pytorch/pytorch #20123
    "cuDNN 7": (RuntimeError, "tensors", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    # libtorch_cuda.so; the name of the status is cuDNN 9's
    "cuDNN 9": (RuntimeError, "tensors",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuDNN, its own compiler": (torch.OutOfMemoryError, "tensors",
        "CUDA ran out of memory outside PyTorch's allocator. If this workload uses many dynamic shapes, cuDNN may need "
        "additional device memory to JIT-compile shape-specialized kernels. Consider calling "
        "torch.cuda.memory.set_per_process_memory_fraction(fraction) early in the process to leave memory available "
        "for cuDNN."),
    # pytorch/pytorch #130112
    "MPS": (RuntimeError, "tensors",
        "MPS backend out of memory (MPS allocated: 5.50 GB, other allocations: 14.76 GB, max allowed: 20.40 GB). Tried "
        "to allocate 147.24 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0 to disable upper limit for "
        "memory allocations (may cause system failure)."),
    # pytorch/pytorch #141909
    "MPS, one buffer": (RuntimeError, "tensors", "Invalid buffer size: 19.45 GB"),
    # on this machine: torch.empty(10**15)
    "CPU": (RuntimeError, "tensors",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    # pin_memory=True past what the driver locks; MakazhanAlpamys/Soup #989, the whole text from calcuis/gguf #51
    "CUDA, locked host memory": (torch.AcceleratorError, "driver",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in "
        "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information." + ASYNCHRONOUS),
    # the first collective makes a context on a full GPU; MIC-DKFZ/nnUNet #593
    "CUDA, a context": (RuntimeError, "driver", "CUDA error: out of memory"),
    # the constructor of DDP; pytorch/pytorch #152302, NVIDIA/nccl #1235
    "NCCL": (DistBackendError, "nccl", NCCL + "Cuda failure 2 'out of memory'"),
    "NCCL, an older one": (DistBackendError, "nccl", NCCL + "Cuda failure 'out of memory'"),
    "NCCL, its words": (DistBackendError, "nccl", NCCL + "Failed to CUDA calloc 6291456 bytes"),
    "NCCL, locked host memory": (DistBackendError, "nccl", NCCL + "Failed to CUDA host alloc 4096 bytes"),
    # vllm-project/vllm #14537
    "NCCL, /dev/shm": (DistBackendError, "shared",
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\nError while creating shared memory segment "
        "/dev/shm/nccl-EoOvZr (size 7340384)"),
    "Python": (MemoryError, "process", ""),
}  # fmt: skip

REMEDIES = {
    "process": "free some, or ask for less",
    "tensors": "free some, or ask for less",
    "driver": "`ulimit -l`",
    "nccl": "see in nvidia-smi",
    "shared": "--shm-size=1g",
}

OTHER = {
    # metaseq #90: NCCL does not say what failed
    "NCCL without a reason": (DistBackendError,
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:181, unhandled cuda error, NCCL version 21.0.3"),
    # names malloc among what may have failed
    "NCCL, a connection": (DistBackendError,
        "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:317, unhandled system error (run with "
        "NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or "
        "external library call failed or device error. \nLast error:\nsocketProgress: Connection closed by remote "
        "peer node.cm.cluster<40031>"),
    "CUDA, an illegal access": (torch.AcceleratorError,
        "CUDA error: an illegal memory access was encountered" + ASYNCHRONOUS),
    "gloo": (RuntimeError,
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:13871"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "refusal", "words"), REFUSED.values(), ids=REFUSED)
def test_memory_that_was_refused_is_told_with_what_helps_and_exit_code_8(kind, refusal, words):
    error = kind(words)
    assert memory.refusal_of(error) == refusal
    ours = _as_ours(error)
    assert isinstance(ours, DeviceMemoryError)
    assert ours.exit_code == 8
    assert REMEDIES[refusal] in str(ours)


@pytest.mark.parametrize(("kind", "refusal", "words"), REFUSED.values(), ids=REFUSED)
def test_smaller_micro_batches_are_advised_only_where_they_take_less_memory(kind, refusal, words):
    config = load("quick", ()).config
    parts = SimpleNamespace(config=config, runtime=SimpleNamespace(device="cuda:1", ranks=1))
    message = _out_of_memory(parts, memory.refusal_of(kind(words)))
    assert message.startswith("cuda:1")
    assert ("set train.micro_batch lower" in message) == (refusal == "tensors")


@pytest.mark.parametrize(("kind", "refusal", "words"), REFUSED.values(), ids=REFUSED)
def test_a_rank_without_memory_has_not_lost_another_rank(kind, refusal, words):
    assert not _is_lost_peer(kind(words))


@pytest.mark.parametrize(("kind", "words"), OTHER.values(), ids=OTHER)
def test_other_failures_of_the_same_libraries_are_not_about_memory(kind, words):
    assert memory.refusal_of(kind(words)) is None
    assert _is_lost_peer(kind(words)) == ("CUDA error" not in words)


def test_the_cpus_memory_error_is_recognised():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(10**15)
    assert memory.refusal_of(refused.value) == "tensors"
