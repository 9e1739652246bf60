"""Decoding on hand-made predictions: who is committed, when, and that nobody's answer depends on a
neighbour's."""

import dataclasses
from functools import partial

import pytest
import torch

from diffa2_mini.config import DecodeConfig
from diffa2_mini.decode import commit, decode, finished
from diffa2_mini.fast.generate import early_end, generate, gumbel, pick, sample, uniform, unsure
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.tokenizer import Prompt

V, MASK, EOS = 6, 5, 4  # words 0 ... 3
SETTINGS = [
    dict(steps=8),
    dict(steps=4, remasking="random"),
    dict(factor=1.0),
    dict(factor=1e-9),
    dict(threshold=0.6)]
MORE = [  # with rules that end early and take tokens back
    dict(factor=1.0, eos_threshold=0.8),
    dict(steps=4, eos_threshold=0.95),
    dict(threshold=0.6, revise=0.4),
    dict(factor=2.0, eos_threshold=0.9, revise=0.2)]


def settings(**changes) -> DecodeConfig:
    return DecodeConfig(**dict(gen_length=8, block_length=4, steps=8, factor=None, cache="none") |
                        changes)


class Guess:
    """A state whose hidden states are logits already: predict(tokens) for the rows that it has, or
    predict(tokens, valid=...) where columns are dropped."""

    mask_id = MASK

    def __init__(self, predict, n_rows=1, length=8):
        self.predict, self.response = predict, torch.ones(n_rows, length, dtype=torch.bool)
        self.kept, self.asked = list(range(n_rows)), []
        self.valid, self.n_read = self.response.clone(), length

    def rows(self, keep):
        self.kept, self.n_read = [self.kept[i] for i in keep], self.response.shape[1]
        self.asked.append(self.kept)
        return self

    def hide(self, behind):
        self.valid[self.kept] &= ~behind
        self.n_read = int(self.valid[self.kept].any(0).sum())

    def unconditional(self):
        return Guess(lambda tokens, **more: self.predict(tokens, conditional=False, **more),
                     len(self.response))

    def forward_all(self, tokens, how):
        assert tokens.shape[1] == self.n_read
        everything = torch.full((len(self.response), 8), MASK)
        everything[self.kept, :tokens.shape[1]] = tokens
        dropped = {} if self.valid.all() else {"valid": self.valid}
        return self.predict(everything, **dropped)[self.kept, :tokens.shape[1]]

    def logits(self, hidden):
        return hidden


def decode_fast(predict, config, n_rows=1, numbers=None):
    return list(generate(Guess(predict, n_rows), config, EOS, numbers=numbers))


def decode_by_all_rules(predict, tokens, config, mask_id, eos_id):
    """`decode` with the two rules that the fast decoder adds, reading everything in each step:
    `predict` maps tokens [B, R], and which of them may be read, to logits [B, R, V]."""
    position = torch.arange(tokens.shape[1])  # [R]
    valid = torch.ones_like(tokens, dtype=torch.bool)  # False where columns are dropped
    for start in range(0, tokens.shape[1], config.block_length):
        in_block = (start <= position) & (position < start + config.block_length)  # [R]
        is_open = ~finished(tokens, mask_id, eos_id)[:, None]  # [B, 1]
        held, done = torch.ones(tokens.shape), ~is_open  # [B, R], [B, 1]
        for step in range(config.steps_per_block):
            candidates = (tokens == mask_id) & in_block & is_open  # [B, R]
            if config.revise is not None:
                again, done = unsure(candidates, held, done, config)
                tokens, candidates = tokens.masked_fill(again, mask_id), candidates | again
            if not candidates.any():
                break
            logits = predict(tokens, valid)  # [B, R, V]
            logits[..., mask_id] = -torch.inf  # a mask is not an answer
            confidence, predicted = logits.softmax(-1).max(-1)  # [B, R] each
            committed = commit(confidence, candidates, config, step)
            if config.eos_threshold is not None:
                end, behind = early_end(predicted, confidence, candidates, config, eos_id)
                committed, valid = (committed | end) & ~behind, valid & ~behind
                tokens, held = tokens.masked_fill(behind, eos_id), held.masked_fill(behind, 1)
            tokens = torch.where(committed, predicted, tokens)
            held = torch.where(committed, confidence, held)
    return tokens


