"""Open a trained run's network to evaluate it and to predict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mnist_dist.config import EMBEDDED_DIGITS, Config, load
from mnist_dist.config.schema import Device, Precision
from mnist_dist.data import Dataset, Split, open_dataset
from mnist_dist.data.batches import Batches, Normalise
from mnist_dist.data.decode import Decoding
from mnist_dist.data.formats import UnreadableError, decode
from mnist_dist.data.scan import scan
from mnist_dist.data.walk import find_pictures
from mnist_dist.errors import CheckpointError
from mnist_dist.models import build_model
from mnist_dist.observe.records import Evaluation
from mnist_dist.run import checkpoint
from mnist_dist.run.folder import RunFolder
from mnist_dist.runtime import Runtime, start
from mnist_dist.runtime.device import choose_device
from mnist_dist.training.evaluate import batch_size, evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A checkpoint's network, with what it needs to know of its images."""

    folder: RunFolder
    checkpoint: Path
    step: int
    config: Config
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_sha256: str
    """Identity of the images that it was trained on, its held-out ones included."""
    model: nn.Module
    """On the runtime's device, in evaluation mode."""
    runtime: Runtime

    @property
    def decoding(self) -> Decoding:
        """What image files are decoded to before the network sees them."""
        data = self.config.data
        return Decoding(image_size=data.image_size, channels=data.channels, max_megapixels=data.max_megapixels)

    def evaluate(self, dataset: Dataset, split: Split) -> Evaluation:
        """Evaluate on every image of a split. Every rank.

        Raises:
            CheckpointError: The data set has other classes than the run had.
        """
        self.check_classes(dataset.classes, dataset.root)
        batches = Batches(split, mean=self.mean, std=self.std, device=self.runtime.device)
        return evaluate(self.model, batches, split, self.runtime)

    def check_classes(self, classes: tuple[str, ...], root: str) -> None:
        """Raise an error if a data set has other classes than the run had.

        Raises:
            CheckpointError: It has others.
        """
        if classes != self.classes:
            raise CheckpointError(
                f"{self.checkpoint} knows the classes {_names(self.classes)}, but {root} has "
                f"{_names(classes)}: name a folder with the same classes."
            )

    def predict(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the probability of each class: `(B, C, H, W)` uint8 to `(B, K)`, each row sums to 1."""
        normalise = Normalise(mean=self.mean, std=self.std, device=self.runtime.device)
        with torch.inference_mode():
            batches = torch.split(torch.from_numpy(pixels), batch_size(pixels[0].size))
            logits = torch.cat([self.model(normalise(batch.to(self.runtime.device))).float() for batch in batches])
            probabilities: NDArray[np.float32] = logits.softmax(dim=1).cpu().numpy()
        return probabilities


@contextlib.contextmanager
def open_run(
    run: Path | str,
    *,
    checkpoint: str | None = None,
    device: Device = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Trained]:
    """Open a run's network on a device until the block ends. Every rank.

    Args:
        run: Its folder.
        checkpoint: `best`, `last` or a step; None takes the last.
        device: Where to compute. On the kind of device that the run was trained on, it computes in the run's precision.
        say: Gets a line if the run does not tell on what it was trained.

    Yields:
        The network, with `predict`, `evaluate` and `classes`.

    Raises:
        ConfigError: There is no run, or no such device.
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    run = Path(run)
    with start(device=device, precision=precision_of(run, device, say), threads=None) as runtime:
        yield open_trained(run, checkpoint, runtime)


def open_trained(run: Path, which: str | None, runtime: Runtime) -> Trained:
    """Load a run's network.

    Args:
        run: Its folder.
        which: `best`, `last` or a step; None takes the last.
        runtime: This process's.

    Raises:
        ConfigError: There is no run.
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    folder = RunFolder(run)
    folder.check_run()
    path = checkpoint.find(folder.checkpoints, which or "last")
    meta = checkpoint.read_meta(path)
    config = load(folder.config).config
    if meta.config_sha256 not in (None, folder.config_sha256()):
        raise CheckpointError(folder.altered_config())
    pictures = meta.preprocessing
    if (pictures.image_size, pictures.channels) != (config.data.image_size, config.data.channels):
        raise CheckpointError(f"The checkpoint {path} and {folder.config} disagree on the images' size or channels.")
    build = partial(
        build_model,
        config.model.name,
        classes=len(meta.classes),
        channels=pictures.channels,
        image_size=pictures.image_size,
        dropout=config.model.dropout,
    )
    with torch.device("meta"):  # takes no memory
        expected = build()
    weights = checkpoint.read_weights(path, expected)
    model = build()
    checkpoint.restore_model(weights, model, path)
    return Trained(
        folder=folder,
        checkpoint=path,
        step=meta.step,
        config=config,
        classes=meta.classes,
        mean=pictures.mean,
        std=pictures.std,
        data_sha256=meta.data_sha256,
        model=runtime.prepare(model, training=False).eval(),
        runtime=runtime,
    )


def precision_of(run: Path, device: Device, say: Callable[[str], None]) -> Precision:
    """Find the precision to compute a run's network in: the run's own where the kind of device is the same.

    Args:
        run: Its folder.
        device: What to compute on.
        say: Gets a line if the run does not tell any more on what it was trained.

    Raises:
        ConfigError: There is no run, or no such device.
    """
    folder = RunFolder(run)
    folder.check_run()
    if folder.read_environment(say).get("device") != choose_device(device).value:
        return "auto"
    return load(folder.config).config.train.precision


def open_data(trained: Trained, root: str | None, announce: Callable[[str], None]) -> Dataset:
    """Open the data set that a run was trained on, or another one in its place.

    Raises:
        CheckpointError: The other one has other classes; nothing of it is decoded.
    """
    data = trained.config.data
    opened = partial(open_dataset, seed=trained.config.train.seed, announce=announce)
    if root is None:
        found = trained.folder.find_data(data.root)
        if found != data.root:
            announce(f"The images are read from {found}, as when the run was started.")
        return opened(data.model_copy(update={"root": found}))
    if root != EMBEDDED_DIGITS:
        trained.check_classes(scan(Path(root), follow_links=data.follow_links).classes, root)
    other = opened(data.model_copy(update={"root": root, "validation_fraction": 0.0}), whole=True)
    if other.sha256 != trained.data_sha256:
        return other
    return opened(data.model_copy(update={"root": root}))  # the run's own: what it was trained on is no test


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPictures:
    """Image files that somebody named, decoded."""

    files: list[Path]
    """Those that could be read."""
    pixels: NDArray[np.uint8]
    """`(N, C, H, W)` of them."""
    unreadable: list[tuple[Path, str]]
    """The others, each with the reason."""
    warnings: dict[Path, str]
    """Warnings of decoders about files that they could read."""


def read_pictures(paths: list[Path], decoding: Decoding) -> ReadPictures:
    """Decode image files, and all images below folders.

    Args:
        paths: Files and folders.
        decoding: What they are decoded to.

    Raises:
        DeviceMemoryError: Memory does not hold an image.
    """
    files: list[Path] = []
    pixels: list[NDArray[np.uint8]] = []
    unreadable: list[tuple[Path, str]] = []
    warnings: dict[Path, str] = {}
    for file in _picture_files(paths, unreadable):
        said: list[str] = []
        try:
            most = decoding.max_megapixels
            decoded = decode(file, decoding.image_size, decoding.channels, max_megapixels=most, warn=said.append)
        except UnreadableError as error:
            unreadable.append((file, error.reason))
            continue
        files.append(file)
        pixels.append(decoded)
        if said:
            warnings[file] = "; ".join(said)
    stacked = np.stack(pixels) if pixels else np.empty((0, *decoding.shape), np.uint8)
    return ReadPictures(files=files, pixels=stacked, unreadable=unreadable, warnings=warnings)


def _picture_files(paths: list[Path], unreadable: list[tuple[Path, str]]) -> Iterator[Path]:
    """Yield files, and the images below folders; folders without any are unreadable."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found, bad = find_pictures(path)
        unreadable += [(Path(name), reason) for name, reason in bad.items()]
        if not found and not bad:
            unreadable.append((path, "there are no images in this folder"))
        yield from found


def _names(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:10]) + (f", … ({len(classes)})" if len(classes) > 10 else "")
