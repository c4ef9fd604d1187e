"""Optimizers: torch's arithmetic, decay on matrices only, Muon on hidden matrices only, state by name."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm.checkpoint.manager import CheckpointManager
from fundamentallm.checkpoint.optimizer_state import NamedOptimizerState
from fundamentallm.config.schema import ModelConfig
from fundamentallm.errors import CheckpointError, ConfigError
from fundamentallm.models.transformer import Transformer
from fundamentallm.training.muon import Muon, orthogonalize
from fundamentallm.training.optimizers import check_optimizer, create_optimizer
from fundamentallm.training.schedulers import create_scheduler
from tests.conftest import problem_of

KINDS = ("adamw", "adam", "sgd", "muon")
BETAS = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}


class Tiny(nn.Module):
    """Embedding, two hidden matrices (one wide, one tall), a norm, a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Embedding(11, 4)
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 4, bias=False)
        self.head = nn.Linear(4, 11, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if tied:
            self.head.weight = self.table.weight


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *seeds: int) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def names_in(model: nn.Module, group: dict[str, Any]) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def reference_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


REFERENCES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "adamw": (BETAS, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "adam": (BETAS, torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "sgd": ({"momentum": 0.7}, torch.optim.SGD, {"momentum": 0.7}),
    "torch.optim:Adagrad": ({"lr_decay": 0.5}, torch.optim.Adagrad, {"lr_decay": 0.5}),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_steps_equal_those_of_torch_with_decay_on_matrices_only(kind: str) -> None:
    options, reference, settings = REFERENCES[kind]
    ours, theirs = Tiny(), Tiny()
    optimizer = create_optimizer(ours, kind, 0.01, 0.1, **options)
    assert type(optimizer) is reference
    assert all(group.get("fused") for group in optimizer.param_groups) == (":" not in kind)
    step(ours, optimizer, 1, 2, 3)
    step(theirs, reference(reference_groups(theirs), lr=0.01, foreach=False, **settings), 1, 2, 3)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=1e-7)


def test_create_optimizer_lists_all_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        create_optimizer(Tiny(), "sgd", math.nan, -1.0, adam_beta1=1.0)
    rate, decay, beta = caught.value.problems
    assert (rate, decay.allowed) == ("learning_rate is nan; allowed: greater than 0.", "at least 0")
    assert (beta.setting, beta.allowed) == ("adam_beta1", "at least 0 and less than 1")


def test_create_optimizer_refuses_unknown_options_and_frozen_models() -> None:
    unknown = problem_of(create_optimizer, Tiny(), "sgd", 0.1, nesterov=True)
    assert (unknown.setting, unknown.value) == ("optimizer_options", {"nesterov": True})
    assert "adam_beta1" in unknown.allowed
    frozen = problem_of(create_optimizer, Tiny().requires_grad_(False), "muon", 0.1)
    assert "empty parameter list" in frozen.reason
    assert "bogus" in problem_of(create_optimizer, Tiny(), "torch.optim:Adagrad", 0.1, bogus=1).reason


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32), (3, 24, 8), (2, 3, 8, 24), (1, 5), (5, 1)])
def test_orthogonalized_matrices_keep_their_directions_at_length_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape
    lengths = torch.linalg.svdvals(result)
    assert lengths.min() > 0.3
    assert lengths.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ result @ right.mT
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-4)
    assert (inside.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert not orthogonalize(torch.zeros(shape)).any()


def test_muon_steps_equal_those_of_torch_within_bfloat16() -> None:
    """Torch's takes one matrix at a time, ours those of one shape together."""
    generator = torch.Generator().manual_seed(0)
    shapes = (48, 16), (16, 48), (32, 32), (48, 16)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    optimizers = (
        Muon([{"params": ours, "weight_decay": 0.1, "muon": True}], lr=0.05, momentum=0.9, fused=True),
        torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - other).norm() < 0.02 * (other - before).norm()
        assert torch.equal(optimizers[0].state[one]["momentum_buffer"], optimizers[1].state[other]["momentum_buffer"])


def test_muon_steps_other_parameters_as_adamw_at_their_own_rate() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizers = [
        create_optimizer(ours, "muon", 0.01, 0.1, adam_learning_rate=0.03, **BETAS),
        create_optimizer(theirs, "adamw", 0.03, 0.1, **BETAS),
    ]
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        schedule = create_scheduler(optimizer, "linear", 1, 5)
        for seed in (1, 2, 3):
            step(model, optimizer, seed)
            schedule.step()
    same = {name for name, value in weights(ours).items() if torch.equal(value, weights(theirs)[name])}
    assert same == set(weights(ours)) - {"up.weight", "down.weight"}
    assert {group["initial_lr"] for group in optimizers[0].param_groups if group["muon"]} == {0.01}


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_hidden_matrices_and_nothing_else(tied: bool) -> None:
    shape = ModelConfig(vocab_size=11, d_model=8, num_heads=2, num_layers=2, tie_embeddings=tied, d_ff=16)
    for model in (Tiny(tied), Transformer(shape)):
        optimizer = create_optimizer(model, "muon", 0.01)
        taken = set().union(*(names_in(model, group) for group in optimizer.param_groups if group["muon"]))
        outside = ("table", "head", "model.embed_tokens", "lm_head")
        assert taken == {n for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(outside)}
        covered = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(covered) == sorted(map(id, model.parameters()))


def test_muon_leaves_out_a_known_output_projection_and_a_tied_layer() -> None:
    model = Tiny(tied=True)
    model.get_output_embeddings = lambda: model.up
    optimizer = create_optimizer(model, "muon", 0.01)
    taken = [names_in(model, group) for group in optimizer.param_groups if group["muon"]]
    assert taken == [{"down.weight"}]


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = NamedOptimizerState(model, optimizer).state_dict()["state"]
    flat = {f"{name}.{key}": value.clone() for name, entry in state.items() for key, value in entry.items()}
    return flat | weights(model)


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_a_first_step_with_found_inf_is_as_if_it_had_not_been(kind: str) -> None:
    skipped, fresh = Tiny(), Tiny()
    optimizers = [create_optimizer(model, kind, 0.01, 0.1) for model in (skipped, fresh)]
    # Freed memory that is not zero: state that is allocated and not written would be seen.
    garbage = [torch.full_like(p, 7.0) for p in skipped.parameters() for _ in range(4)]
    give_gradients(skipped, 1)
    del garbage
    optimizers[0].found_inf = torch.tensor(1.0)
    optimizers[0].step()
    optimizers[0].found_inf = torch.tensor(0.0)
    step(skipped, optimizers[0], 2, 3)
    step(fresh, optimizers[1], 2, 3)
    torch.testing.assert_close(weights(skipped), weights(fresh), rtol=1e-6, atol=1e-7)


def test_a_copy_of_muon_steps_as_the_original() -> None:
    model = Tiny()
    optimizer = create_optimizer(model, "muon", 0.01, 0.1)
    step(model, optimizer, 1)
    copied, copy_of_optimizer = copy.deepcopy((model, optimizer))
    step(model, optimizer, 2)
    step(copied, copy_of_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


def test_muon_divides_gradients_by_the_scale() -> None:
    scaled, plain = Tiny(), Tiny()
    optimizers = [create_optimizer(model, "muon", 0.01, 0.1) for model in (scaled, plain)]
    give_gradients(scaled, 1)
    for parameter in scaled.parameters():
        parameter.grad *= 1024
    optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    optimizers[0].step()
    step(plain, optimizers[1], 1)
    # Both updates are blind to the scale; the moments are not.
    torch.testing.assert_close(snapshot(scaled, optimizers[0]), snapshot(plain, optimizers[1]), rtol=1e-6, atol=1e-7)


def stored(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Any) -> dict[str, Any]:
    """The state as a restart reads it."""
    manager = CheckpointManager(folder)
    return manager.load(manager.save(NamedOptimizerState(model, optimizer).state_dict()))


def test_a_step_count_that_was_saved_as_shared_is_counted_once(tmp_path: Any) -> None:
    """Earlier versions of the package kept one tensor for parameters that had taken as many steps."""
    model, again = Tiny(), Tiny()
    optimizer = create_optimizer(model, "adamw", 0.01)
    step(model, optimizer, 1, 2)
    shared = torch.tensor(2.0)
    for state in optimizer.state.values():
        state["step"] = shared
    restored = create_optimizer(again, "adamw", 0.01)
    NamedOptimizerState(again, restored).load_state_dict(stored(model, optimizer, tmp_path))
    step(again, restored, 3)
    assert {float(state["step"]) for state in restored.state.values()} == {3.0}


def test_the_state_fits_groups_in_another_order(tmp_path: Any) -> None:
    model, again = Tiny(), Tiny()
    optimizer = create_optimizer(model, "adamw", 0.01)
    step(model, optimizer, 1, 2)
    parameters = list(again.parameters())[::-1]
    regrouped = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.5)
    NamedOptimizerState(again, regrouped).load_state_dict(stored(model, optimizer, tmp_path))
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], regrouped.state[q]["exp_avg"]), name
    assert {group["lr"] for group in regrouped.param_groups} == {0.5}