def sure(words, confidence):
    """Predicts `words` [R] with `confidence` [R], whatever the tokens, and all else alike."""
    # V - 2 others: the mask never counts
    p = ((1 - torch.tensor(confidence)) / (V - 2))[:, None].repeat(1, V)
    p[range(len(words)), words] = torch.tensor(confidence)
    p[:, MASK] = 1e-30
    return lambda tokens, valid=None: p.log().expand(len(tokens), -1, -1).clone()


def restless(rows=(0,), scale=2.0):
    """Random predictions that change with every token; row b is that of clip rows[b]."""
    tables = torch.randn(10, 8, V, 8, V, generator=torch.Generator().manual_seed(0)) * scale
    tables[..., EOS] -= 0.2  # so that some answers end early and others do not

    def predict(tokens, valid=None, conditional=True):
        hot = torch.nn.functional.one_hot(tokens, V).float()  # [B, 8, V]
        hot = hot if valid is None else hot * valid[..., None]
        return torch.einsum("brv,brvsw->bsw", hot,
                            tables[list(rows)]) * (1 if conditional else -0.5)

    return predict


@pytest.mark.parametrize("block, steps, shares", [
    (8, 8, [1] * 8), (8, 3, [3, 3, 2]), (8, 5, [2, 2, 2, 1, 1]), (4, 6, [2, 1, 1] * 2), (8, 1, [8]),
    (8, 20, [1] * 8)])
@pytest.mark.parametrize("remasking", ["confidence", "random"])
def test_the_fixed_schedule_shares_the_masks_with_the_remainder_first(block, steps, shares,
                                                                      remasking):
    run = decode_fast(sure([0, 1, 2, 3] * 2, [0.5] * 8),
                      settings(block_length=block, steps=steps, remasking=remasking))
    assert [int(step.committed.sum()) for step in run] == shares


@pytest.mark.parametrize("changes", SETTINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_committed_token_never_changes_and_no_mask_is_left(changes, temperature):
    run = decode_fast(restless(), settings(temperature=temperature, **changes))
    before = torch.full((1, 8), MASK)
    for step in run:
        assert (before[step.committed] == MASK).all() and step.committed.any()
        assert torch.equal(step.tokens, torch.where(step.committed, step.predicted, before))
        before = step.tokens
    assert not (before[:, :4] == MASK).any()
    assert (finished(before, MASK, EOS).all() or not (before == MASK).any())


@pytest.mark.parametrize("changes", [dict(factor=1e-9), dict(steps=8)])
def test_one_at_a_time_goes_in_order_of_confidence(changes):
    confidence = [0.5, 0.9, 0.3, 0.7, 0.95, 0.4, 0.6, 0.8]
    run = decode_fast(sure([0] * 8, confidence), settings(block_length=8, **changes))
    assert [step.committed.nonzero()[:, 1].tolist() for step in run] == [
        [4], [1], [7], [3], [6], [0], [5], [2]]


@pytest.mark.parametrize("changes", SETTINGS)
def test_blocks_are_filled_from_left_to_right(changes):
    # the second block has the higher confidence
    run = decode_fast(sure([0] * 8, [0.3] * 4 + [0.999] * 4), settings(**changes))
    for step in run:
        assert not step.committed[:, 4:].any() or not (step.tokens[:, :4] == MASK).any()
        assert step.committed[:, :4].any() != step.committed[:, 4:].any()


@pytest.mark.parametrize("words, n_filled",
                         [([0, 1, EOS, 2, 0, 0, 0, 0], 4), ([0, 1, 2, 3, EOS, 0, 0, 0], 8)])
@pytest.mark.parametrize("changes", SETTINGS)
def test_decoding_stops_after_the_block_whose_eos_is_settled(words, n_filled, changes):
    run = decode_fast(sure(words, [0.9] * 8), settings(**changes))
    assert run[-1].tokens[0].tolist() == words[:n_filled] + [MASK] * (8 - n_filled)


def test_temperature_zero_is_deterministic_and_ignores_the_seed():
    runs = [decode_fast(restless(), settings(factor=1.0, seed=seed))[-1].tokens for seed in (0, 1)]
    assert torch.equal(*runs)


def test_with_a_temperature_the_seed_decides():
    runs = [
        decode_fast(restless(scale=0.5), settings(temperature=1.0, seed=seed))[-1].tokens
        for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_temperature_samples_from_p_to_the_one_over_t_and_its_confidence_is_free_of_noise(
        temperature):
    n, p = 40_000, torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    noise = gumbel(torch.rand(n, 1, 4, dtype=torch.float64), temperature)
    tokens, confidence = sample(p.log().expand(n, 1, 4), noise)
    torch.testing.assert_close(confidence, p[tokens].float())
    expected = n * p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    # chi-square, 3 degrees of freedom, 0.1 %
    assert ((tokens.flatten().bincount(minlength=4) - expected) ** 2 / expected).sum() < 16.3


def test_guidance_of_zero_never_asks_without_the_prompt():
    plain, guided = restless(), decode_fast(restless(), settings(cfg=0.0))
    assert torch.equal(
        decode_fast(lambda tokens: plain(tokens), settings())[-1].tokens, guided[-1].tokens)


def test_choice_and_confidence_come_from_the_guided_logits():
    with_prompt, without = torch.randn(2, 8, V)

    def predict(tokens, conditional=True):
        return (with_prompt if conditional else without).clone()[None]

    step = decode_fast(predict, settings(cfg=1.5))[0]
    guided = without + 2.5 * (with_prompt - without)
    guided[:, MASK] = -torch.inf
    confidence, words = guided[:4].softmax(-1).max(-1)  # of the first block
    assert torch.equal(step.predicted[0, :4], words)
    torch.testing.assert_close(step.confidence[0, :4], confidence)


def test_random_remasking_commits_anywhere_but_the_same_for_the_same_seed():
    predict = sure([0] * 8, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    orders = [[
        step.committed[0].nonzero().item()
        for step in decode_fast(predict, settings(block_length=8, remasking="random", seed=seed))]
              for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(8)) != order for order in orders)


@pytest.mark.parametrize("changes", [*SETTINGS, dict(cfg=1e6, steps=8)])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 3.0, 500.0, 1e6])
def test_the_mask_is_never_an_answer(changes, temperature):
    logits = torch.zeros(8, V)
    logits[:, MASK] = 50.0
    config = settings(temperature=temperature, **changes)
    run = decode_fast(lambda tokens, conditional=True: logits.clone()[None], config)
    assert all(step.confidence.isfinite().all() for step in run)
    assert all((step.predicted[step.confidence > 0] != MASK).all() for step in run)
    assert run[0].confidence[0, 0].item() == pytest.approx(1 / 5)  # it takes no probability either


