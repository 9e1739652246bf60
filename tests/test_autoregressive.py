"""The autoregressive twin attends to earlier tokens alone, its cache is exact, and its loss is the
cross-entropy of the next token."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.pretraining.backbone import init_backbone
from data.pretraining.config import PretrainConfig
from data.pretraining.texts import Texts
from diffa2_mini import weights
from diffa2_mini.config import ACOUSTIC_AND_SEMANTIC, SIZES, DecodeConfig
from diffa2_mini.data import Batch, Example, PreferenceBatch
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.model import Audio
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.tokenizer import Prompt
from tutorials.autoregressive import (
    answer_loss,
    causal_mask,
    generate_greedily,
    log_probabilities,
    next_token_loss,
    recall_loss,
    states_before,
    text_loss,
)

TOKENS = SimpleNamespace(eos_id=20, mask_id=21, eot_id=22)
PROMPTS = [Prompt([1, 2, 3, 4, 5], 2), Prompt([6, 7], 1)]
RESPONSE = torch.tensor([[8, 9, 10, 22, 20, 20], [11, 22, 20, 20, 20, 20]])
REAL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


@pytest.fixture
def audio_embeddings():
    return [torch.randn(3, 12), torch.randn(2, 12)]


@pytest.fixture
def sharp(model):
    """The micro model with weights so large that each token matters."""
    for parameter in model.llada.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.6)
    return model


def test_a_token_attends_to_itself_and_to_what_is_real_before_it():
    seen = causal_mask(torch.tensor([[True, True, False, True]]))[0]
    assert seen.tolist() == [[True, False, False, False], [True, True, False, False],
                             [True, True, False, False], [True, True, False, True]]


def test_a_later_token_changes_no_earlier_state_and_an_earlier_one_changes_all_later(
        sharp, audio_embeddings):
    before = states_before(sharp, audio_embeddings, PROMPTS, RESPONSE, REAL)
    for j in range(6):
        other = RESPONSE.clone()
        other[:, j] = 15
        after = states_before(sharp, audio_embeddings, PROMPTS, other, REAL)
        changed = (after - before).abs().amax(-1)  # [B, R]
        assert changed[:, :j + 1].max() == 0
        assert changed[0, j + 1:].numel() == 0 or changed[0, j + 1:].min() > 1e-3


def test_states_are_those_of_the_spliced_sequence_with_a_causal_mask(sharp, audio_embeddings):
    for row, prompt in enumerate(PROMPTS):
        text, n = sharp.llada.wte(torch.tensor(prompt.ids)), int(REAL[row].sum())
        answer = sharp.llada.wte(RESPONSE[row, :n])
        x = torch.cat(
            [text[:prompt.audio_at], audio_embeddings[row], text[prompt.audio_at:], answer])[None]
        hidden = sharp.llada(x, torch.ones(1, x.shape[1], x.shape[1]).tril().bool())[0]
        # in a batch, whose other prompt has another length
        found = states_before(sharp, audio_embeddings, PROMPTS, RESPONSE, REAL)[row, :n]
        torch.testing.assert_close(found, hidden[-n - 1:-1], atol=1e-5, rtol=1e-4)


def test_the_audio_changes_every_state(sharp, audio_embeddings):
    before = states_before(sharp, audio_embeddings, PROMPTS, RESPONSE, REAL)
    other = [audio_embeddings[0] + 1, audio_embeddings[1]]
    after = states_before(sharp, other, PROMPTS, RESPONSE, REAL)
    assert (after[0] - before[0]).abs().amax(-1).min() > 1e-3 and torch.equal(after[1], before[1])


def test_the_loss_is_the_weighted_mean_of_the_cross_entropies_of_the_next_tokens(
        sharp, audio_embeddings):
    # what is no real token does not count
    weight = torch.tensor([[1, 4, 1, 1, 0.1, 0], [2, 1, 0.5, 0, 9, 9]])
    total = 0.0
    log_p = sharp.llada.logits(states_before(sharp, audio_embeddings, PROMPTS, RESPONSE,
                                      REAL)).log_softmax(-1)
    for row in range(2):
        for j in range(int(REAL[row].sum())):
            total -= float(weight[row, j] * log_p[row, j, RESPONSE[row, j]])
    loss = next_token_loss(sharp, audio_embeddings, PROMPTS, RESPONSE, REAL, weight)
    assert loss.item() == pytest.approx(total / (1 + 4 + 1 + 1 + 0.1 + 2 + 1 + 0.5), rel=1e-5)


def made_batch(model):
    audio = Audio(torch.randn(2, 16, 8), torch.randn(2, 3, 16, 8), torch.tensor([16, 9]))
    return Batch(examples=[], prompts=PROMPTS, response=RESPONSE, valid=REAL, audio=audio)


def test_an_answer_counts_up_to_its_end_with_the_diffusion_models_audio(sharp):
    batch, stage = made_batch(sharp), SimpleNamespace(audio=ACOUSTIC_AND_SEMANTIC)
    upto = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).float()
    expected = next_token_loss(sharp, sharp.embed_audio(batch.audio, ACOUSTIC_AND_SEMANTIC),
                               PROMPTS, RESPONSE, REAL, upto)
    assert torch.equal(answer_loss(sharp, batch, stage, TOKENS), expected)
    trained = sharp.train_only(("acoustic", "semantic"))
    gradients = torch.autograd.grad(answer_loss(sharp, batch, stage, TOKENS),
                                    list(trained.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(g.abs().max() for g in gradients) > 0


def test_the_probability_of_an_answer_is_that_of_its_tokens_up_to_its_end(sharp):
    batch, stage = made_batch(sharp), SimpleNamespace(audio=ACOUSTIC_AND_SEMANTIC)
    other = torch.tensor([[8, 22, 20, 20, 20, 20], [12, 13, 22, 20, 20, 20]])
    pairs = PreferenceBatch(  # chosen, rejected, chosen, rejected
        examples=[], prompts=PROMPTS, audio=batch.audio, masked=torch.ones(4, 1, 6).bool(),
        response=torch.stack([RESPONSE, other], dim=1).flatten(0, 1),
        valid=REAL.repeat_interleave(2, 0))
    found = log_probabilities(sharp, pairs, stage, TOKENS)
    embeddings = sharp.embed_audio(batch.audio, ACOUSTIC_AND_SEMANTIC)
    for which, (response, lengths) in enumerate(((RESPONSE, (4, 2)), (other, (2, 3)))):
        log_p = sharp.llada.logits(states_before(sharp, embeddings, PROMPTS, response,
                                                 REAL)).log_softmax(-1)
        for row, n in enumerate(lengths):
            expected = sum(log_p[row, j, response[row, j]] for j in range(n))
            torch.testing.assert_close(found[row, which], expected)


def by_hand(model, audio_embeddings, prompt, n):
    """Greedy decoding of one clip, everything read anew for each token."""
    tokens = torch.zeros(1, 0, dtype=torch.long)
    for _ in range(n):
        padded = torch.cat([tokens, torch.zeros(1, 1, dtype=torch.long)], dim=1)
        logits = model.llada.logits(states_before(model, [audio_embeddings], [prompt], padded,
                                           torch.ones_like(padded).bool())[0, -1])
        logits[TOKENS.mask_id] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
        if int(tokens[0, -1]) in (TOKENS.eot_id, TOKENS.eos_id):
            break
    return tokens[0].tolist()


def test_decoding_with_the_cache_equals_decoding_without(sharp, audio_embeddings):
    decode = DecodeConfig(gen_length=12, block_length=12, steps=12)
    lengths = set()
    for seed in range(12):
        torch.manual_seed(seed)
        audio_embeddings = [torch.randn(3, 12) * 3, torch.randn(2, 12) * 3]
        tokens, n_passes = generate_greedily(sharp, TOKENS, audio_embeddings, PROMPTS, decode)
        expected = [by_hand(sharp, audio_embeddings[row], PROMPTS[row], 12) for row in range(2)]
        for row, known in zip(tokens.tolist(), expected):
            assert row == known + [TOKENS.eos_id] * (12 - len(known))
        assert n_passes == max(map(len, expected))
        lengths |= {len(known) for known in expected}
    assert len(lengths) > 2  # some answers end early


def test_answers_come_in_order_whatever_the_batch(audio_embeddings):
    config = SIZES["toy"][0]
    model, tokenizer = weights.build(config).eval(), load_tokenizer(config)

    def features(paths):
        audio = [
            Audio(torch.full((1, 200, 96), 0.1 * int(path)), torch.zeros(1, 4, 200, 96),
                  torch.tensor([40])) for path in paths]
        return Audio(*(torch.cat([getattr(a, name)
                                  for a in audio])
                       for name in ("final", "taps", "n_frames")))

    features.model, features.device, features.dtype = model, torch.device("cpu"), torch.float32
    examples = [
        Example(str(i), question, "", "", "", "")
        for i, question in enumerate(["What is said?", "Who speaks?", "How many?"])]
    respondent = Respondent(features, tokenizer, ACOUSTIC_AND_SEMANTIC, config.decode,
                            generate_greedily)
    (alone, passes), (together, fewer) = respondent.answer(examples, 1), respondent.answer(examples)
    assert alone == together and len(alone) == 3 and fewer <= passes <= 3 * 16


class PerfectRecall:
    """A model that predicts the token that stood before a word's last occurrence."""

    def __call__(self, tokens, mask):
        found = torch.zeros(*tokens.shape, 100)
        for row in range(len(tokens)):
            for p in range(1, tokens.shape[1]):
                earlier = [
                    q for q in range(1, p) if tokens[row, q] == tokens[row, p] and mask[row, p, q]]
                if earlier:
                    found[row, p, tokens[row, earlier[-1] - 1]] = 50.0
        return found

    def wte(self, tokens):
        return tokens

    def logits(self, hidden):
        return hidden


def test_recall_asks_for_the_word_that_stood_before():
    config = PretrainConfig(backbone_batch=3)
    tokenizer = SimpleNamespace(mask_id=2, encode=lambda text: [1])
    assert recall_loss(PerfectRecall(), torch.arange(10, 60), tokenizer, config,
                       torch.Generator().manual_seed(0)) < 1e-6


def test_recall_and_texts_cost_what_guessing_costs_before_they_are_learned_and_less_after():
    config, tokenizer = SIZES["toy"][0], load_tokenizer(SIZES["toy"][0])
    model = weights.build(config, None)
    init_backbone(model.llada, torch.Generator().manual_seed(0))
    parameters = list(model.llada.requires_grad_(True).parameters())
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    with torch.no_grad():
        recall = recall_loss(model.llada, torch.arange(100, 160), tokenizer, PretrainConfig(),
                             torch.Generator().manual_seed(0))
    assert recall > math.log(60)
    pretrain = PretrainConfig(backbone_batch=4)
    batch = Texts(config, pretrain, tokenizer, 0)[0]
    for _ in range(8):
        loss = text_loss(model, tokenizer, batch, pretrain, np.random.default_rng(0))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > 3 and losses[-1] < losses[0] / 2
