"""Losses: float32 sums over the targets that count, each against its formula in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm.config.schema import CHUNK, IGNORE_INDEX, ModelConfig
from fundamentallm.models.transformer import Transformer
from fundamentallm.models.with_loss import ModelWithLoss
from fundamentallm.training.loss import LOSSES, create_loss
from tests.conftest import problem_of


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return logits.exp().sum().log() - logits[target]


def label_smoothing(smoothing: float) -> Callable[[Tensor, int], Tensor]:
    def loss(logits: Tensor, target: int) -> Tensor:
        wanted = torch.full_like(logits, smoothing / len(logits))
        wanted[target] += 1 - smoothing
        return -(wanted * torch.log(logits.exp() / logits.exp().sum())).sum()

    return loss


def focal(gamma: float) -> Callable[[Tensor, int], Tensor]:
    def loss(logits: Tensor, target: int) -> Tensor:
        p = logits.exp()[target] / logits.exp().sum()
        return -((1 - p) ** gamma) * p.log()

    return loss


def z_loss(weight: float) -> Callable[[Tensor, int], Tensor]:
    return lambda logits, target: cross_entropy(logits, target) + weight * logits.exp().sum().log() ** 2


FORMS: list[tuple[str, dict[str, Any], Callable[[Tensor, int], Tensor]]] = [
    ("cross_entropy", {}, cross_entropy),
    ("label_smoothing", {}, label_smoothing(0.1)),
    ("label_smoothing", {"smoothing": 1.0}, label_smoothing(1.0)),
    ("focal", {}, focal(2.0)),
    ("focal", {"gamma": 0.5}, focal(0.5)),
    ("z_loss", {}, z_loss(1e-4)),
]
EACH = pytest.mark.parametrize(("name", "options", "form"), FORMS)
assert {name for name, _, _ in FORMS} == set(LOSSES)


def batch(rows: int = 3, length: int = 5, vocabulary: int = 7) -> tuple[Tensor, Tensor]:
    """Logits and targets of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(rows, length, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows, length), generator=generator)
    targets[0, 1], targets[2, 3:] = IGNORE_INDEX, IGNORE_INDEX
    return logits.requires_grad_(), targets


def expected_sum(form: Callable[[Tensor, int], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    pairs = zip(logits.double().flatten(0, -2), targets.flatten().tolist(), strict=True)
    return torch.stack([form(row, target) for row, target in pairs if target != IGNORE_INDEX]).sum()


def value_and_gradient(loss: nn.Module, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, targets)
    (gradient,) = torch.autograd.grad(value, logits)
    return value, gradient


@EACH
def test_value_and_gradient_are_those_of_the_formula_summed(name: str, options: Any, form: Any) -> None:
    logits, targets = batch()
    value, gradient = value_and_gradient(create_loss(name, **options), logits, targets)
    reference = expected_sum(form, logits, targets)
    (expected,) = torch.autograd.grad(reference, logits)
    assert value.shape == ()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-5, atol=1e-6)
    halves = logits.detach().bfloat16()
    value = create_loss(name, **options)(halves, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected_sum(form, halves, targets), rtol=1e-6, atol=1e-6)


@EACH
def test_without_targets_or_with_certain_predictions_gradients_are_finite(name: str, options: Any, form: Any) -> None:
    logits, targets = batch()
    value, gradient = value_and_gradient(create_loss(name, **options), logits, targets.fill_(IGNORE_INDEX))
    assert value.item() == 0.0
    assert not gradient.any()  # nor NaN
    logits = torch.tensor([[120.0, 0.0, 0.0], [0.0, 120.0, 0.0]], requires_grad=True)
    value, gradient = value_and_gradient(create_loss(name, **options), logits, torch.tensor([0, 2]))
    assert value.isfinite()
    assert gradient.isfinite().all()


@EACH
def test_in_evaluation_mode_all_are_cross_entropy(name: str, options: Any, form: Any) -> None:
    logits, targets = batch()
    torch.testing.assert_close(
        create_loss(name, **options).eval()(logits, targets).double(),
        expected_sum(cross_entropy, logits, targets),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("name", "options", "setting", "fact"),
    [
        ("label_smoothing", {"smoothing": 1.1}, "loss_options.smoothing", "at most 1"),
        ("focal", {"gamma": math.inf}, "loss_options.gamma", "at least 0"),
        ("z_loss", {"weight": None}, "loss_options.weight", "at least 0"),
        ("focal", {"alpha": 0.5}, "loss_options", "gamma"),
        ("cross_entropy", {"gamma": 0.5}, "loss_options", "none"),
        ("focla", {}, "loss", "'focal'"),
        ("torch.nn:Nothing", {}, "loss", "'torch.nn:Nothing'"),
    ],
)
def test_create_loss_refuses_a_wrong_name_or_option(name: str, options: Any, setting: str, fact: str) -> None:
    problem = problem_of(create_loss, name, **options)
    assert problem.setting == setting
    assert fact in problem


# ---- a large vocabulary --------------------------------------------------------------------------------------------


def head(vocabulary: int = 1500, tokens: int = 1300) -> tuple[Tensor, Tensor, Tensor]:
    """What a head gets, its weights, and targets of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens // 2, 16, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 16, generator=generator).requires_grad_()
    targets = torch.randint(vocabulary, (2, tokens // 2), generator=generator)
    targets[:, ::5] = IGNORE_INDEX
    return hidden, weight, targets


def largest_and_gradients(loss: Callable[[], Tensor], *parameters: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """Elements of the largest tensor made on the way, the loss, and its gradients."""
    sizes = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            sizes.extend(value.numel() for value in pytree.tree_leaves(made) if isinstance(value, Tensor))
            return made

    with Sizes():
        value = loss()
        value.backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return max(sizes), value.detach(), gradients


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_a_large_vocabulary_are_made_a_chunk_at_a_time(name: str, precision: torch.dtype) -> None:
    hidden, weight, targets = head()
    loss_fn = create_loss(name)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        whole = largest_and_gradients(lambda: loss_fn(F.linear(hidden, weight), targets), hidden, weight)
        chunks = largest_and_gradients(lambda: loss_fn.of_hidden(hidden, weight, targets), hidden, weight)
        with torch.no_grad():
            valued = loss_fn.of_hidden(hidden, weight, targets)
    assert whole[0] == 1300 * 1500
    assert chunks[0] <= CHUNK * 1500  # torch's fused kernel shows none of its own
    near = {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(chunks[1], whole[1], **near)
    torch.testing.assert_close(valued, whole[1], **near)
    for one, other in zip(chunks[2], whole[2], strict=True):
        assert (one - other).norm() <= (1e-6 if precision == torch.float32 else 5e-3) * other.norm()


def test_the_transformer_and_its_loss_meet_at_the_head() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(1500, d_model=16, num_heads=2, num_layers=1, tie_embeddings=True))
    ids, targets = torch.randint(1500, (2, 2, 400)).unbind()
    loss_fn = create_loss()
    both = ModelWithLoss(model, loss_fn)
    whole = largest_and_gradients(lambda: loss_fn(model(ids), targets), *model.parameters())
    chunks = largest_and_gradients(lambda: both((ids, targets)), *model.parameters())
    assert (whole[0], chunks[0] <= CHUNK * 1500) == (800 * 1500, True)
    torch.testing.assert_close(chunks[1], whole[1], rtol=1e-5, atol=0.0)
    for one, other in zip(chunks[2], whole[2], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
