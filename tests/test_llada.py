"""The mask predictor against its formulas in float64: attention both ways, and never to padding."""

import pytest
import torch
from torch import nn

from diffa2_mini.llada import Block, Llada, RMSNorm, rotary, rotate


def naive_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_rotate(x, theta):
    """x [S, width]: pair (x_i, x_{i + width/2}) as a complex number, turned by position *
    theta^(-2i / width)."""
    S, width = x.shape
    rates = theta ** -(2 * torch.arange(width // 2).double() / width)
    turn = torch.polar(torch.ones(S, width // 2).double(),
                       torch.arange(S).double()[:, None] * rates)
    z = torch.complex(x[:, :width // 2], x[:, width // 2:]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


def naive_block(block, x, config):
    """One sequence x [S, D], head by head, every query over every key."""
    w = {name: parameter.double() for name, parameter in block.named_parameters()}
    h, heads = naive_norm(x, w["attn_norm.weight"], config.norm_eps), []
    q, k, v = (h @ w[f"{name}_proj.weight"].T for name in "qkv")
    size = config.width // config.n_heads
    for head in range(config.n_heads):
        at = slice(head * size, (head + 1) * size)
        scores = naive_rotate(q[:, at], config.rope_theta) @ naive_rotate(
            k[:, at], config.rope_theta).T / size**0.5
        heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, at])
    x = x + torch.cat(heads, dim=-1) @ w["attn_out.weight"].T
    h = naive_norm(x, w["ff_norm.weight"], config.norm_eps)
    gate = h @ w["ff_proj.weight"].T
    return x + (gate / (1 + (-gate).exp()) * (h @ w["up_proj.weight"].T)) @ w["ff_out.weight"].T


def test_a_block_equals_the_naive_one(config):
    block = Block(config.llada)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 12)
    ours = block(x, rotary(torch.arange(7), 4, config.llada.rope_theta), None)
    for row, alone in zip(ours, x):
        expected = naive_block(block, alone.double(), config.llada)
        torch.testing.assert_close(row.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm_equals_its_formula(scale):
    norm, x = RMSNorm(12, eps=1e-5), scale * torch.randn(4, 12)
    nn.init.normal_(norm.weight)
    expected = naive_norm(x.double(), norm.weight.double(), 1e-5)
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=1e-5)  # float32


def test_rms_norm_squares_in_float32():
    x = torch.full((1, 8), 1000.0, dtype=torch.float16)  # its square is beyond float16
    assert torch.equal(RMSNorm(8, eps=1e-5).half()(x), torch.ones_like(x))


def test_rotation_equals_its_complex_formula_and_keeps_norms():
    x = torch.randn(1, 1, 50, 8)
    turned = rotate(x, rotary(torch.arange(50), 8, 100.0))
    torch.testing.assert_close(turned[0, 0].double(), naive_rotate(x[0, 0].double(), 100.0),
                               atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[..., 0, :], x[..., 0, :])  # position 0 does not turn


def test_attention_depends_on_relative_distance_alone():
    q, k, rotation = torch.randn(8), torch.randn(8), rotary(torch.arange(20), 8, 100.0)
    scores = rotate(q.expand(1, 1, 20, 8), rotation)[0, 0] @ rotate(
        k.expand(1, 1, 20, 8), rotation)[0, 0].T
    for distance in (-7, 0, 3):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert scores.diagonal(3)[0] != scores.diagonal(-3)[0]  # before is not after


def test_the_first_token_depends_on_the_last_and_the_last_on_the_first(config):
    llada, x = Llada(config.llada), torch.randn(1, 6, 12)
    before = llada(x)
    for changed, seen_by in ((5, 0), (0, 5)):
        other = x.clone()
        other[0, changed] += 1
        assert not torch.allclose(llada(other)[0, seen_by], before[0, seen_by], atol=1e-5)


def test_the_order_of_tokens_matters(config):
    llada, x = Llada(config.llada), torch.randn(1, 6, 12)
    assert not torch.allclose(llada(x).flip(1), llada(x.flip(1)), atol=1e-4)


def test_padding_is_never_attended_to(config):
    llada, x = Llada(config.llada), torch.randn(2, 6, 12)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    x[1, 4:] = 100.0
    hidden = llada(x, valid)
    torch.testing.assert_close(hidden[1, :4], llada(x[1:, :4])[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[0], llada(x[:1])[0], atol=1e-5, rtol=0)
    # without the mask it would be attended to
    assert not torch.allclose(llada(x)[1, :4], hidden[1, :4], atol=1e-3)


def test_names_are_those_of_the_published_weights(config):
    block = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj",
             "ff_out")
    expected = {"wte.weight", "ln_f.weight", "ff_out.weight"}
    expected |= {f"blocks.{i}.{name}.weight" for i in range(2) for name in block}
    assert set(Llada(config.llada).state_dict()) == expected  # so no biases either


def test_the_head_is_untied_and_reads_the_final_norm(config):
    llada, x = Llada(config.llada), torch.randn(1, 6, 12)
    before = llada.logits(llada(x))
    assert before.shape == (1, 6, 23)
    llada.wte.weight.data.zero_()
    assert torch.equal(llada.logits(llada(x)), before)
    llada.ln_f.weight.data.mul_(2)
    torch.testing.assert_close(llada.logits(llada(x)), 2 * before)
