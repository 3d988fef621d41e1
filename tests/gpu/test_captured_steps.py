"""What only a GPU can show of `train.graph`."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from operators import StepsOver, config_of

from mnist_dist.data import open_dataset
from mnist_dist.observe import Observer, Observers
from mnist_dist.run.build import build_parts, join
from mnist_dist.training import loop
from mnist_dist.training.graph import EAGER_STEPS
from mnist_dist.training.state import Progress

pytestmark = pytest.mark.gpu
WORDS = ["train", "--device", "cuda", "--processes", "1", "--set", "train.log_every=1"]


def journal(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp32"), ("adam", "bf16"), ("adamw", "fp32")])
def test_a_captured_step_learns_what_the_loop_learns(command, tmp_path, optimizer, precision):
    words = [*WORDS, "--precision", precision, "--set", f"optimizer.name={optimizer}", "--set", "train.max_steps=12",
             "--set", "data.augment.rotation_degrees=10", "--set", "train.clip_norm=1"]  # fmt: skip
    losses = {}
    for graph in ("off", "auto"):
        ended = command(*words, "--set", f"train.graph={graph}", "--run", graph)
        assert ended.code == 0, ended.err
        assert ("one is captured and replayed" in ended.out) == (graph == "auto")
        losses[graph] = [row["loss"] for row in journal(tmp_path / graph, "step")]
    # A replay with another dropout mask, image or augmentation would be off by per cents at once.
    assert losses["auto"] == pytest.approx(losses["off"], rel=2e-2 if precision == "bf16" else 2e-3)


def test_a_captured_run_that_is_resumed_ends_where_it_ended_before(command, tmp_path):
    words = [*WORDS, "--precision", "fp32", "--set", "train.graph=auto", "--set", "checkpoint.every_steps=20"]
    run, losses = tmp_path / "run", []
    assert command(*words, "--set", "train.max_steps=40", "--run", "run").code == 0
    losses.append(json.loads((run / "result.json").read_text())["metrics"]["test_loss"])
    shutil.rmtree(run / "checkpoints" / "step-00000040")
    (run / "result.json").unlink()
    resumed = command("resume", "run")
    assert resumed.code == 0, resumed.err
    assert "resumed after step 20" in resumed.out
    losses.append(json.loads((run / "result.json").read_text())["metrics"]["test_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


class Strict(Observer):
    """Makes every wait of the host an error once a step is captured, and ends the loop."""

    def progress(self, step):
        if step == EAGER_STEPS + 1:
            torch.cuda.set_sync_debug_mode("error")
        if step == EAGER_STEPS + 300:  # the tables are filled anew in between
            raise StepsOver


@pytest.mark.parametrize("graph", ["off", "auto"])
def test_the_host_waits_for_nothing_between_two_reports(graph):
    config = config_of(
        train__graph=graph, train__device="cuda", train__global_batch=4, data__augment__rotation_degrees=10
    )  # an epoch of 360 steps
    dataset = open_dataset(config.data, seed=0, announce=print)
    with join(config) as runtime:
        parts = build_parts(config, dataset, runtime)
        try:
            with pytest.raises(StepsOver):
                loop.train(replace(parts, observers=Observers((Strict(),))), Progress())
        finally:
            torch.cuda.set_sync_debug_mode("default")