def test_the_state_of_a_run_with_an_unused_parameter_fits_the_same_run(tmp_path: Any) -> None:
    model = Tiny()
    optimizer = create_optimizer(model, "adamw", 0.01)
    give_gradients(model, 1)
    model.down.weight.grad = None
    optimizer.step()
    again = Tiny()
    restored = create_optimizer(again, "adamw", 0.01)
    NamedOptimizerState(again, restored).load_state_dict(stored(model, optimizer, tmp_path))
    assert torch.equal(restored.state[again.up.weight]["exp_avg"], optimizer.state[model.up.weight]["exp_avg"])


def test_state_of_another_optimizer_or_model_is_refused_by_name() -> None:
    model, again = Tiny(), Tiny()
    optimizer = create_optimizer(model, "adamw", 0.01)
    step(model, optimizer, 1)
    saved = NamedOptimizerState(model, optimizer).state_dict()

    def refusal(kind: str = "adamw") -> str:
        state = NamedOptimizerState(again, create_optimizer(again, kind, 0.01))
        with pytest.raises(CheckpointError) as caught:
            state.load_state_dict(saved)
        assert not any(state.state_dict()["state"].values())
        return str(caught.value)

    message = refusal("sgd")
    assert "AdamW" in message
    assert "SGD" in message
    saved["state"]["norm.bias"]["exp_avg"] = torch.zeros(7)
    assert "exp_avg of norm.bias" in refusal()
    saved["state"]["up.wheel"] = saved["state"].pop("up.weight")
    message = refusal()
    assert "up.wheel" in message
    assert "up.weight" in message


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.arange(12.0).reshape(3, 4).t(),
    "channels last": lambda: torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "slice": lambda: torch.arange(20.0).reshape(4, 5)[:, :3],
}


