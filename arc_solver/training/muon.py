"""Muon for hardware that does not multiply bfloat16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Float32Muon(torch.optim.Muon):
    """PyTorch's Muon (Jordan 2024), which makes its updates orthogonal in float32 instead of bfloat16.

    A CPU without AMX and AVX512_BF16 emulates products of bfloat16 matrices, so slowly that they took most of the time
    of a training. State and settings are PyTorch's: a checkpoint goes on with either.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            with_grad: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, with_grad, grads, momenta)
            for weight, grad, momentum in zip(with_grad, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix with its singular vectors, and all singular values near 1: each step takes a singular value s to
    a s + b s^3 + c s^5 (Newton-Schulz), after they were divided by the root of the sum of their squares."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.float().mT if is_tall else matrix.float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
