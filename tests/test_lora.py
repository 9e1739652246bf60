"""LoRA starts as the identity, touches only its targets, learns only A and B, and merges without a
trace."""

import pytest
import torch
from torch import nn

from diffa2_mini.llada import Llada
from diffa2_mini.lora import LoraLinear, add_lora, merge_lora
from diffa2_mini.training.objective import set_dropout


@pytest.fixture
def llada(config):
    return Llada(config.llada).requires_grad_(False).eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 12)


def trained(llada, config):
    """Give `llada` a LoRA whose B is no longer zero."""
    add_lora(llada, config.lora)
    for name, parameter in llada.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return llada


def lora_layers(llada):
    return {
        name: module
        for name, module in llada.named_modules()
        if isinstance(module, LoraLinear)}


def test_lora_starts_as_the_identity(llada, config, x):
    before = llada(x)
    add_lora(llada, config.lora)
    assert torch.equal(llada(x), before)


def test_a_layer_adds_alpha_over_r_times_b_a(config):
    layer = LoraLinear(nn.Linear(6, 4, bias=False), config.lora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    expected = x @ layer.weight.T + 4.0 / 2 * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)


def test_a_starts_kaiming_uniform_and_b_zero(config):
    layer = LoraLinear(nn.Linear(100, 4, bias=False), config.lora)
    assert layer.lora_A.shape == (2, 100) and layer.lora_B.shape == (4, 2)
    assert 0.08 < layer.lora_A.abs().max() <= 0.1  # 1 / sqrt(in)
    assert not layer.lora_B.any()


def test_only_the_targets_are_replaced(llada, config):
    add_lora(llada, config.lora)
    targets = {"q_proj", "k_proj", "v_proj", "ff_proj", "up_proj"}
    assert set(lora_layers(llada)) == {f"blocks.{i}.{name}" for i in range(2) for name in targets}


def test_base_weights_keep_their_names_and_storage(llada, config):
    before = dict(llada.named_parameters())
    add_lora(llada, config.lora)
    after = {name: p for name, p in llada.named_parameters() if "lora_" not in name}
    assert before.keys() == after.keys()
    assert all(after[name] is before[name] for name in before)


def test_adding_again_changes_nothing(llada, config, x):
    trained(llada, config)
    before, names = llada(x), list(llada.state_dict())
    add_lora(llada, config.lora)
    assert torch.equal(llada(x), before) and list(llada.state_dict()) == names


def test_merging_is_exact_and_leaves_plain_layers(llada, config, x):
    names = set(llada.state_dict())
    plain = llada(x)
    before = trained(llada, config)(x)
    merge_lora(llada)
    assert (llada(x) - before).abs().max() <= 1e-6
    assert (before - plain).abs().max() > 0.01
    assert set(llada.state_dict()) == names and not lora_layers(llada)


def test_merging_keeps_the_weights_dtype(config):
    layer = LoraLinear(nn.Linear(6, 4, bias=False).bfloat16(), config.lora)
    nn.init.normal_(layer.lora_B)
    # trained in float32 beside a bfloat16 backbone
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    expected = (layer.weight.float() + 2 * layer.lora_B @ layer.lora_A).bfloat16()
    assert torch.equal(layer.merged().weight, expected)


@pytest.mark.parametrize("p, training, changes",
                         [(0.5, True, True), (0.5, False, False), (0.0, True, False)])
def test_dropout_acts_in_training_mode_alone(llada, config, x, p, training, changes):
    before = trained(llada, config)(x)
    set_dropout(llada, p)
    assert torch.equal(llada.train(training)(x), before) != changes


def test_dropout_drops_the_input_of_a_and_not_of_the_base(config):
    layer = LoraLinear(nn.Linear(6, 4, bias=False), config.lora)
    nn.init.normal_(layer.lora_B)
    set_dropout(layer, 1.0)
    x = torch.randn(3, 6)
    assert torch.equal(layer.train()(x), x @ layer.weight.T)


def test_gradient_reaches_a_and_b_and_nothing_else(llada, config, x):
    trained(llada, config)(x).square().sum().backward()
    with_grad = {
        name
        for name, p in llada.named_parameters()
        if p.grad is not None and p.grad.any()}
    assert with_grad == {name for name, _ in llada.named_parameters() if "lora_" in name}


def test_at_the_start_only_b_has_a_gradient(llada, config, x):
    add_lora(llada, config.lora)
    llada(x).square().sum().backward()
    for layer in lora_layers(llada).values():
        assert layer.lora_B.grad.any() and not layer.lora_A.grad.any()