class OneParameter(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def give_gradient(self, seed: int) -> None:
        """By a backward pass, which chooses the gradient's layout."""
        self.weight.grad = None
        coefficients = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed))
        (self.weight * coefficients).sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, "torch.optim:Adagrad"])
def test_any_memory_layout_trains_and_resumes_alike(kind: str, layout: str, tmp_path: Any) -> None:
    """As a contiguous parameter, with and without a resume after two steps, also of the contiguous one's state."""
    options = {"fused": True} if kind == "torch.optim:Adagrad" and layout != "slice" else {}
    plain, strided, resumed, other = models = [OneParameter(LAYOUTS[layout]()) for _ in range(4)]
    plain.weight.data = plain.weight.data.contiguous()
    optimizers = [create_optimizer(model, kind, 0.1, **options) for model in models]
    for seed in (1, 2, 3, 4):
        if seed == 3:
            for index, source in ((2, 1), (3, 0)):
                models[index].load_state_dict(models[source].state_dict())
                saved = stored(models[source], optimizers[source], tmp_path)
                NamedOptimizerState(models[index], optimizers[index]).load_state_dict(saved)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.give_gradient(seed)
            optimizer.step()
    assert strided.weight.stride() == LAYOUTS[layout]().stride()
    for model in (strided, other):
        torch.testing.assert_close(model.weight, plain.weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(resumed.weight, strided.weight)


def test_check_optimizer_names_a_slice_that_a_fused_optimizer_trains() -> None:
    model = OneParameter(torch.ones(4, 5)[:, :3])
    with pytest.raises(ConfigError, match="weight"):
        check_optimizer(model, torch.optim.AdamW(model.parameters(), fused=True))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
class Counting(torch.optim.SGD):
    """Keeps what it needs in its groups, in integers, in lists and beside the parameters, as optimizers do."""

    def __init__(self, params: Any, lr: float, gain: float = 1.0) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(count=0, gain=gain, rule="plain")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", torch.zeros((), dtype=torch.int64)) + 1
                state["exp_avg_sq"], state["rule"] = p.grad.square().mean(0), "plain"
                state["bases"] = [torch.linalg.qr(p.grad.reshape(len(p), -1)).Q]
                p.data.sub_(p.grad, alpha=group["lr"] * group["gain"] / group["count"])
        self.state["all"] = {7: self.param_groups[0]["count"]}


def test_state_outside_of_tensors_and_shapes_survives(tmp_path: Any) -> None:
    """A resumed run takes the count from the checkpoint, and the gain from its config."""
    model, again = Tiny(), Tiny()
    optimizer, restored = Counting(model.parameters(), 0.1), Counting(again.parameters(), 0.1, gain=3.0)
    named = NamedOptimizerState(model, optimizer)
    step(model, optimizer, 1, 2)
    saved = CheckpointManager(tmp_path)
    NamedOptimizerState(again, restored).load_state_dict(saved.load(saved.save(named.state_dict())))
    (group,) = restored.param_groups
    assert (group["count"], group["gain"], group["rule"]) == (2, 3.0, "plain")
    assert restored.state["all"] == {7: 2}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        before, after = optimizer.state[p], restored.state[q]
        assert after.pop("rule") == before.pop("rule")
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert after["seen"].dtype == torch.int64
        assert p.ndim < 2 or after["bases"][0].stride() == before["bases"][0].stride()


def test_state_of_a_parameter_that_the_model_lacks_is_refused() -> None:
    optimizer = torch.optim.AdamW([*Tiny().parameters()])
    with pytest.raises(CheckpointError, match="not the model's"):
        NamedOptimizerState(Tiny(), optimizer).state_dict()
