"""Leaving torch's compiler out changes no number, and whoever wants it gets it."""

import json
import subprocess
import sys

TRAINING = """
import json, sys
from mnist_dist.fast.imports import leave_out_compiler
if sys.argv[1] == "late":
    import torch
if sys.argv[1] != "usual":
    leave_out_compiler()
import torch
record = {}
for name, kind in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
    for fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        options = {"momentum": 0.9} if name == "sgd" else {}
        optimizer = kind(model.parameters(), lr=0.1, fused=fused, **options)
        for step in range(6):
            if step == 3:
                again = kind(model.parameters(), lr=0.1, fused=fused, **options)
                again.load_state_dict(optimizer.state_dict())
                optimizer = again
            model(torch.randn(4, 8)).square().sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        record[f"{name} {fused}"] = [value.hex() for p in model.parameters() for value in p.flatten().tolist()]
import inspect
inspect.getmodule(inspect.currentframe().f_code)  # looks at every module that there is
heavy = ("torch._dynamo.eval_frame", "torch._inductor", "sympy", "torch._refs")
heavy = [name for name in heavy if name in sys.modules]
import torch._meta_registrations as shapes
shapes.meta_conv
shape = torch.nn.Conv2d(1, 2, 3, device="meta")(torch.empty(1, 1, 8, 8, device="meta")).shape
compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(2)).tolist()
print(json.dumps({"weights": record, "heavy": heavy, "compiled": compiled, "shape": shape,
                  "real": hasattr(sys.modules["torch._dynamo"], "eval_frame")}))
"""


def train(how):
    command = [sys.executable, "-c", TRAINING, how]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_optimizers_do_the_same_to_the_bit_without_the_compiler():
    lean, late, usual = train("lean"), train("late"), train("usual")
    assert lean["weights"] == late["weights"] == usual["weights"]
    assert lean["heavy"] == []
    assert late["heavy"] == ["torch._refs"]  # torch was there before
    assert len(usual["heavy"]) == 4
    for found in (lean, late, usual):
        assert found["compiled"] == [3.0, 3.0]
        assert found["shape"] == [1, 2, 6, 6]  # which torch knows once someone has asked for what was left out
        assert found["real"]
