"""All checks that need torch, in a process of their own: what it holds of a GPU ends with it.

A process that has computed on a GPU keeps a context there until it ends. A GPU that allows one context at a time
(`EXCLUSIVE_PROCESS`) would then refuse the processes that try NCCL.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from mnist_dist.doctor.finding import Finding, examine, first_line


def survey_torch(output: Path) -> None:
    """Check torch and every device, as far as torch can be imported.

    Args:
        output: A JSON file to write: `findings`, and the `groups` of processes to try, as library, device and ranks.
    """
    groups: list[tuple[str, str, int]] = []
    try:
        import torch

        from mnist_dist.doctor import hardware
        from mnist_dist.runtime import has_backend
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        found = f"torch and accelerate cannot be imported: {type(error).__name__}: {first_line(error)}"
        advice = "Install what it names anew: see https://pytorch.org/get-started/locally."
        findings = [Finding(check="torch", state="problem", found=found, advice=advice)]
    else:
        findings = [
            Finding(check="torch", state="ok", found=torch.__version__),
            *examine("CUDA", hardware.cuda),
            *examine("NCCL and gloo", hardware.backends),
            *examine("cpu", hardware.processor),
            *examine("GPUs", hardware.graphics),
            *examine("train takes", hardware.train_choice),
        ]
        if has_backend("gloo"):
            groups.append(("gloo", "cpu", 2))
        with contextlib.suppress(RuntimeError):  # the check of CUDA reports it
            if has_backend("nccl") and hardware.usable_gpus() > 1:
                groups.append(("NCCL", "cuda", hardware.usable_gpus()))
    record = {"findings": [asdict(finding) for finding in findings], "groups": groups}
    output.write_text(json.dumps(record), encoding="utf-8")
