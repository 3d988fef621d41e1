"""The validated experiment: its keys, with their defaults, ranges and meanings."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from mnist_dist.errors import ConfigError
from mnist_dist.models.catalogue import CATALOGUE

EMBEDDED_DIGITS = "embedded:digits"
"""The `data.root` that stands for the 1,797 handwritten digits inside the package."""

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Residency = Literal["auto", "device", "host"]
if TYPE_CHECKING:
    NetworkName = str
else:
    NetworkName = Literal[tuple(CATALOGUE)]

MOST_STEPS = 10**12
"""No run takes so many; positions of images stay far below 2**63."""
SIMPLE = 10_000
"""Denominators up to here are tried first: every decimal of four digits has one, and so have thirds."""


def _no_truth_value(value: Any) -> Any:
    """Refuse true and false where a number is expected: Python takes them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("not a number")
    return value


def _false_is_off(value: Any) -> Any:
    """YAML reads the word off as false."""
    return "off" if value is False else value


def auto_is_null(value: Any) -> Any:
    """Return None for `auto`, and any other value as it is."""
    return None if value == "auto" else value


Number = Annotated[float, BeforeValidator(_no_truth_value)]
Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


def exact(value: float) -> Fraction:
    """Return the number that was meant by a float: 0.1 is a tenth, and 2 / 3 is two thirds.

    A simple fraction if there is one with the same float, else the shortest decimal that has it.
    """
    simple = Fraction(value).limit_denominator(SIMPLE)
    return simple if float(simple) == value else Fraction(repr(float(value)))


class Section(BaseModel):
    """A part of the config: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class Augmentation(Section):
    """Random changes to each training image; all off by default."""

    rotation_degrees: Number = Field(0.0, ge=0, le=180)
    """Rotate by up to this angle either way."""
    shift_pixels: Number = Field(0.0, ge=0, le=1024)
    """Move by up to this many pixels along each axis."""
    scale: Number = Field(0.0, ge=0, le=0.95)
    """Enlarge or shrink by up to this share: 0.1 gives factors from 0.9 to 1.1."""
    horizontal_flip: Number = Field(0.0, ge=0, le=1)
    """Probability that an image is mirrored left to right. Not for digits and letters."""
    vertical_flip: Number = Field(0.0, ge=0, le=1)
    """Probability that an image is mirrored top to bottom."""
    brightness: Number = Field(0.0, ge=0, le=1)
    """Multiply values by a factor: 0.2 gives factors from 0.8 to 1.2."""
    contrast: Number = Field(0.0, ge=0, le=1)
    """Move values away from the image's mean gray, or towards it, by such a factor."""
    saturation: Number = Field(0.0, ge=0, le=1)
    """Move colours away from gray, or towards it, by such a factor."""
    erase: Number = Field(0.0, ge=0, le=1)
    """Probability that a box of 2 to 33 % of an image is filled with the image's mean colour."""


class Data(Section):
    """Where the images are and what a network gets to see of them."""

    root: Text = "Dataset"
    """Folder with `train/<class>/*` and `test/<class>/*`, or `embedded:digits`."""
    follow_links: bool = False
    """Read images outside of the data folder too, where links in it lead to them."""
    image_size: Whole = Field(28, ge=8, le=1024)
    """Height and width that every image is resized to."""
    channels: Annotated[Literal[1, 3], BeforeValidator(_no_truth_value)] = 1
    """1 for grayscale, 3 for colour."""
    max_megapixels: Whole = Field(256, ge=1, le=4096)
    """Images of more than so many million pixels are refused: decoding takes up to 12 bytes of memory a pixel."""
    validation_fraction: Number = Field(0.0, ge=0, le=0.9)
    """Share of each class's training images to hold out, where there is no `val` folder."""
    mean: tuple[Annotated[Number, Field(ge=0, le=1)], ...] | None = None
    """Mean of each channel, for pixels in [0, 1]; null measures it on the training images."""
    std: tuple[Annotated[Number, Field(ge=1e-6, le=1)], ...] | None = None
    """Standard deviation of each channel, for pixels in [0, 1]."""
    residency: Residency = "auto"
    """Where pixels are kept on a GPU: `device` in its memory, `host` outside of it; auto: in its memory if they take a
    quarter of what is free there, or less. The result is the same."""
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _one_figure_per_channel(self) -> Data:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std must be given together")
        for name, figures in (("mean", self.mean), ("std", self.std)):
            if figures is not None and len(figures) != self.channels:
                raise ValueError(f"{name} needs one figure per channel, {self.channels} in all")
        return self


