"""Helpers for tensors that may be sharded."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import get_total_norm

from fundamentallm.distributed.dtensor import total_norm


@pytest.mark.parametrize("dtypes", [[], [torch.float32], [torch.float32] * 3, [torch.float32, torch.bfloat16]])
def test_total_norm_of_full_tensors_is_torchs(dtypes: list[torch.dtype]) -> None:
    tensors = [torch.full((2, 3 + i), 1.5 + i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    assert torch.equal(total_norm(tensors), get_total_norm(tensors))
