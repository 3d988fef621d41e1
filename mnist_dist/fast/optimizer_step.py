"""Saves the Python layers around each optimizer step: on a CPU they cost as much as the update itself.

At every step, `Optimizer.step` groups its tensors by device, opens a profiler range and asks the compiler. The result
never changes, so this module calls the kernels directly. They are private functions of torch. If one is missing, or
anything is unusual, the public `step` does the work, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim

KERNELS = {optim.SGD: "_fused_sgd_", optim.Adam: "_fused_adam_", optim.AdamW: "_fused_adamw_"}
"""Torch's private functions that update all parameters at once."""

Update = Callable[[list[Tensor | None]], None]


class Stepper:
    """Updates an optimizer's parameters from their gradients, and then sets the gradients to `None`."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._update: Update | None = None
        self._parameters: list[Tensor] = []

    def step(self) -> None:
        """Update the parameters and clear their gradients."""
        if self._update is None:
            self.optimizer.step()  # makes the optimizer's state
            self.optimizer.zero_grad()
            self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            self._update = _kernel(self.optimizer, self._parameters) or self._public_step
            return
        self._update([parameter.grad for parameter in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None

    def _public_step(self, _: list[Tensor | None]) -> None:
        self.optimizer.step()


def _kernel(optimizer: optim.Optimizer, parameters: list[Tensor]) -> Update | None:
    """Return a function equal to the optimizer's `step` from its second step on; None if there is no such kernel."""
    state, group = optimizer.state, optimizer.param_groups[0]
    function: Any = getattr(torch, KERNELS.get(type(optimizer), ""), None)
    if function is None or len(optimizer.param_groups) > 1 or not group["fused"]:
        return None
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    if any(
        tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor not in state for tensor in parameters
    ):
        return None

    if isinstance(optimizer, optim.SGD):
        momenta = [state[tensor]["momentum_buffer"] for tensor in parameters] if group["momentum"] else []

        @torch.no_grad()
        def step_sgd(gradients: list[Tensor | None]) -> None:
            function(
                parameters,
                gradients,
                momenta,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                is_first_step=False,
                grad_scale=None,
                found_inf=None,
            )

        return step_sgd

    means, squares, steps = ([state[tensor][key] for tensor in parameters] for key in ("exp_avg", "exp_avg_sq", "step"))

    @torch.no_grad()
    def step_adam(gradients: list[Tensor | None]) -> None:
        torch._foreach_add_(steps, 1)
        function(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
            grad_scale=None,
            found_inf=None,
        )

    return step_adam
