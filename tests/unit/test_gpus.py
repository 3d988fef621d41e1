"""The GPUs that a process would see: nvidia-smi's list, narrowed down as CUDA reads CUDA_VISIBLE_DEVICES.

The lists are written as in NVIDIA's MIG User Guide (`nvidia-smi -L`), names before driver 470 included, and the answers
to queries as in `nvidia-smi --help-query-gpu`.
"""

import pytest
import torch
from accelerate.utils.environment import check_cuda_p2p_ib_support

from mnist_dist.errors import ConfigError
from mnist_dist.machine import driver_version, visible_gpus
from mnist_dist.runtime.device import choose_device, gpu_of

TWO = """\
GPU 0: NVIDIA H100 (UUID: GPU-11aa0000-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 (UUID: GPU-11bb0000-0000-0000-0000-000000000000)
"""
DIVIDED = """\
GPU 0: NVIDIA A100 (UUID: GPU-11aa0000-0000-0000-0000-000000000000)
  MIG 1g.5gb      Device  0: (UUID: MIG-aaaa0000-0000-0000-0000-000000000000)
  MIG 1g.5gb      Device  1: (UUID: MIG-bbbb0000-0000-0000-0000-000000000000)
GPU 1: NVIDIA A100 (UUID: GPU-11bb0000-0000-0000-0000-000000000000)
"""


DIVIDED_BEFORE_470 = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-11aa0000-0000-0000-0000-000000000000)
  MIG 3g.20gb Device 0: (UUID: MIG-GPU-11aa0000-0000-0000-0000-000000000000/1/0)
  MIG 3g.20gb Device 1: (UUID: MIG-GPU-11aa0000-0000-0000-0000-000000000000/2/0)
"""
BROKEN = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.65\n"
NO_TORCH_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use a GPU here")
BUILT_FOR_CUDA = pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch is without CUDA")
PRINT = 'while IFS= read -r line; do echo "$line"; done'


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Stand an nvidia-smi on the PATH that prints a list and ends with a code, and answers two queries."""

    def make(listing, visible=None, code=0, driver="535.104.05", name="NVIDIA GeForce RTX 4090"):
        if listing is not None:
            gpus = listing.count("GPU 0") + listing.count("GPU 1")
            (tmp_path / "list").write_text(listing)
            (tmp_path / "names").write_text(f"{gpus}, {name}\n" * gpus)
            (tmp_path / "drivers").write_text(f"{driver}\n" * gpus)
            program = tmp_path / "nvidia-smi"
            program.write_text(
                f"#!/bin/sh\ncase $1 in\n"
                f"-L) {PRINT} < {tmp_path}/list; exit {code} ;;\n"
                f"--query-gpu=count,name) {PRINT} < {tmp_path}/names ;;\n"
                f"--query-gpu=driver_version) {PRINT} < {tmp_path}/drivers ;;\n"
                f"*) exit 1 ;;\nesac\n"
            )
            program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize("visible", [None, "0", "0,1", "GPU-11aa", "MIG-aaaa", ""])
def test_where_nvidia_smi_lists_none_there_is_none(machine, visible):
    machine(None, visible)
    assert visible_gpus() == 0
    machine("No devices were found\n", visible, code=6)
    assert visible_gpus() == 0
    machine(BROKEN, visible, code=18)
    assert visible_gpus() == 0


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("NoDevFiles", 0),
        ("none", 0),
        ("0", 1),
        ("1,0", 2),
        (" 1 , 0 ", 2),
        ("0,-1,1", 1),
        ("0,,1", 1),
        ("0,2,1", 1),
        ("7", 0),
        ("0,0", 0),
        ("0,1,1", 0),
        ("GPU-11aa", 1),
        ("GPU-11aa,GPU-11bb", 2),
        ("GPU-11aa,GPU-11aa0000", 0),
        ("GPU-11", 0),
        ("GPU-99,GPU-11aa", 0),
        ("1,GPU-11aa", 1),
        ("MIG-aaaa", 0),
        ("99999999999999999999", 0),
    ],
)
def test_only_gpus_that_are_there_are_counted(machine, visible, count):
    machine(TWO, visible)
    assert visible_gpus() == count


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 1),
        ("0", 1),
        ("0,1", 1),
        ("1", 1),
        ("MIG-bbbb0000-0000-0000-0000-000000000000", 1),
        ("MIG-aaaa,MIG-bbbb", 1),
        ("MIG-cccc", 0),
        ("", 0),
    ],
)
def test_a_process_sees_one_part_of_a_divided_gpu(machine, visible, count):
    machine(DIVIDED, visible)
    assert visible_gpus() == count


