"""How many GPUs a process would see: nvidia-smi's list, narrowed down as CUDA reads CUDA_VISIBLE_DEVICES."""

import pytest

from mnist_dist.machine import visible_gpus

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


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Stand an nvidia-smi on the PATH that prints a list and ends with a code."""

    def make(listing, visible=None, code=0):
        if listing is not None:
            (tmp_path / "list").write_text(listing)
            program = tmp_path / "nvidia-smi"
            program.write_text(
                f'#!/bin/sh\nwhile IFS= read -r line; do echo "$line"; done < {tmp_path}/list\nexit {code}\n'
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
        ("1,GPU-11aa", 2),
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