@pytest.mark.parametrize("changes", [*SETTINGS, *MORE])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cfg", [0.0, 1.0])
def test_a_batch_equals_its_rows_one_by_one(changes, temperature, cfg):
    config = settings(temperature=temperature, cfg=cfg, **changes)
    batch = decode_fast(restless(range(10)), config, n_rows=10)[-1].tokens
    alone = torch.cat([decode_fast(restless([row]), config, numbers=[row])[-1].tokens
                       for row in range(10)])
    assert torch.equal(batch, alone)


@pytest.mark.parametrize("changes, n_at_least", [
    (dict(temperature=1.0), 5), (dict(remasking="random"), 3), (dict(temperature=0.0), 1)])
def test_copies_of_a_question_are_drawn_each_for_itself(changes, n_at_least):
    config = settings(**changes)
    batch = decode_fast(restless([3] * 6, scale=0.5), config, n_rows=6,
                        numbers=[*range(40, 46)])[-1].tokens
    answers = {tuple(row) for row in batch.tolist()}
    assert len(answers) >= n_at_least and (len(answers) > 1 or n_at_least == 1)
    # asked later, alone, the third gets the same answer
    for row, number in enumerate(range(40, 46)):
        alone = decode_fast(restless([3], scale=0.5), config, numbers=[number])[-1].tokens
        assert torch.equal(batch[row:row + 1], alone)


def test_words_and_places_are_drawn_anew_for_each_answer_block_and_step():
    config = settings(temperature=1.0, remasking="random", seed=1795687535000000000)

    keys = [(number, start, step)
            for number in (0, 1, 2**31) for start in (0, 4) for step in (0, 1)]
    backwards = torch.tensor([[3, 2, 1, 0]] * 2)
    for kind, shape in (("words", (V,)), ("places", ())):
        drawn = [uniform(kind, config, key, *shape) for key in keys]
        assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 12
        # in another order of rows and positions
        assert torch.equal(pick([drawn[7], drawn[3]], backwards).flip(1),
                           torch.stack([drawn[7], drawn[3]]))


