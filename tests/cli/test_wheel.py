"""An installed wheel has what a checkout has."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_carries_presets_recipes_and_digits(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-m", "mnist_dist"]
    for words in (["config", "list"], ["train", "--dry-run"]):
        ended = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert "quick" in ended.stdout
    train = ["--dry-run", "--", "train", "--run", "/runs/a"]
    for words in (["slurm"], ["kubernetes", "--image", "i", "--run-claim", "r"]):
        ended = subprocess.run(
            [*command, "launch", *words, *train], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert "/runs/a" in ended.stdout
    package = tmp_path / "site" / "mnist_dist"
    assert (package / "configs" / "baseline.yaml").is_file()
    recipes = {path.relative_to(ROOT / "launch") for path in (ROOT / "launch").rglob("*") if path.is_file()}
    assert recipes == {path.relative_to(package / "recipes") for path in package.glob("recipes/**/*") if path.is_file()}
    assert Path("kubernetes/job.yaml") in recipes
