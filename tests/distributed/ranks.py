"""What each rank of a test's group does: `python ranks.py TASK ARGUMENTS-JSON OUTPUT-FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mnist_dist import errors
from mnist_dist.data import Split
from mnist_dist.data.batches import Batches
from mnist_dist.data.store import in_memory
from mnist_dist.runtime import start
from mnist_dist.training.evaluate import evaluate


def split_of(images: int) -> Split:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (images, 1, 8, 8), dtype=np.uint8)
    labels = generator.integers(0, 3, images)
    stored = in_memory(pixels, labels, tuple(str(row) for row in range(images)))
    return Split(name="test", stored=stored, rows=np.arange(images))


def scoring(*, sizes: list[int], batch: int) -> list[dict]:
    """Evaluate a fixed network on sets of several sizes."""
    from mnist_dist.training import evaluate as module

    module.BATCH = batch
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    records = []
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        for size in sizes:
            split = split_of(size)
            batches = Batches(split, mean=(0.5,), std=(0.2,), device=runtime.device)
            result = evaluate(model, batches, split, runtime)
            records.append(
                {
                    "images": result.images,
                    "loss": result.loss.hex(),
                    "correct": result.correct,
                    "confusion": result.confusion(3).tolist(),
                }
            )
    return records


def tf32_settings() -> list:
    """Return the TF32 settings of a rank; rank 1 starts with others."""
    backends = torch.backends
    if os.environ["RANK"] == "1":
        backends.fp32_precision = "tf32"
    with start(device="cpu", precision="fp32", threads=1):
        places = (backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
        return [place.fp32_precision for place in places] + [backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32]


def mistaken_rank() -> str:
    """Evaluate with a rank that mistakes itself for another: some images twice, some never."""
    split = split_of(1000)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        batches = Batches(split, mean=(0.5,), std=(0.2,), device=runtime.device)
        if runtime.rank == 1:
            runtime.rank = 0
        try:
            evaluate(model, batches, split, runtime)
        except RuntimeError as error:
            return str(error)
    return "nothing was noticed"


def broadcasting() -> list:
    """Pass records of several kinds from rank 0 to all."""
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        mine = [None, 1.5, "é", {"a": [1, 2]}, ""] if runtime.rank == 0 else ["others'"] * 5
        return [runtime.broadcast(record) for record in mine]


def disagreeing() -> str:
    """Have another data set on the last rank."""
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        runtime.agree({"config": "same", "data": "same"})
        try:
            runtime.agree({"config": "same", "data": "other" if runtime.rank == runtime.ranks - 1 else "usual"})
        except errors.ConfigError as error:
            return str(error)
    return "nothing was noticed"


def nan_on_one_rank(*, folder: str) -> str:
    """Train with images that are not numbers in step 3 of the last rank."""
    from mnist_dist.config import load, parse_setting
    from mnist_dist.run import build

    whole = Batches.take
    taken = 0

    def take(self, images, epochs=None):
        nonlocal taken
        pixels, labels = whole(self, images, epochs)
        taken += 1
        if taken == 3 and os.environ["RANK"] == "1":
            pixels[0, 0, 0, 0] = float("nan")
        return pixels, labels

    Batches.take = take
    settings = ("train.epochs=1", "train.global_batch=8", "train.log_every=10", "checkpoint.every_steps=5")
    try:
        build.train(load("quick", tuple(map(parse_setting, settings))), run=Path(folder) / "run")
    except errors.NonFiniteError as error:
        return str(error)
    return "nothing was noticed"


def overflowing(*, folder: str, steps: list[int]) -> list:
    """Train with a gradient scaler, as under fp16, and gradients that overflow in some steps."""
    from mnist_dist.config import load, parse_setting
    from mnist_dist.run import build
    from mnist_dist.runtime import join
    from mnist_dist.training.reduction import Exact

    class Scaled(join.Accelerator):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    whole = Exact.finish
    done = 0

    def finish(self):
        nonlocal done
        sums = whole(self)
        done += 1
        if done in steps:
            self._parameters[0].grad[0] = float("inf")
        return sums

    join.Accelerator = Scaled
    Exact.finish = finish
    settings = ("train.epochs=1", "train.reduction=exact", "train.max_steps=12", "train.log_every=100")
    try:
        result = build.train(load("quick", tuple(map(parse_setting, settings))), run=Path(folder) / "run")
    except errors.NonFiniteError as error:
        return ["failed", str(error)]
    return [result.status, str(result.step)]


def resuming_elsewhere(*, folder: str) -> str:
    """Resume a run that only rank 1 can see."""
    from mnist_dist.config import load
    from mnist_dist.run import build

    here = Path(folder) / os.environ["RANK"]
    here.mkdir()
    os.chdir(here)
    if os.environ["RANK"] == "1":
        Path("run").mkdir()
        Path("run/config.yaml").touch()
    try:
        build.train(load("quick"), run=Path("run"), resume=True)
    except errors.ConfigError as error:
        return str(error)
    return "nothing was noticed"


def normalising() -> list:
    """Train a batch normalisation on other numbers on each rank, and settle it."""
    from mnist_dist.training.reduction import Ddp, Exact

    model = nn.Sequential(nn.BatchNorm1d(2))
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        try:
            Exact(runtime, model, global_batch=4)
            refusal = "accepted"
        except errors.ConfigError as error:
            refusal = str(error)
        reduction = Ddp(runtime, model, global_batch=4)
        with torch.no_grad():
            model(torch.full((4, 2), float(runtime.rank)))
        mine = model[0].running_mean.tolist()
        reduction.settle()
        return [refusal, mine, model[0].running_mean.tolist()]


def failing_on_the_first() -> dict:
    """Let rank 0 alone fail, in two ways."""

    def full_disk() -> None:
        raise OSError(28, "No space left on device", "/somewhere")

    def damaged() -> None:
        raise errors.CheckpointError("it is damaged")

    seen = {}
    with start(device="cpu", precision="fp32", threads=1) as runtime:
        for name, action in (("full", full_disk), ("damaged", damaged)):
            try:
                runtime.on_first_rank(action)
            except errors.MnistDistError as error:
                seen[name] = [type(error).__name__, str(error)]
        seen["value"] = runtime.on_first_rank(lambda: 42)
    return seen


def comparing_cards(*, cards: list[dict]) -> dict:
    """Compare GPUs that are not there: each rank is told of its own."""
    from mnist_dist.runtime.cards import WITHOUT_DIRECT_LINKS, Card, settle

    with start(device="cpu", precision="fp32", threads=1) as runtime:
        try:
            outcome = settle(Card(**cards[runtime.rank]), runtime.ranks)
        except errors.ConfigError as error:
            outcome = str(error)
    return {"outcome": outcome, **{name: os.environ.get(name) for name in WITHOUT_DIRECT_LINKS}}


def joining_over_nccl() -> str:
    """Join a group that also speaks over NCCL, where no GPU is."""
    from mnist_dist.group.place import worker_of
    from mnist_dist.runtime.join import _join_group

    worker = worker_of(os.environ)
    assert worker is not None
    try:
        _join_group("cuda", worker)
    except errors.ConfigError as error:
        return str(error)
    return "nothing was noticed"


if __name__ == "__main__":
    task, arguments, folder = sys.argv[1:]
    record = globals()[task](**json.loads(arguments))
    rank = os.environ.get("RANK", "0")
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))
    os._exit(0)
