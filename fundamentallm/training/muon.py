"""The Muon optimizer."""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from fundamentallm.distributed.dtensor import is_sharded


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Returns nearly the nearest semi-orthogonal matrices to (..., M, N): singular values end between 0.5 and 1.5.

    Newton-Schulz iteration (Jordan et al., kellerjordan.github.io/posts/muon). In bfloat16 on accelerators
    as published; in float32 on CPUs, most of which emulate bfloat16 at a twentieth of the speed.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.reshape(-1, *x.shape[-2:])  # baddbmm takes one batch dimension: product, scaling and sum in one kernel
    is_wide = x.shape[-2] <= x.shape[-1]  # the smaller Gram matrix is the cheaper one
    x = x if is_wide else x.mT.contiguous()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = x.baddbmm(gram.baddbmm(gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if is_wide else x.mT).reshape(matrices.shape)


def _orthogonalize_all(matrices: Tensor) -> Tensor:
    """Orthogonalize (B, M, N) matrices."""
    if not is_sharded(matrices):
        return orthogonalize(matrices)
    # By rows (FSDP2): each process takes some of the B whole. DTensor's products would gather their operands each time.
    from torch.distributed.tensor import DTensor, Shard  # half a second, needed under FSDP2 only

    assert isinstance(matrices, DTensor)
    mesh, by_rows = matrices.device_mesh, matrices.placements
    by_matrices = [placement if placement.is_replicate() else Shard(0) for placement in by_rows]
    mine = orthogonalize(matrices.redistribute(mesh, by_matrices).to_local())
    whole = DTensor.from_local(mine, mesh, by_matrices, run_check=False, shape=matrices.shape, stride=matrices.stride())
    return whole.redistribute(mesh, by_rows)


class Muon(Optimizer):
    """Muon for the groups with `muon: True`, AdamW for the others: one optimizer, one state, one schedule.

    The update of a matrix is its Nesterov momentum, orthogonalized, times 0.2 sqrt(max(rows, columns)). Its root mean
    square is that of AdamW's updates, so one learning rate and one decay serve both (Liu et al., arXiv:2502.16982).
    `torch.optim.Muon` takes one matrix at a time; here matrices of one shape go through one batched product. If it is
    `fused`, it divides gradients by `grad_scale` and skips the step if `found_inf` is 1, as torch's optimizers do.
    `adam`: betas and eps of AdamW.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    # torch's flag, by which GradScaler finds optimizers that unscale by themselves.
    _step_supports_amp_scaling = property(lambda self: self.defaults["fused"])

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float, fused: bool, **adam: Any) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "fused": fused, **adam})

    @cached_property  # so that a copy, which torch makes of state and groups only, makes its own
    def _adamw(self) -> Any:
        return AdamW([{"params": []}], fused=self.defaults["fused"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step. No closure is called."""
        adamw, others = self._adamw, [group for group in self.param_groups if not group["muon"]]
        for group in [group for group in self.param_groups if group["muon"]]:
            self._step_matrices(group)
        adamw.state, adamw.param_groups = self.state, [adamw.defaults | group for group in others]
        adamw.grad_scale, adamw.found_inf = self.grad_scale, self.found_inf
        adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        lr, beta = group["lr"], group["momentum"]
        taken: Tensor | float = 1.0 if self.found_inf is None else 1 - self.found_inf
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in [p for p in group["params"] if p.grad is not None]:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = self.state[p]["momentum_buffer"]
            gradient = p.grad if self.grad_scale is None else p.grad / self.grad_scale
            if self.found_inf is not None:
                gradient = gradient.where(self.found_inf == 0, 0.0)  # NaN times 0 is NaN
            buffer.lerp_(gradient, (1 - beta) * taken)  # a weight of 0 keeps the buffer bit-identical
            by_shape[p.shape].append((p, gradient.lerp(buffer, beta)))
        for (rows, columns), pairs in by_shape.items():
            size = -lr * 0.2 * math.sqrt(max(rows, columns)) * taken
            updates = _orthogonalize_all(torch.stack([momentum for _, momentum in pairs])).mul_(size)
            for (p, _), update in zip(pairs, updates.unbind(), strict=True):
                p.mul_(1 - lr * group["weight_decay"] * taken).add_(update)
            del updates, update  # before the next stack is made
