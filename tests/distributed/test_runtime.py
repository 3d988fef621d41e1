import json

import pytest
import torch

from mnist_dist.errors import ConfigError
from mnist_dist.runtime.join import compare_devices


def card(uuid, *, machine="n1", **differing):
    usual = {"name": "NVIDIA H100", "native_bf16": True, "has_direct_links": True}
    return usual | {"identity": f"{machine} GPU-{uuid}"} | differing


def test_rank_0s_records_reach_every_rank(on_ranks):
    assert on_ranks(3, "broadcasting") == [[None, 1.5, "é", {"a": [1, 2]}, ""]] * 3


def test_tf32_is_off_on_every_rank_whatever_it_came_with(on_ranks, monkeypatch):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")  # as NVIDIA's containers do
    assert on_ranks(2, "tf32_settings") == [["ieee"] * 4 + [False] * 2] * 2


def test_a_failure_of_rank_0_is_every_ranks_failure(on_ranks):
    first, *others = on_ranks(3, "failing_on_the_first")
    assert first["full"] == ["StorageError", "/somewhere: No space left on device: make room."]
    assert first["damaged"] == ["CheckpointError", "it is damaged"]
    assert first["value"] == 42
    for seen in others:
        assert (seen["full"], seen["damaged"], seen["value"]) == (first["full"], first["damaged"], None)


def test_ranks_with_other_data_are_named_on_every_rank(on_ranks):
    for rank, message in enumerate(on_ranks(3, "disagreeing")):
        assert "Ranks disagree on the data: rank 2 differs from rank 0" in message
        assert f"Rank {rank} has {'other' if rank == 2 else 'usual'}" in message


def test_a_nan_on_one_rank_stops_all_ranks_and_names_its_images(on_ranks, tmp_path):
    messages = on_ranks(2, "nan_on_one_rank", folder=str(tmp_path))
    assert len(set(messages)) == 1
    assert "training loss of step 3 (first in micro-batch 1 of 2: train/" in messages[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_that_overflows_is_left_out_and_noted(on_ranks, tmp_path, ranks):
    outcomes = on_ranks(ranks, "overflowing", folder=str(tmp_path), steps=[3, 5])
    assert outcomes == [["finished", "12"]] * ranks
    journal = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in journal if line["kind"] == "event"] == [
        {"kind": "event", "step": 3, "event": "update_left_out", "loss_scale": 4.0},
        {"kind": "event", "step": 5, "event": "update_left_out", "loss_scale": 2.0},
    ]


def test_gradients_that_overflow_at_the_smallest_scale_end_the_run(on_ranks, tmp_path):
    messages = on_ranks(2, "overflowing", folder=str(tmp_path), steps=list(range(3, 13)))
    assert messages[0] == messages[1]
    assert "A gradient of step 6, at fp16's smallest loss scale, is not finite" in messages[0][1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_that_rank_0_cannot_read_is_not_started_again(on_ranks, tmp_path):
    for message in on_ranks(2, "resuming_elsewhere", folder=str(tmp_path)):
        assert "is on the machine of rank 1 and not on that of rank 0" in message


def test_batch_normalisation_is_refused_in_exact_and_averaged_in_ddp(on_ranks):
    for rank, (refusal, mine, settled) in enumerate(on_ranks(3, "normalising")):
        assert "BatchNorm1d" in refusal
        assert "use GroupNorm" in refusal
        assert mine == [pytest.approx(0.1 * rank)] * 2
        assert settled == [pytest.approx(0.1)] * 2


def test_ranks_with_a_gpu_each_go_on_and_change_no_variable(on_ranks):
    cards = [card("aa"), card("bb"), card("aa", machine="n2")]
    outcomes = on_ranks(3, "comparing_cards", cards=cards)
    assert outcomes == [{"outcome": True, "NCCL_P2P_DISABLE": None, "NCCL_IB_DISABLE": None}] * 3


def test_ranks_with_other_kinds_of_devices_than_rank_0_are_refused_before_they_meet():
    store = torch.distributed.HashStore()
    compare_devices(store, 0, "cuda")
    compare_devices(store, 2, "cuda")
    with pytest.raises(ConfigError, match="Rank 1 computes on cpu and rank 0 on cuda"):
        compare_devices(store, 1, "cpu")


def test_ranks_that_share_a_gpu_are_named_on_every_rank(on_ranks):
    for rank, seen in enumerate(on_ranks(3, "comparing_cards", cards=[card("aa"), card("bb"), card("bb")])):
        which = " (NVIDIA H100, n1 GPU-bb)" if rank > 0 else ""
        assert seen["outcome"].startswith(f"Ranks 1 and 2 share one GPU{which}, and NCCL takes one rank a GPU: start")


def test_one_gpu_without_native_bf16_decides_for_all_ranks(on_ranks):
    outcomes = on_ranks(3, "comparing_cards", cards=[card("aa"), card("bb", native_bf16=False), card("cc")])
    assert [seen["outcome"] for seen in outcomes] == [False] * 3


def test_one_machine_without_direct_links_turns_them_off_for_all_but_not_what_the_user_set(on_ranks, monkeypatch):
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    outcomes = on_ranks(2, "comparing_cards", cards=[card("aa", has_direct_links=False), card("aa", machine="n2")])
    assert outcomes == [{"outcome": True, "NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}] * 2


@pytest.mark.skipif(torch.cuda.is_available() or not torch.distributed.is_nccl_available(), reason="a GPU, or no NCCL")
def test_a_group_over_nccl_without_a_gpu_is_a_mistake_of_the_users(on_ranks):
    for rank, message in enumerate(on_ranks(2, "joining_over_nccl")):
        assert message.startswith(f"Rank {rank} of 2 cannot use NCCL: ProcessGroupNCCL is only supported with GPUs")
        assert message.endswith("Use --device cpu, or see nvidia-smi.")
