"""The fast mask predictor and its caches give what the plain one gives."""

import pytest
import torch

from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.state import empty_caches, place
from diffa2_mini.llada import Llada
from diffa2_mini.model import Diffa2Model


@pytest.fixture
def pair(config):
    """The same weights in both."""
    plain, fast = Llada(config.llada).double(), FastLlada(config.llada).double()
    fast.load_state_dict(plain.state_dict())
    return plain, fast


VALID = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])


@pytest.mark.parametrize("first", [0, 3, 6])
def test_the_fast_one_equals_the_plain_one(pair, first):
    plain, fast = pair
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(fast(x, VALID, first=first), plain(x, VALID)[:, first:])
    torch.testing.assert_close(fast(x, VALID, first=first), plain(x, VALID, first=first))


@pytest.mark.parametrize("first", [0, 3])
def test_so_it_does_where_the_mask_has_a_row_for_each_token(pair, first):
    plain, fast = pair
    x, causal = torch.randn(2, 7, 12, dtype=torch.float64), torch.ones(2, 7, 7).tril().bool()
    torch.testing.assert_close(fast(x, causal, first=first), plain(x, causal, first=first))


@pytest.mark.parametrize("first", [0, 3])
def test_a_full_cache_changes_nothing_and_a_slice_renews_its_own_positions(pair, first):
    plain, fast = pair
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    caches, everywhere = empty_caches(fast, 2, 7), torch.arange(7)
    for llada in pair:  # the second finds what the first has left
        filled = llada(x, VALID, None, place(caches, everywhere), first)
        torch.testing.assert_close(filled, plain(x, VALID, first=first))
    positions, at = torch.arange(7).expand(2, -1), torch.tensor([2, 3, 4])
    kept = [cache.keys.clone() for cache in caches]
    again = fast(x[:, at], VALID, positions[:, at], place(caches, at))
    # nothing has changed, so that it is exact
    torch.testing.assert_close(again, plain(x, VALID)[:, at])
    changed = x.clone()
    changed[:, at] += 1
    fast(changed[:, at], VALID, positions[:, at], place(caches, at))
    for cache, before in zip(caches, kept):
        moved = (cache.keys != before).any(-1).any(1).any(0)
        assert moved.tolist() == [position in at for position in range(7)]


def test_a_model_takes_either_class(config):
    assert type(Diffa2Model(config).llada) is Llada
    assert type(Diffa2Model(config, llada=FastLlada).llada) is FastLlada


def test_recomputing_changes_memory_and_not_gradients(config):
    model = Diffa2Model(config, llada=FastLlada)
    x, valid = torch.randn(2, 7, 12, requires_grad=True), torch.ones(2, 7, dtype=torch.bool)
    model.add_lora()
    trained = model.train_only(("lora",))
    for parameter in trained.values():
        torch.nn.init.normal_(parameter)
    kept = []
    for recompute in ("nothing", "feed-forward", "blocks"):
        model.llada.recompute = recompute
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.llada(x, valid).square().sum()
        kept.append((saved, torch.autograd.grad(loss, [x, *trained.values()])))
    (nothing, gradients), (feed_forward, again), (blocks, once_more) = kept
    assert blocks < nothing / 3 and blocks < feed_forward < 0.8 * nothing
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(gradients, again, once_more))