def test_noise_is_finite_but_where_a_token_cannot_be_drawn():
    # the ends of the range of a uniform number
    ends = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    for temperature in (1e-300, 1.0, 1e6):
        noise = gumbel(ends, temperature)
        assert noise.dtype == torch.float32 and noise[0] == -torch.inf
        assert noise[1:].isfinite().all()


def test_an_early_end_begins_at_the_first_candidate_that_is_a_confident_eos():
    predicted = torch.tensor([[EOS, 0, EOS, 1], [EOS, EOS, EOS, EOS], [0, EOS, 0, 0]])
    confidence = torch.tensor([[0.5, 0.99, 0.9, 0.9], [0.99] * 4, [0.8] * 4])
    candidates = torch.tensor([[True] * 4, [False, False, False, True], [True] * 4])
    end, behind = early_end(predicted, confidence, candidates, settings(eos_threshold=0.8), EOS)
    assert end.nonzero().tolist() == [[0, 2], [1, 3]] and behind.nonzero().tolist() == [[0, 3]]


def test_unsure_is_what_a_full_row_was_less_confident_of_and_it_is_asked_once():
    masked = torch.tensor([[True, False, False], [False] * 3, [False] * 3])
    held = torch.tensor([[1.0, 0.1, 0.9], [0.3, 0.29, 1.0], [0.1, 0.1, 0.1]])
    done = torch.tensor([[False], [False], [True]])
    again, done = unsure(masked, held, done, settings(factor=1.0, revise=0.3))
    assert again.nonzero().tolist() == [[1, 1]] and done.tolist() == [[False], [True], [True]]


@pytest.mark.parametrize("block", [2, 4, 8])
@pytest.mark.parametrize("changes", [changes for changes in [*SETTINGS, *MORE]
                                     if "remasking" not in changes])  # the reference draws nothing
def test_an_early_end_and_revision_give_the_tokens_of_decoding_that_reads_everything(changes,
                                                                                     block):
    config = settings(block_length=block, **changes)
    predict, masks = restless(range(10)), torch.full((10, 8), MASK)
    reference = decode_by_all_rules(predict, masks, config, MASK, EOS)
    assert torch.equal(reference, decode_fast(predict, config, n_rows=10)[-1].tokens)
    assert (reference == EOS).any() and not finished(reference, MASK, EOS).all()  # some end early
    plain = decode(predict, masks, config, MASK, EOS)
    assert torch.equal(reference, plain) or changes in MORE


@pytest.mark.parametrize("changes", [
    dict(factor=1e-9), dict(factor=2.0), dict(threshold=0.0), dict(threshold=0.5),
    dict(factor=1e-9, temperature=1.0), dict(factor=1e-9, eos_threshold=0.95)])
@pytest.mark.parametrize("block", [1, 4, 8])
def test_revision_ends_as_no_token_is_taken_back_twice(changes, block):
    config = settings(block_length=block, revise=1.0, **changes)  # nothing is ever sure enough
    run, before = decode_fast(restless([0, 1]), config, n_rows=2), torch.full((2, 8), MASK)
    n_back = torch.zeros(2, 8)
    for step in run:
        assert step.committed.any()
        n_back += (before != MASK) & (step.committed | (step.tokens == MASK))
        before = step.tokens
    assert finished(before, MASK, EOS).all() or not (before == MASK).any()
    assert n_back.max() == 1 and len(run) <= 16
    if changes == dict(factor=1e-9):
        filled = (before != MASK).sum(1).max()
        assert len(run) == 2 * filled  # each token alone, twice


def test_revision_mends_what_was_said_too_early():
    def predict(tokens, valid=None):
        words, confidence = [1, 3, 0, 0, 0, 0, 0, 0], [0.65] + [0.9] * 7
        if tokens[0, 1] != MASK:
            words[0], confidence[0] = 2, 0.6  # now that the second is known
        return sure(words, confidence)(tokens)

    for revise, first, n_passes in [(None, 1, 1), (0.6, 1, 1), (0.7, 2, 2)]:
        run = decode_fast(predict, settings(block_length=8, threshold=0.6, revise=revise))
        assert run[-1].tokens[0].tolist() == [first, 3, 0, 0, 0, 0, 0, 0] and len(run) == n_passes


# ------------------------------------------------------------------------ caches, with a real model


@pytest.fixture
def restless_model(model):
    """A model whose weights are so large that its predictions change with every token."""
    for parameter in model.llada.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.7)
    # so that some answers end early
    model.llada.ff_out.weight.data[[4, 22]] *= torch.tensor([[1.5], [1.0]])
    return model


