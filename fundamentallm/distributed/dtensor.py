"""Helpers for tensors that may be sharded (DTensor), and for devices."""

import random

import numpy as np
import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, without importing DTensor, which takes half a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Returns the shard of a DTensor that this process holds, or the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full(tensor: Tensor) -> Tensor:
    """Returns the full tensor of a DTensor, gathered from all processes, or the tensor itself if it is not sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_dense(tensor: Tensor) -> bool:
    """Returns whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    tensor = local(tensor)
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def device_name(device: torch.device) -> str:
    """Returns the product name of a CUDA device, or the type of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of the device, and those of numpy and Python."""
    random.seed(seed)  # 5 us
    np.random.seed(seed % 2**32)  # 2 us
    torch.default_generator.manual_seed(seed)  # 1.4 us, and torch.manual_seed 916 us
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
