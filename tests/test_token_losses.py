"""Losses that are made with their gradient equal the plain ones, and autograd's gradient."""

import pytest
import torch
from torch import nn

from diffa2_mini.diffusion import diffusion_loss, token_losses
from diffa2_mini.fast import token_losses as fast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_that_is_made_with_the_loss_is_autograds(dtype, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK", 4)
    head = nn.Linear(5, 30).to(dtype).requires_grad_(False)
    hidden, targets = torch.randn(10, 5, dtype=dtype, requires_grad=True), torch.randint(30, (10, ))
    weight = torch.rand(10)
    ours = fast.token_losses(head)(hidden, targets)
    plain = token_losses(head(hidden), targets)
    torch.testing.assert_close(ours, plain)
    found, wanted = (torch.autograd.grad(losses @ weight, hidden)[0] for losses in (ours, plain))
    some = 8 * torch.finfo(dtype).eps * float(wanted.abs().max())  # terms may cancel, roundings not
    torch.testing.assert_close(found, wanted, atol=some, rtol=0)


def test_the_head_gets_no_gradient_and_neither_it_nor_the_states_are_written_over():
    head, hidden = nn.Linear(5, 30), torch.randn(10, 5, requires_grad=True)
    before = head.weight.clone(), hidden.detach().clone()
    fast.token_losses(head)(hidden, torch.randint(30, (10,))).sum().backward()
    assert head.weight.grad is None and hidden.grad.abs().sum() > 0
    assert torch.equal(head.weight, before[0]) and torch.equal(hidden, before[1])


def test_the_diffusion_loss_is_the_same_from_states_as_from_logits():
    head = nn.Linear(5, 30).requires_grad_(False)
    hidden, response = torch.randn(4, 6, 5), torch.randint(30, (4, 6))
    masked = torch.rand(4, 6) < 0.5
    weight, states = torch.rand(4), hidden[masked]
    plain = diffusion_loss(head(states), response, masked, weight, 24)
    ours = diffusion_loss(states, response, masked, weight, 24, fast.token_losses(head))
    torch.testing.assert_close(ours, plain)