def random_state(model, seed):
    """Two to four clips with prompts and answers of different lengths."""
    rng = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=rng))

    n = number(2, 5)
    audio_embeddings = [
        torch.randn(number(0, 6), model.config.llada.width, generator=rng) for _ in range(n)]
    prompts = [Prompt([number(6, 22) for _ in range(number(1, 8))], 1) for _ in range(n)]
    return DecodingState(model, audio_embeddings, prompts, [number(2, 14) for _ in range(n)], 22)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_fifty_random_batches_equal_their_clips_one_by_one(restless_model, cache):
    n_ended, answers = 0, set()
    for seed in range(60):
        changes = [dict(factor=1.0), dict(steps=4, factor=None), dict(threshold=0.5, factor=None),
                   dict(factor=1.0, refresh=None if cache == "none" else 2), dict(cfg=0.5),
                   dict(temperature=1.0, seed=seed), dict(eos_threshold=0.1, cfg=0.5),
                   dict(factor=2.0, revise=0.5, eos_threshold=0.3)][seed % 8]
        config = DecodeConfig(**dict(gen_length=8, block_length=4, steps=8, cache=cache) | changes)
        batch = random_state(restless_model, seed)
        together = list(generate(batch, config, EOS))[-1].tokens
        for i, length in enumerate(batch.lengths):
            alone = list(generate(batch.rows([i]), config, EOS, numbers=[i]))[-1].tokens
            assert torch.equal(together[i, :length], alone[0]), (seed, i)
            n_ended += bool((alone == 22).any())
            answers.add(tuple(alone[0].tolist()))
    assert n_ended > 10 and len(answers) > 100  # or the lines above would prove little


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("changes", [*SETTINGS, *MORE, dict(cfg=1.0), dict(temperature=1.0)])
def test_a_cache_that_is_refreshed_in_every_step_changes_nothing(restless_model, cache, changes):
    for seed in range(5):
        runs = [
            list(generate(random_state(restless_model, seed), settings(**named, **changes), EOS))
            for named in (dict(cache="none"), dict(cache=cache, refresh=1))]
        for plain, cached in zip(*runs, strict=True):
            assert torch.equal(plain.tokens, cached.tokens)
            if "eos_threshold" in changes:  # keys of dropped columns are masked, not left out
                torch.testing.assert_close(plain.confidence, cached.confidence)
            else:
                assert torch.equal(plain.confidence, cached.confidence)


def test_a_cache_reads_everything_once_a_block_and_then_less(restless_model, monkeypatch):
    read, forward = [], restless_model.llada.forward

    def counted(x, *others, **named):
        read.append(x.shape[1])
        return forward(x, *others, **named)

    monkeypatch.setattr(restless_model.llada, "forward", counted)
    audio_embeddings, prompts = [torch.randn(3, 12)], [Prompt([7] * 6, 2)]
    expected = {"none": [17] * 8, "prefix": [17, 8, 8, 8, 17, 4, 4, 4], "dual": [17, 4, 4, 4] * 2}
    answers = set()
    for cache, columns in expected.items():
        read.clear()
        run = list(generate(DecodingState(restless_model, audio_embeddings, prompts, [8], 22),
                            settings(cache=cache), eos_id=-1))
        assert read == columns
        answers.add(tuple(run[-1].tokens[0].tolist()))
    assert len(answers) > 1  # the caches are not exact


@pytest.mark.parametrize("changes", SETTINGS)
@pytest.mark.parametrize("words, n_one_by_one", [
    ([0, 1, EOS, EOS, EOS, EOS, EOS, EOS], 3), ([0, 1, 2, 3, 0, EOS, EOS, EOS], 6),
    ([EOS] * 8, 1), ([0] * 8, 8)])
def test_an_early_end_changes_no_answer_where_the_models_own_eos_are_as_confident(
        words, n_one_by_one, changes):
    predict = sure(words, [0.7, 0.8, 0.9, 0.7, 0.8, 0.95, 0.9, 0.9])
    config = settings(block_length=8, **changes)
    kept = decode_fast(predict, config)
    early = decode_fast(predict, dataclasses.replace(config, eos_threshold=0.65))
    assert early[-1].tokens[0].tolist() == kept[-1].tokens[0].tolist() == words
    assert len(early) <= len(kept) and (changes != dict(steps=8) or len(early) == n_one_by_one)
    never = decode_fast(predict, dataclasses.replace(config, eos_threshold=1.0))
    assert [step.tokens.tolist() for step in never] == [step.tokens.tolist() for step in kept]


