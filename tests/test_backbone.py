"""The backbone's half of stage 0: how it starts, what it is asked, and when it ends."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import toy
from data.pretraining import backbone, recall
from data.pretraining.backbone import (
    accuracy_by_type,
    init_backbone,
    open_and_lettered,
    text_loss,
)
from data.pretraining.config import PretrainConfig
from data.pretraining.recall import recall_loss
from diffa2_mini.config import SIZES
from diffa2_mini.llada import rotary, rotate
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer

TOY = SIZES["toy"][0]


@pytest.fixture(scope="module")
def model():
    model = Diffa2Model(TOY)
    init_backbone(model.llada, torch.Generator().manual_seed(0))
    return model


def test_two_heads_of_the_first_block_start_by_attending_to_the_neighbours(model):
    block, config = model.llada.blocks[0], TOY.llada
    tokens = torch.randint(0, config.vocab_size, (4, 40),
                           generator=torch.Generator().manual_seed(1))
    x = block.attn_norm(model.llada.wte(tokens))
    turn = rotary(torch.arange(40), config.width // config.n_heads, config.rope_theta)
    q, k = (rotate(proj(x).view(4, 40, config.n_heads, -1).transpose(1, 2), turn)
            for proj in (block.q_proj, block.k_proj))
    most = (q @ k.transpose(-1, -2)).argmax(-1)[:, :2, 1:-1]  # [B, 2 heads, S - 2]
    offset = (most - torch.arange(1, 39)).float()
    assert (offset[:, 0] == -1).float().mean() > 0.9 and (offset[:, 1] == 1).float().mean() > 0.9


class PerfectRecall:
    """A model that predicts each word of the second half from its pair in the first."""

    def wte(self, tokens):
        return tokens

    def logits(self, hidden):
        return hidden

    def __call__(self, tokens):
        known, asked = tokens.unflatten(1, (-1, 3))[..., :2].chunk(2, dim=1)  # [B, n, 2] each
        same = (known[:, None] == asked[:, :, None]).any(-1, keepdim=True)  # [B, n, n, 1]
        words = (known[:, None] * same).sum(2)  # of two pairs none has the same word
        hidden = torch.zeros(*tokens.shape, 200).unflatten(1, (-1, 3))
        hidden[:, known.shape[1]:, :2] = 50 * torch.nn.functional.one_hot(words, 200).float()
        return hidden.flatten(1, 2)


def test_recall_asks_for_the_word_of_the_pair_that_is_masked():
    config = PretrainConfig(backbone_batch=8)
    assert recall_loss(PerfectRecall(), torch.arange(100, 160), load_tokenizer(TOY), config,
                       torch.Generator().manual_seed(0)) < 1e-6


def test_a_texts_masked_tokens_count_by_their_weights():
    logits, weight = torch.randn(2, 4, 9), torch.tensor([[1.0, 1, 1, 1], [3, 3, 3, 3]])
    batch = SimpleNamespace(response=torch.randint(9, (2, 4)), valid=torch.ones(2, 4).bool(),
                            weight=weight, prompts=None, audio_embeddings=lambda model: None)
    batch.valid[0, 3] = False
    model = SimpleNamespace(hidden_states=lambda *_: logits,
                            llada=SimpleNamespace(logits=lambda hidden: hidden))
    loss = text_loss(model, load_tokenizer(TOY), batch, PretrainConfig(shortest_time=1.0),
                     np.random.default_rng(0))  # all is masked
    losses = -logits.log_softmax(-1).gather(-1, batch.response[..., None])[..., 0]  # [2, 4]
    torch.testing.assert_close(loss, (losses[0, :3].sum() + 3 * losses[1].sum()) / (3 + 3 * 4))


def test_recall_costs_what_guessing_costs_before_it_is_learned(model):
    config = PretrainConfig(backbone_batch=64)
    with torch.no_grad():
        loss = recall_loss(model.llada, torch.arange(100, 160), load_tokenizer(TOY), config,
                           torch.Generator().manual_seed(0))
    assert loss > np.log(config.recall_pairs)  # nothing is learned: no better than one of the four


def test_accuracy_counts_right_answers_by_type(model):
    tokenizer, rng = load_tokenizer(TOY), np.random.default_rng(0)
    examples = [toy.text_example(rng) for _ in range(20)]
    model.eval()
    one = accuracy_by_type(model, tokenizer, examples)
    assert set(one) == {example.type for example in examples}
    assert all(0 <= value <= 1 for value in one.values())
    empty = accuracy_by_type(model, tokenizer, [replace(each, answer="") for each in examples])
    assert sum(empty.values()) + sum(one.values()) <= len(one) * 1.0001
    assert open_and_lettered({"asr": 1.0, "count": 0.5, "count+abcd": 0.2}) == (0.75, 0.2)

    def says_two(model, tokenizer, audio_embeddings, prompts, decode):
        return torch.tensor([tokenizer.response("two", 16)] * len(prompts)), 1

    spaced = [replace(examples[0], answer=answer) for answer in (" two\n", "two", "tw o", "three")]
    found = accuracy_by_type(model, tokenizer, spaced, generate=says_two)
    assert found == {examples[0].type: 0.5}


def test_the_number_of_steps_bounds_every_phase(monkeypatch):
    """Of 1,500 held-out texts no more are asked than were learned from."""
    asked, steps, said = [], [], []

    def counted(model, tokenizer, examples, *args):
        asked.append(len(examples))
        return {"asr": 1.0}

    def watched(numbers, desc):
        for number in numbers:
            steps.append(desc)
            yield number

    monkeypatch.setattr(backbone, "accuracy_by_type", counted)
    for module in (backbone, recall):
        monkeypatch.setattr(module, "progress", watched)
    config = PretrainConfig(recall_steps=2, backbone_steps=2, silence_steps=2, backbone_batch=3)
    loss = backbone.pretrain_backbone(Diffa2Model(TOY), config, 0, said.append)
    assert np.isfinite(loss) and f"step 4: loss {loss:.3f}" in said[0]
    assert said[1].splitlines() == [f"  on {form}: open 1.000, lettered nan (asr 1.00)"
                                    for form in ("sentences", "audio-like")]
    assert asked == [6, 6] and (steps.count("recall"), steps.count("backbone")) == (2, 4)


def test_products_in_bfloat16_learn_the_same_with_weights_and_losses_in_float32(monkeypatch):
    monkeypatch.setattr(backbone, "report", lambda *args: "")
    config, weights, losses = PretrainConfig(
        recall_steps=2, backbone_steps=8, silence_steps=0, backbone_batch=8, warmup=1,
        n_held_out=8), {}, {}

    def loss_of(*args):
        loss = backbone.text_loss(*args)
        assert loss.dtype == torch.float32
        losses.setdefault(dtype, []).append(float(loss.detach()))
        return loss

    for dtype in ("float32", "bfloat16"):
        model = Diffa2Model(TOY)
        backbone.pretrain_backbone(model, replace(config, dtype=dtype), 0, lambda line: None,
                                   paradigm=replace(backbone.MASKED_DIFFUSION, text_loss=loss_of))
        weights[dtype] = torch.cat([p.flatten() for p in model.llada.parameters()])
    assert weights["bfloat16"].dtype == torch.float32
    assert not torch.equal(*weights.values())  # bfloat16 has 8 bits, 2 to 3 digits
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
    assert losses["float32"][-1] < losses["float32"][0]