@pytest.mark.parametrize(("visible", "count"), [(None, 1), ("MIG-GPU-11aa0000-0000-0000-0000-000000000000/2/0", 1)])
def test_parts_with_names_of_older_drivers_are_counted_too(machine, visible, count):
    machine(DIVIDED_BEFORE_470, visible)
    assert visible_gpus() == count


@pytest.mark.skipif(torch.version.hip is not None, reason="torch reads other variables for AMD's GPUs")
@pytest.mark.parametrize(
    "visible",
    [None, "", " ", "-1", "NoDevFiles", "none", "0", "1", "1,0", " 1 , 0 ", "0,-1,1", "0,,1", "0,2,1", "7", "0,0",
     "0,1,1", "0gpu", "1gpu2,0ampere", "+1", "GPU-11aa", "GPU-11aa,GPU-11bb", "GPU-11bb,GPU-11aa,GPU-11bb",
     "GPU-11aa,GPU-11aa0000", "GPU-11", "GPU-99,GPU-11aa", "GPU-11aa,GPU-99", "GPU-11aa,1", "1,GPU-11aa",
     "GPU-11aa, GPU-11bb"],
)  # fmt: skip
def test_torch_would_count_the_same(machine, monkeypatch, visible):
    """torch asks the driver's library for its list; here that list is nvidia-smi's."""
    machine(TWO, visible)
    names = [f"GPU-11{letters}0000-0000-0000-0000-000000000000" for letters in ("aa", "bb")]
    monkeypatch.setattr(torch.cuda, "_raw_device_count_nvml", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: names)
    assert visible_gpus() == torch.cuda._device_count_nvml()


@NO_TORCH_GPU
@BUILT_FOR_CUDA
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_gpus_that_torch_cannot_use_are_no_reason_to_take_the_cpu_unasked(machine, wanted):
    machine(TWO, driver="535.104.05")
    with pytest.raises(ConfigError) as raised:
        choose_device(wanted)
    words = str(raised.value)
    assert words.startswith(f"nvidia-smi lists 2 GPUs with driver 535.104.05, and torch {torch.__version__}, built for")
    assert f"CUDA {torch.version.cuda}, cannot use them: Found no NVIDIA driver" in words
    assert words.endswith("or use --device cpu.")


@NO_TORCH_GPU
def test_the_cpu_is_taken_where_it_is_asked_for_or_no_gpu_is_visible(machine, monkeypatch):
    machine(TWO, visible="")
    assert choose_device("auto").value == "cpu"
    machine(TWO)
    assert choose_device("cpu").value == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_device("auto").value == "cpu"


def test_a_driver_that_does_not_say_its_version_is_unknown(machine):
    machine(None)
    assert driver_version() == "unknown"


@pytest.mark.parametrize(
    ("listing", "name", "driver", "direct"),
    [
        (TWO, "NVIDIA GeForce RTX 4090", "535.104.05", False),
        (TWO, "NVIDIA GeForce RTX 4090", "550.40.07", True),
        (TWO, "NVIDIA H100", "535.104.05", True),
        (TWO.partition("GPU 1")[0], "NVIDIA GeForce RTX 4090", "535.104.05", True),
        (None, "", "", True),
    ],
    ids=["RTX 4090, 535", "RTX 4090, 550", "H100, 535", "one RTX 4090", "none"],
)
def test_accelerates_check_of_direct_links_reads_what_nvidia_smi_prints(machine, listing, name, driver, direct):
    machine(listing, name=name, driver=driver)
    assert check_cuda_p2p_ib_support() is direct


@pytest.mark.parametrize(("visible", "indices"), [(8, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [0] * 8), (2, [0, 1] * 4)])
def test_a_process_that_sees_only_its_own_gpu_takes_that(monkeypatch, visible, indices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert [gpu_of(local_rank) for local_rank in range(8)] == indices