def test_an_eos_that_is_less_confident_ends_nothing_and_one_ends_all_blocks_behind_it():
    words, confidence = [0, EOS, 1, 2, 3, 3, 3, 3], [0.7, 0.8, 0.6, 0.6, 0.9, 0.9, 0.9, 0.9]
    for threshold, expected in [(0.8, [0, EOS, 1, 2] + [MASK] * 4), (0.79, [0] + [EOS] * 7)]:
        run = decode_fast(sure(words, confidence), settings(steps=8, eos_threshold=threshold))
        assert run[-1].tokens[0].tolist() == expected


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_columns_behind_a_confident_eos_are_not_read_again(restless_model, monkeypatch, cache):
    read, forward, n_early = [], restless_model.llada.forward, 0

    def counted(x, *others, **named):
        read.append(x.shape[1])
        return forward(x, *others, **named)

    monkeypatch.setattr(restless_model.llada, "forward", counted)
    config = settings(block_length=8, cache=cache, eos_threshold=0.0)  # any EOS is confident
    for seed in range(20):
        read.clear()
        state = random_state(restless_model, seed)
        state = DecodingState(restless_model, state.audio_embeddings[:1], state.prompts[:1], [8],
                              22)
        run = list(generate(state, config, EOS))
        left = [(step.tokens[0].tolist() + [EOS]).index(EOS) + 1 for step in run]
        expected = [min(n, 8) + (state.n_before if cache == "none" else 0) for n in left[:-1]]
        assert read == [state.n_before + 8, *expected]
        n_early += left[0] < 8
    assert n_early > 3


@torch.no_grad()
def test_dropped_columns_and_taken_back_tokens_are_those_of_plain_decoding(restless_model):
    answers = set()

    def predict(audio_embeddings, prompts, tokens, valid):
        hidden = restless_model.hidden_states(audio_embeddings, prompts, tokens, valid)
        return restless_model.llada.logits(hidden)

    for seed in range(24):
        state = random_state(restless_model, seed)
        state = DecodingState(restless_model, state.audio_embeddings[:2], state.prompts[:2],
                              [8, 8], 22)
        config = settings(block_length=(4, 8)[seed % 2], **MORE[seed // 2 % 4])
        plain = decode_by_all_rules(partial(predict, state.audio_embeddings, state.prompts),
                       torch.full((2, 8), 22), config, 22, EOS)
        fast = list(generate(state, config, EOS))[-1].tokens
        assert torch.equal(plain, fast), seed
        answers.add(tuple(plain.flatten().tolist()))
    assert len(answers) > 20


def test_rows_that_are_finished_are_not_read_any_more():
    def predict(tokens):
        logits = torch.zeros(3, 8, V)
        logits[:, :, 0] = 9.0
        logits[0, 1, EOS] = 20.0  # the first row ends in the first block
        return logits

    guess = Guess(predict, n_rows=3)
    run = list(generate(guess, settings(), EOS))
    assert guess.asked == [[0, 1, 2], [1, 2]]
    assert run[-1].tokens.tolist() == [[0, EOS, 0, 0] + [MASK] * 4, [0] * 8, [0] * 8]
    assert not run[-1].committed[0].any()


@pytest.mark.parametrize("changes", SETTINGS)
def test_a_step_tells_the_likeliest_tokens_of_its_masks_if_asked_and_decodes_as_if_not(changes):
    predict = restless([0, 1])
    plain = decode_fast(predict, settings(**changes), n_rows=2)
    asked = list(generate(Guess(predict, 2), settings(**changes), EOS, top=3))
    assert all(step.likely is None for step in plain)
    assert [step.tokens.tolist() for step in plain] == [step.tokens.tolist() for step in asked]
    seen = torch.full((2, 8), MASK)
    for step in asked:
        here = (step.confidence > 0) & (seen == MASK)
        logits = predict(seen)
        logits[..., MASK] = -torch.inf
        expected = logits.softmax(-1).topk(3)
        tokens, probabilities = step.likely
        torch.testing.assert_close(probabilities[here], expected.values[here])
        assert (tokens[here] == expected.indices[here]).all()
        assert (probabilities[step.confidence == 0] == 0).all()
        seen = step.tokens
