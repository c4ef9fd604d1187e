"""The Muon optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fundamentallm.config.schema import TrainingConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration (Jordan et al., kellerjordan.github.io/posts/muon)."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to (..., M, N), roughly: singular values end between 0.5 and 1.5.

    Newton-Schulz iteration (Jordan et al., kellerjordan.github.io/posts/muon). In bfloat16 on accelerators
    as published; in float32 on CPUs, most of which emulate bfloat16 at a twentieth of the speed.
    """
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    x = x.reshape(-1, *x.shape[-2:])  # one batch, which baddbmm takes: product, scaling and sum in one kernel
    wide = x.shape[-2] <= x.shape[-1]  # the smaller Gram matrix is the cheaper one
    x = x if wide else x.mT.contiguous()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = x.baddbmm(gram.baddbmm(gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(matrices.shape)


def _orthogonalize_all(matrices: Tensor) -> Tensor:
    """`orthogonalize`; where (B, M, N) `matrices` are sharded by rows (FSDP2), each process takes some of the B whole.

    Left to DTensor, every product would gather what it needs of both sides.
    """
    if not hasattr(matrices, "device_mesh"):
        return orthogonalize(matrices)
    from torch.distributed.tensor import DTensor, Shard  # loaded where there are any, else half a second

    assert isinstance(matrices, DTensor)
    mesh, by_rows = matrices.device_mesh, matrices.placements
    by_matrices = [placement if placement.is_replicate() else Shard(0) for placement in by_rows]
    mine = orthogonalize(matrices.redistribute(mesh, by_matrices).to_local())
    whole = DTensor.from_local(mine, mesh, by_matrices, run_check=False, shape=matrices.shape, stride=matrices.stride())
    return whole.redistribute(mesh, by_rows)


class _ByGroup(Optimizer):
    """Steps group by group, on what torch's fused kernels get from GradScaler: `grad_scale`, by which a gradient is
    divided, and `found_inf`, a scalar that is 1 where the step is none.
    """

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper around every optimizer's step, where somebody looks: a profiler, or a hook.

        Half of a step of small tensors was the range that it opens for a profiler, whether there is one or not.
        """
        watched = Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            hooks = hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks
            return (watched if hooks or profiler._is_profiler_enabled else func)(self, *args, **kwargs)

        return step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `found_inf` and `grad_scale` are attributes, as GradScaler sets them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._step_group(group, parameters, grad_scale, found_inf)
        return loss

    def _step_group(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """The step of the parameters of a group that have gradients."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            if group["fused"]:  # torch's other kernels count in each tensor
                _share_counts(group, self.state)


class AdamW(_ByGroup, torch.optim.AdamW):
    """torch's AdamW, going straight to its fused kernel.

    Over 25 small tensors the kernel took 23 of the 120 microseconds of torch's own step, and of 161 where it may have
    to skip: each parameter counts its steps in a tensor of its own there. Here those that step together share one.
    """

    def _step_group(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        _fused_adamw(group, parameters, self.state, grad_scale, found_inf)


def _share_counts(group: dict[str, Any], state: dict[Tensor, Any]) -> None:
    """Give the parameters of a group one tensor for equal numbers of steps, as they have it who began together."""
    counts: dict[float, Tensor] = {}
    for entry in (state[p] for p in group["params"] if "step" in state.get(p, {})):
        entry["step"] = counts.setdefault(float(entry["step"]), entry["step"])


def _fused_adamw(
    group: dict[str, Any],
    parameters: list[Tensor],
    state: dict[Tensor, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """AdamW's step of one group by torch's fused kernel."""
    states = [state[p] for p in parameters]
    if not all(states):
        begun = torch.zeros((), device=parameters[0].device)
        for p, entry in zip(parameters, states, strict=True):
            if not entry:
                entry.update(step=begun, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    # Those of a group that have been without a gradient at times have taken fewer steps.
    counts = {id(entry["step"]): entry["step"] for entry in states}
    taken = 1 if found_inf is None else 1 - found_inf
    counts = {key: count + taken for key, count in counts.items()}
    for entry in states:
        entry["step"] = counts[id(entry["step"])]
    torch._fused_adamw_(
        parameters,
        [p.grad for p in parameters if p.grad is not None],
        [entry["exp_avg"] for entry in states],
        [entry["exp_avg_sq"] for entry in states],
        [],
        [entry["step"] for entry in states],
        amsgrad=False,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )


def _update_alike(pairs: list[tuple[Tensor, Tensor]], size: Tensor | float, kept: Tensor | float) -> None:
    """Update (parameter, momentum) of one shape; a function, so that its stack is gone before the next is made."""
    updates = _orthogonalize_all(torch.stack([momentum for _, momentum in pairs])).mul_(size)
    for (p, _), update in zip(pairs, updates.unbind(), strict=True):
        p.mul_(kept).add_(update)


class Muon(_ByGroup):
    """Muon for the groups with `muon: True`, AdamW for the others: one optimizer, one state, one schedule.

    The update of a matrix is its Nesterov momentum, orthogonalised, times 0.2 sqrt(max(rows, columns)): the
    root mean square of AdamW's updates, so that one learning rate and one decay serve both (Liu et al.,
    arXiv:2502.16982). `torch.optim.Muon` is not used, since it orthogonalises in bfloat16 on every device and
    one matrix at a time; here matrices of one shape go through one batched product.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = TrainingConfig.muon_momentum,
        fused: bool = False,
    ) -> None:
        # torch's name for "skips by itself where `found_inf` is set", for GradScaler and for the trainer.
        self._step_supports_amp_scaling = True
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum, "fused": fused})

    def _step_group(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if group["muon"]:
            self._muon(group, parameters, grad_scale, found_inf)
        elif group["fused"]:
            _fused_adamw(group, parameters, self.state, grad_scale, found_inf)
        else:
            self._adamw(group, parameters, grad_scale, found_inf)

    def _muon(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        lr, beta = group["lr"], group["momentum"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffer = state["momentum_buffer"]
            assert p.grad is not None  # chosen so by `step`
            gradient = p.grad if grad_scale is None else p.grad / grad_scale
            if found_inf is None:
                buffer.lerp_(gradient, 1 - beta)
            else:  # a weight of 0 leaves the buffer as it is, to the bit
                gradient = gradient.where(found_inf == 0, 0.0)
                buffer.lerp_(gradient, (1 - beta) * (1 - found_inf))
            by_shape[p.shape].append((p, gradient.lerp(buffer, beta)))
        alive = 1.0 if found_inf is None else 1 - found_inf
        for (rows, columns), pairs in by_shape.items():
            size = -lr * 0.2 * math.sqrt(max(rows, columns)) * alive
            _update_alike(pairs, size, 1 - lr * group["weight_decay"] * alive)

    def _adamw(
        self, group: dict[str, Any], parameters: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        if found_inf is not None and found_inf.item():
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if grad_scale is not None:
            gradients = [gradient / grad_scale for gradient in gradients]
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