class Model(Section):
    """The network."""

    name: NetworkName = "small_cnn"
    """A row of `mnist_dist.models.CATALOGUE`."""
    dropout: Number = Field(0.25, ge=0, le=0.99)
    """Share of activations that training sets to zero."""


class Sgd(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Number = Field(0.03, ge=1e-12, le=1_000_000)
    """Peak learning rate; `schedule` says how it changes."""
    momentum: Number = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: Number = Field(0.0, ge=0, le=1000)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Sgd:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Adam(Section):
    """Adam (Kingma & Ba, 2015)."""

    name: Literal["adam"] = "adam"
    learning_rate: Number = Field(0.001, ge=1e-12, le=1_000_000)
    """Peak learning rate; `schedule` says how it changes."""
    beta1: Number = Field(0.9, ge=0, lt=1)
    beta2: Number = Field(0.999, ge=0, lt=1)
    weight_decay: Number = Field(0.0, ge=0, le=1000)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    name: Literal["adamw"] = "adamw"  # type: ignore[assignment]
    weight_decay: Number = Field(0.01, ge=0, le=1000)


class Schedule(Section):
    """What every schedule has: a linear warm-up from 0."""

    warmup_fraction: Number = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the learning rate rises to its peak."""


class Constant(Schedule):
    """The peak, to the end."""

    name: Literal["constant"] = "constant"


class Step(Schedule):
    """The peak, multiplied by `factor` after every `every_epochs` epochs."""

    name: Literal["step"] = "step"
    every_epochs: Number = Field(1.0, ge=0.0001, le=1_000_000)
    factor: Number = Field(0.7, ge=0.0001, le=1)


class Cosine(Schedule):
    """Half a cosine from the peak to `final_fraction` of it."""

    name: Literal["cosine"] = "cosine"
    final_fraction: Number = Field(0.0, ge=0, le=1)


class OneCycle(Schedule):
    """A cosine up from `start_fraction` of the peak, then a cosine down (Smith & Topin, 2018)."""

    name: Literal["one_cycle"] = "one_cycle"
    warmup_fraction: Number = Field(0.3, gt=0, lt=1)
    start_fraction: Number = Field(0.04, ge=0, le=1)
    final_fraction: Number = Field(0.0, ge=0, le=1)


AnyOptimizer = Sgd | Adam | AdamW
AnySchedule = Constant | Step | Cosine | OneCycle


class Train(Section):
    """How long, in which pieces, and with which arithmetic."""

    epochs: Number = Field(10, ge=1e-6, le=1_000_000)
    """How many times to go through the training images; 0.5 is half of them."""
    max_steps: Whole | None = Field(None, ge=1, le=MOST_STEPS)
    """Stop after this many steps, if that is sooner."""
    global_batch: Whole = Field(64, ge=1, le=10_000_000)
    """Images in one step, over all processes."""
    micro_batch: Whole | None = Field(None, ge=1, le=10_000_000)
    """Images that a process handles at once; null: its whole share of the global batch, a quarter of it in exact."""
    reduction: Literal["ddp", "exact"] = "ddp"
    """`exact` gives the same bits on 1, 2, 4, ... processes, as many as there are micro-batches."""
    label_smoothing: Number = Field(0.0, ge=0, lt=1)
    """Share of each target that is spread over all classes (Szegedy et al., 2016); the test loss is without it."""
    clip_norm: Number | None = Field(None, ge=1e-6, le=1_000_000_000)
    """Scale gradients down to this norm where theirs is larger; null: never."""
    seed: Whole = Field(0, ge=0, le=2**63 - 1)
    """What initial weights, order, augmentation and dropout are drawn from."""
    device: Device = "auto"
    precision: Precision = "auto"
    compile: bool = False
    """Train with `torch.compile`, which takes tens of seconds first; `bench` shows whether steps are quicker then."""
    graph: Annotated[Literal["auto", "off"], BeforeValidator(_false_is_off)] = "off"
    """`auto` prepares the input of many steps at once and lets a CUDA GPU replay a captured step, which is meant for
    steps so short that the GPU waits for Python; the plan says where that cannot be. Not yet measured on a GPU."""
    threads: Annotated[Whole | None, BeforeValidator(auto_is_null)] = Field(None, ge=1, le=1024)
    """CPU threads of each process; a number stays to the end. null or auto: as many as the work of a step is worth and
    other programs leave, at most an equal share of the CPUs; fewer when other programs begin to take CPUs."""
    log_every: Whole = Field(50, ge=1, le=MOST_STEPS)
    """Steps between two lines of the journal."""

    @property
    def fixed_threads(self) -> int | None:
        """Threads of each process where they decide on the bits; `None`: they are chosen when the run starts."""
        if self.threads is not None:
            return self.threads
        return 1 if self.reduction == "exact" else None

    def split_batch(self, ranks: int) -> tuple[int, int]:
        """Divide the global batch over processes and micro-batches.

        Args:
            ranks: Number of processes.

        Returns:
            Images in a micro-batch, and how many micro-batches each process accumulates in a step.

        Raises:
            ConfigError: The global batch is not a multiple of `ranks` x micro-batch.
        """
        if self.reduction == "exact":
            return self._split_exactly(ranks)
        unit = ranks * (self.micro_batch or 1)
        if self.global_batch % unit:
            whole = self.global_batch // unit * unit
            nearest = [str(batch) for batch in (whole, whole + unit) if batch]
            pieces = f"in micro-batches of {self.micro_batch}" if self.micro_batch else "equally"
            processes = f"{ranks} processes" if ranks > 1 else "one process"
            raise ConfigError(
                f"train.global_batch is {self.global_batch}, which {processes} cannot share {pieces}: "
                f"use {' or '.join(nearest)}."
            )
        micro_batch = self.micro_batch or self.global_batch // ranks
        return micro_batch, self.global_batch // (ranks * micro_batch)

    def _split_exactly(self, ranks: int) -> tuple[int, int]:
        """Divide into a power of two of micro-batches, whose number does not depend on the processes'."""
        micro_batch = self.micro_batch or max(1, self.global_batch // 4)
        pieces, rest = divmod(self.global_batch, micro_batch)
        if rest or pieces.bit_count() != 1:
            raise ConfigError(
                f"train.reduction exact needs 1, 2, 4, 8, ... micro-batches: train.global_batch {self.global_batch} "
                f"is {self.global_batch / micro_batch:g} times train.micro_batch {micro_batch}. Change one of them, "
                f"e.g. train.global_batch to {micro_batch * (1 << max(0, pieces.bit_length() - 1))}."
            )
        if ranks.bit_count() != 1 or ranks > pieces:
            raise ConfigError(
                f"train.reduction exact shares {pieces} micro-batches, which {ranks} processes cannot share equally: "
                f"use {', '.join(str(1 << power) for power in range(pieces.bit_length()))}, or a smaller "
                f"train.micro_batch."
            )
        return micro_batch, pieces // ranks

    def total_steps(self, images: int) -> int:
        """Count the run's steps over a training set of `images` images."""
        steps = max(1, math.ceil(exact(self.epochs) * images / self.global_batch))
        return steps if self.max_steps is None else min(steps, self.max_steps)


class Checkpoint(Section):
    """When checkpoints are written besides at each epoch's end and at a stop, and how many are kept."""

    every_steps: Whole | None = Field(None, ge=1, le=MOST_STEPS)
    """Also after every so many steps."""
    every_minutes: Number | None = Field(None, ge=0.0001, le=1_000_000)
    """Also when so many minutes have passed since the last one."""
    keep: Whole = Field(2, ge=2, le=1_000_000)
    """How many of the newest to keep; the best on the validation split is kept besides."""


class Config(Section):
    """One experiment, complete and validated."""

    data: Data = Data()
    model: Model = Model()
    optimizer: AnyOptimizer = Field(Sgd(), discriminator="name")
    schedule: AnySchedule = Field(Cosine(), discriminator="name")
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def _picture_is_large_enough(self) -> Config:
        smallest = CATALOGUE[self.model.name].smallest
        if self.data.image_size < smallest:
            raise ValueError(f"model {self.model.name} needs a data.image_size of at least {smallest}")
        return self


VARIANTS = {name: field.default.name for name, field in Config.model_fields.items() if field.discriminator}
"""The sections of which a config chooses one of several kinds by `name`, each with the kind that is the default."""
