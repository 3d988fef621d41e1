"""What must hold at 8 and at 1,000 ranks, seen by single ranks: nobody answers them, as torch's group is a fake one."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from many_ranks import blank_images, one_rank
from rich.console import Console
from torch import nn

from mnist_dist.config import load, parse_setting
from mnist_dist.config.schema import Train
from mnist_dist.data import Sampler, sampler
from mnist_dist.data.batches import Batches
from mnist_dist.errors import ConfigError
from mnist_dist.keyed import Purpose, keyed_hash
from mnist_dist.observe.console import TrainingConsole
from mnist_dist.run.build import _plan, build_parts
from mnist_dist.run.folder import RunFolder
from mnist_dist.runtime import Runtime, Vote
from mnist_dist.training.evaluate import evaluate


@pytest.mark.parametrize("ranks", [8, 1000])
@pytest.mark.parametrize("most_sorted", [0, sampler.MOST_SORTED], ids=["by blocks", "sorted"])
def test_every_image_is_trained_on_once_in_an_epoch_over_all_ranks(monkeypatch, ranks, most_sorted):
    monkeypatch.setattr(sampler, "MOST_SORTED", most_sorted)
    monkeypatch.setattr(sampler, "BLOCK", 20)
    order = Sampler(images=5 * 4 * ranks - 3, global_batch=4 * ranks, seed=1)  # the last step goes on in the next epoch
    shares = [order.share(step, rank=rank, ranks=ranks, micro_batch=2) for rank in range(ranks) for step in range(5)]
    images, epochs = (np.concatenate(parts).ravel() for parts in zip(*shares, strict=True))
    assert sorted(images[epochs == 0]) == list(range(order.images))
    assert np.count_nonzero(epochs) == 3


def test_finding_a_ranks_images_takes_no_more_time_or_memory_with_more_ranks(monkeypatch):
    looked_up = 0
    permuted = sampler.permuted

    def counted(positions, *keys):
        nonlocal looked_up
        looked_up += len(positions)
        return permuted(positions, *keys)

    monkeypatch.setattr(sampler, "permuted", counted)
    needed, costs = 600 * 64, []
    for ranks in (1, 8, 1000):
        order = Sampler(images=6_000_000, global_batch=64 * ranks, seed=0)
        looked_up = 0
        tracemalloc.start()
        for step in range(600):
            order.share(step, rank=ranks // 2, ranks=ranks, micro_batch=64)
        costs.append((looked_up, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    assert {count for count, _ in costs} == {-(-needed // sampler.BLOCK) * sampler.BLOCK}
    assert max(memory for _, memory in costs) < 4e6


@pytest.mark.parametrize("ranks", [8, 1000])
def test_what_a_rank_holds_of_the_others_is_one_tensor_of_each(ranks):
    with one_rank(ranks, 7) as runtime:
        assert (runtime.rank, runtime.ranks) == (7, ranks)
        rows = runtime.gather(torch.arange(3))
        assert [row.tolist() for row in rows] == [[0, 1, 2]] * ranks
        vote = Vote(runtime)
        assert vote.result() == 0
        vote.cast(5)
        assert vote.result() == 5
        assert runtime.maximum(3) == 3
        runtime.agree({"data": "same"})


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (3, 4, "rank 3 differs from rank 0"),
        (998, 1000, "ranks 998, 999 differ from rank 0"),
        (1, 1000, "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more differ from rank 0"),
    ],
)
def test_of_a_thousand_ranks_that_differ_a_few_are_named(monkeypatch, first, last, words):
    gather = Runtime.gather

    def answers(self, values):
        return [row + 1 if first <= rank < last else row for rank, row in enumerate(gather(self, values))]

    with one_rank(1000, 7) as runtime:
        monkeypatch.setattr(Runtime, "gather", answers)
        with pytest.raises(ConfigError) as refused:
            runtime.agree({"data": "mine"})
    assert str(refused.value) == f"Ranks disagree on the data: {words}. Rank 7 has mine."


def test_a_thousand_ranks_share_a_batch_or_are_told_the_nearest_one_that_they_can():
    assert Train(global_batch=64_000).split_batch(1000) == (64, 1)
    assert Train(global_batch=64_000, micro_batch=16).split_batch(1000) == (16, 4)
    assert Train(global_batch=1024, micro_batch=1, reduction="exact").split_batch(1024) == (1, 1)
    with pytest.raises(ConfigError, match=r"global_batch is 64, which 1000 processes cannot share equally: use 1000\."):
        Train(global_batch=64).split_batch(1000)


def test_the_plan_of_a_rank_of_many_is_that_of_all():
    values = {"train.reduction": "exact", "train.micro_batch": 2, "train.global_batch": 4096, "train.epochs": 3}
    config = load("baseline", tuple(parse_setting(f"{key}={value}") for key, value in values.items())).config
    console = Console(width=120, record=True, file=io.StringIO())
    with one_rank(1024, 7) as runtime:
        parts = build_parts(config, blank_images(10_000), runtime)
        plan = _plan(parts, RunFolder(Path("run")), first_step=0, threads_reason="as exact needs")
    assert (plan.ranks, plan.micro_batch, plan.accumulation, plan.total_steps) == (1024, 2, 2, 8)
    TrainingConsole(console).plan(plan)
    assert "1024 processes" in console.export_text()


def test_no_two_of_a_thousand_ranks_draw_the_same_dropout():
    seeds = keyed_hash(Purpose.DROPOUT, 0, np.arange(300)[:, None], np.arange(1000)) >> np.uint64(1)
    assert len(np.unique(seeds)) == seeds.size


@pytest.mark.parametrize(("rank", "counted"), [(0, 500), (2, 200), (999, 0)])
def test_an_evaluation_that_lacks_the_other_ranks_counts_is_refused(rank, counted):
    images = blank_images(1200).test
    with one_rank(1000, rank) as runtime:
        batches = Batches(images, mean=(0.5,), std=(0.5,), device=runtime.device)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        with pytest.raises(RuntimeError, match=f"evaluated {counted} of 1200 test images"):
            evaluate(model, batches, images, runtime)
