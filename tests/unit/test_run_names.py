import re
from pathlib import Path

import pytest

from mnist_dist.errors import ConfigError
from mnist_dist.run.folder import RunFolder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder `runs` with the runs a and b; a has a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / "runs" / name / "checkpoints" / "step-00000007").mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "nowhere is not a run: there is no such folder. Name a folder that `train` made."),
        ("a", "a is not a run: there is no such folder. Did you mean runs/a?"),
        ("notes.txt", "notes.txt is not a run: it is a file."),
        ("empty", "empty is not a run: it has no config.yaml."),
        ("runs", "runs is not a run: it holds 2 runs. Name one, e.g. runs/b."),
        ("runs/a/checkpoints/step-00000007", "is not a run: it is inside the run runs/a. Name that."),
        ("runs/a/config.yaml", "is not a run: it is inside the run runs/a."),
    ],
)
@pytest.mark.usefixtures("runs")
def test_a_folder_that_is_not_a_run_is_refused_with_a_hint(path, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunFolder(Path(path)).check_run()
