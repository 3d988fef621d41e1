"""TensorBoard: scalars, sample predictions, hyper-parameters and the config, all in one event file."""

from __future__ import annotations

import string
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from mnist_dist.config import Config
from mnist_dist.config.resolve import flatten
from mnist_dist.data import Dataset
from mnist_dist.disk.storage import obstacle
from mnist_dist.keyed import Purpose, keyed_permutation
from mnist_dist.observe import EVENTS_SUFFIX, Observer
from mnist_dist.observe.columns import COLUMNS, figures_of
from mnist_dist.observe.figures import sample_grid, samples_of
from mnist_dist.observe.names import shown
from mnist_dist.observe.records import EpochReport, Evaluation, Plan, Result, StepReport

SAMPLES = 16
GRID_COLUMNS = 4  # so that titles can be read in the page's thumbnails


class TensorBoard(Observer):
    """Writes what TensorBoard shows of a run."""

    def __init__(
        self, folder: Path, *, config: Config, config_yaml: str, dataset: Dataset, first_step: int = 0
    ) -> None:
        self._folder = folder
        self._excepthook, threading.excepthook = threading.excepthook, self._pass_over
        self._writer = SummaryWriter(
            str(folder), purge_step=first_step + 1 if first_step else None, filename_suffix=EVENTS_SUFFIX
        )
        self._dataset = dataset
        self._samples = keyed_permutation(Purpose.SAMPLE, len(dataset.reported), config.train.seed)[:SAMPLES]
        self._config = config
        code = "\n".join(f"    {shown(line)}" for line in config_yaml.splitlines())  # only a fence could be closed
        self._writer.add_text("config", code)

    def plan(self, plan: Plan) -> None:
        """Open the HParams entry, and show the plan as a table."""
        values = {
            key: value if isinstance(value, int | float) else shown(value)
            for key, value in flatten(self._config.model_dump(mode="json"))
        }
        split = self._dataset.reported.name
        metrics = [f"by_epoch/{name}_{what}" for name in (split, "train") for what in ("accuracy", "loss")]
        # SummaryWriter.add_hparams would open a second event file in a folder of its own
        *opening, self._session_end = hparams(values, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
        for summary in opening:
            self._add_summary(summary)
        rows = "\n".join(f"| {name} | {markdown(value)} |" for name, value in asdict(plan).items())
        self._writer.add_text("plan", f"| | |\n| --- | --- |\n{rows}")

    def step(self, report: StepReport) -> None:  # noqa: D102
        for name in ("loss", "accuracy", "learning_rate", "images_per_second"):
            self._writer.add_scalar(f"by_step/{name}", getattr(report, name), report.step)

    def epoch(self, report: EpochReport, test: Evaluation) -> None:  # noqa: D102
        figures = figures_of(report, test)
        for column in COLUMNS:
            if column.scalar and column.name in figures:
                self._writer.add_scalar(f"by_epoch/{column.name}", figures[column.name], report.epoch)
        grid = sample_grid(samples_of(self._dataset, self._dataset.reported, test, self._samples), columns=GRID_COLUMNS)
        self._writer.add_image(f"{test.split}_predictions", np.asarray(grid), report.epoch, dataformats="HWC")
        self._writer.flush()

    def result(self, result: Result) -> None:  # noqa: D102
        if result.status == "finished":
            self._add_summary(self._session_end)

    def sizes(self) -> dict[str, int]:  # noqa: D102
        self._writer.flush()
        return {
            f"{self._folder.name}/{file.name}": file.stat().st_size
            for file in self._folder.iterdir()
            if file.name.endswith(EVENTS_SUFFIX) and obstacle(file, folder=False) is None
        }

    def close(self) -> None:  # noqa: D102
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _pass_over(self, failure: threading.ExceptHookArgs) -> None:
        """Print no traceback of the thread that writes: its error comes back at the next call of the writer."""
        if not isinstance(failure.exc_value, OSError):
            self._excepthook(failure)

    def _add_summary(self, summary: Any) -> None:
        file = self._writer.file_writer
        assert file is not None  # only after close
        file.add_summary(summary)


def markdown(value: object) -> str:
    """Return a value as text for a table in TensorBoard, where none of it is a link, an image, HTML or a cell end."""
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "".join(f"&#{ord(c)};" if c in string.punctuation else c for c in shown(text))
