"""The plain records that a run hands out: to observers, to `result.json`, to a caller in Python."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is going to do, known before its first step."""

    run: str
    device: str
    device_reason: str
    precision: str
    precision_reason: str
    ranks: int
    threads: int
    threads_reason: str
    global_batch: int
    micro_batch: int
    accumulation: int
    reduction: str
    first_step: int
    """Steps done by earlier processes of a resumed run."""
    total_steps: int
    epochs: float
    model: str
    parameters: int
    optimizer: str
    schedule: str
    augmentation: str
    data: str
    classes: tuple[str, ...]
    train_images: int
    validation_images: int
    test_images: int
    store: str
    graph: str = ""
    """How steps are taken, where `train.graph` asks for something."""

    @property
    def first_epoch(self) -> int:
        """The epoch, counted from 1, that the first step of this process belongs to."""
        return self._epoch_of(min(self.first_step, self.total_steps - 1))

    @property
    def last_epoch(self) -> int:
        """The epoch, counted from 1, that the run's last step belongs to."""
        return self._epoch_of(self.total_steps - 1)

    @property
    def planned_epochs(self) -> float:
        """Epochs that the run does, to two digits: fewer than `epochs` where `train.max_steps` ends it earlier."""
        return min(self.epochs, round(self.total_steps * self.global_batch / self.train_images, 2))

    def _epoch_of(self, step: int) -> int:
        return step * self.global_batch // self.train_images + 1

    @property
    def batch_arithmetic(self) -> str:
        """The global batch as micro-batch x accumulation x ranks."""
        return f"{self.global_batch} = {self.micro_batch} x {self.accumulation} x {self.ranks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Training since the last such report, over all ranks."""

    step: int
    epoch: int
    loss: float
    accuracy: float
    learning_rate: float
    images_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something worth noting that happened in a step."""

    step: int
    event: Literal["update_left_out", "fewer_threads"]
    """`update_left_out`: gradients overflowed under fp16; the step is done without changing the weights.
    `fewer_threads`: other programs left too few CPUs."""
    figures: dict[str, float]
    """What holds from now on, by name: `loss_scale`, or `threads` of each process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over a split that counted every image exactly once."""

    split: str
    labels: NDArray[np.int64] = field(repr=False)
    """`(N,)` true class of each image."""
    predicted: NDArray[np.int64] = field(repr=False)
    """`(N,)` predicted class."""
    losses: NDArray[np.float32] = field(repr=False)
    """`(N,)` cross-entropy in nats."""

    @property
    def images(self) -> int:
        """How many were evaluated: all of the split."""
        return len(self.labels)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats, summed in float64."""
        return float(self.losses.sum(dtype=np.float64)) / self.images

    @property
    def correct(self) -> int:
        """How many were classified correctly."""
        return int((self.labels == self.predicted).sum())

    @property
    def accuracy(self) -> float:
        """Share of the images classified correctly, in [0, 1]."""
        return self.correct / self.images

    def confusion(self, classes: int) -> NDArray[np.int64]:
        """Count `(K, K)` images: row the true class, column the predicted one."""
        pairs = np.bincount(self.labels * classes + self.predicted, minlength=classes * classes)
        return pairs.reshape(classes, classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """One finished epoch: its training totals and what was evaluated at its end."""

    epoch: int
    step: int
    images: int
    train_loss: float
    train_accuracy: float
    test_images: int | None
    """How many test images were counted, each exactly once. `None`: there are none, as for all figures of a split."""
    test_loss: float | None
    test_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    images_per_second: float
    seconds: float
    learning_rate: float

    def metrics(self) -> dict[str, float]:
        """Every figure by its name; those of the validation split only where there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What `result.json` says when a run has ended."""

    status: Literal["finished", "stopped", "failed"]
    run: str
    step: int
    epochs: float
    seconds: float
    evaluated: str | None = None
    """How many images of the reported split were counted, as "10000/10000"."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last epoch's figures."""
    best: dict[str, float] | None = None
    """`epoch`, `step` and `validation_accuracy` of the best checkpoint, with a validation split."""
    weights_sha256: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, without what is not there."""
        return {name: value for name, value in asdict(self).items() if value is not None}
