"""All that needs torch, in a process of its own: what it holds of a GPU ends with it.

A process that has computed on a GPU keeps a context there until it ends. A GPU of which one process at a time may have
a context (`EXCLUSIVE_PROCESS`) would then refuse the processes that try NCCL.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mnist_dist.doctor.finding import Finding, examine, first_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was found, and what the checks that follow depend on."""

    findings: list[Finding]
    gloo: bool = False
    """Whether this build of torch has it."""
    nccl: bool = False
    gpus: int = 0
    """How many CUDA shows to a process."""

    @classmethod
    def read(cls, file: Path) -> Survey:
        """Read what `survey` has written."""
        record = json.loads(file.read_text(encoding="utf-8"))
        return cls(**record | {"findings": [Finding(**finding) for finding in record["findings"]]})


def survey(output: Path) -> None:
    """Check torch and every device, as far as torch can be imported.

    Args:
        output: A JSON file to write, with a `Survey`.
    """
    output.write_text(json.dumps(asdict(_survey())), encoding="utf-8")


def _survey() -> Survey:
    try:
        import torch

        from mnist_dist.doctor import hardware
        from mnist_dist.runtime import has_backend
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        found = f"torch and accelerate cannot be imported: {type(error).__name__}: {first_line(error)}"
        advice = "Install what it names anew: see https://pytorch.org/get-started/locally."
        return Survey(findings=[Finding(check="torch", state="problem", found=found, advice=advice)])
    findings = [
        Finding(check="torch", state="ok", found=torch.__version__),
        *examine("CUDA", hardware.cuda),
        *examine("NCCL and gloo", hardware.backends),
        *examine("cpu", hardware.processor),
        *examine("GPUs", hardware.graphics),
        *examine("train takes", hardware.choice),
    ]
    gpus = 0
    with contextlib.suppress(RuntimeError):  # the check of CUDA has said so
        gpus = hardware.usable_gpus()
    return Survey(findings=findings, gloo=has_backend("gloo"), nccl=has_backend("nccl"), gpus=gpus)
