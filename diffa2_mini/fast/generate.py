"""Decoding as decode.py does it, with less work, and with what one may want beside it.

Each addition can be read alone: logits of masks alone, cached keys and values, rows that end before
others, sampling by a temperature, random remasking, classifier-free guidance, and a record of each
step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import DecodeConfig
from ..decode import commit, finished, tokens_in_step
from ..model import Diffa2Model
from ..noise import stream
from ..tokenizer import Prompt, Tokenizer
from .graphs import Captured
from .state import BLOCK_STATES, DecodingState


@dataclass
class Step:
    """What one step of decoding did to each of B responses of R tokens. Only the masks of the block
    that is being filled in are predicted; elsewhere `predicted` is what stands there, with a
    confidence of 0."""

    tokens: Tensor  # [B, R] after the step; masks where nothing is committed yet
    predicted: Tensor  # [B, R] the token that each position would get now
    confidence: Tensor  # [B, R] softmax probability of that token, free of noise
    committed: Tensor  # bool [B, R], what this step settled
    # if asked for: the likeliest tokens [B, R, top] and their probabilities
    likely: tuple[Tensor, Tensor] | None = None


# ----------------------------------------------------------------------------------------- sampling


def sample(logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token for each position and its probability, from logits [..., V]. With `gumbel` noise
    [..., V], float32, the token is drawn; the probability is the same with and without noise."""
    if noise is None:
        best, tokens = logits.max(-1, keepdim=True)
        return tokens.squeeze(-1), 1 / logits.float().sub_(best).exp_().sum(-1)
    logits = logits.float()
    tokens = (logits + noise).argmax(-1, keepdim=True)
    return tokens.squeeze(-1), (logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)).exp()


def gumbel(uniform: Tensor, temperature: float) -> Tensor:
    """What to add to log p, as float32: -T log(-log u), for u in [0, 1) in float64. The largest sum
    is then a sample from p^(1/T) (Gumbel-max). As a quotient, p / (-log u)^T would be 0/0 where T
    is high and p is 0."""
    return (-temperature * (-uniform.log()).log()).float()


def draw(config: DecodeConfig, numbers: list[int], start: int, step: int, mask_positions: Tensor,
         n_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """What chance adds in a step to the log probabilities [B, n, V] at `mask_positions` [B, n] of a
    block, of the answers with these `numbers`; and in which order [B, n] it settles them. None
    where it decides nothing. float32, and made on the CPU, since a Mac's GPU has no float64."""
    def uniform(kind: str, number: int, *shape: int) -> Tensor:
        drawn = stream(kind, config.seed, number, start, step).random((config.block_length, *shape))
        return torch.from_numpy(drawn)  # in [0, 1), float64

    noise = order = None
    rows = torch.arange(len(numbers), device=mask_positions.device)[:, None]
    if config.temperature > 0:
        noise = torch.stack([gumbel(uniform("words", number, n_tokens), config.temperature)
                             for number in numbers]).to(rows.device)[rows, mask_positions]
    if config.remasking == "random":
        order = torch.stack([uniform("places", number).float()
                             for number in numbers]).to(rows.device)[rows, mask_positions]
    return noise, order


# ----------------------------------------------------------------------------- logits, and guidance


def logits_at(mask_positions: Tensor, state: DecodingState, hidden: Tensor) -> Tensor:
    """Logits [B, n, V] at `mask_positions` [B, n] of a block with the states `hidden` [B, block,
    D]."""
    return state.logits(hidden.gather(1, mask_positions[..., None].expand(-1, -1,
                                                                          hidden.shape[-1])))


def predict(states: list[DecodingState], config: DecodeConfig, seen: Tensor, mask_positions: Tensor,
            start: int, stop: int, fresh: bool) -> Tensor:
    """Logits [B, n, V] at `mask_positions` [B, n] of the block from `start` to `stop`, where `seen`
    [B, R] are the tokens so far. With a second state, which is unconditional, they are guided.
    `fresh` renews a cache."""
    logits, *unconditional = [
        logits_at(mask_positions, state, BLOCK_STATES[config.cache](state, seen, start, stop,
                                                                    fresh)) for state in states]
    if unconditional:
        logits = unconditional[0] + (config.cfg + 1) * (logits - unconditional[0])
    logits[..., states[0].mask_id] = -torch.inf  # a mask is not an answer
    return logits


# ---------------------------------------------------------------------------------------- recording


def record(before: Tensor, here: tuple[Tensor, Tensor], predicted: Tensor, confidence: Tensor,
         committed: Tensor, likely: tuple[Tensor, Tensor] | None) -> Step:
    """The step that did this to the tokens `before` [B, R]: at `here`, [B, n] rows and columns."""
    step = Step(before.clone(), before.clone(), torch.zeros_like(before, dtype=confidence.dtype),
                torch.zeros_like(before, dtype=torch.bool))
    step.tokens[here] = torch.where(committed, predicted, before[here])
    step.predicted[here], step.confidence[here] = predicted, confidence
    step.committed[here] = committed
    if likely:
        step.likely = tuple(values.new_zeros(*before.shape, values.shape[-1]) for values in likely)
        for told, values in zip(step.likely, likely):
            told[here] = values
    return step


# ----------------------------------------------------------------------------------------- the loop


def captured(state: DecodingState, config: DecodeConfig) -> DecodingState:
    """The state, which on CUDA records the step that uses its cache, if that is asked for."""
    on_cuda = state.response.device.type == "cuda"
    if config.capture and on_cuda and not isinstance(state.run_slice, Captured):
        state.run_slice = Captured(state.forward_slice)
    return state


@torch.no_grad()
def generate(state: DecodingState, config: DecodeConfig, eos_id: int, top: int = 0,
             numbers: Sequence[int] | None = None) -> Iterator[Step]:
    """Decode the responses of `state` together, each to its own end; yields each step.

    An answer does not depend on its neighbours: what is drawn for it depends on which of all that
    are asked it is, as `numbers` tells (default: from 0 on). A fixed schedule waits for the device
    once a block, the others once a step. With `top`, a step tells the likeliest tokens of each
    mask.
    """
    mask_id, device = state.mask_id, state.response.device
    refresh = config.refresh or config.block_length
    states = [state, state.unconditional()] if config.cfg > 0 else [state]
    tokens = torch.where(state.response, mask_id, eos_id)  # [B, R]
    active = torch.arange(len(tokens), device=device)  # the rows that are not finished
    numbers = list(range(len(tokens)) if numbers is None else numbers)  # of these rows
    for start in range(0, tokens.shape[1], config.block_length):
        left = (~finished(tokens[active], mask_id, eos_id)).nonzero().squeeze(1)
        if len(left) == 0:
            return
        kept = left.tolist()
        active, numbers = active[left], [numbers[i] for i in kept]
        states = [captured(state.rows(kept), config) for state in states]
        stop = min(start + config.block_length, states[0].response.shape[1])
        n = stop - start  # masks in a row of the block, at most
        for i in range(config.steps_per_block):
            seen = tokens[active, :states[0].response.shape[1]]
            masked = seen[:, start:stop] == mask_id
            n = n if config.is_scheduled else int(masked.sum(1).max())
            if n <= 0:
                break
            mask_positions = masked.int().topk(n).indices.sort().values  # [B, n]; a row that has
            candidates = masked.gather(1, mask_positions)  # fewer masks fills up with other tokens
            logits = predict(states, config, seen, mask_positions, start, stop, i % refresh == 0)
            # Now, since `sample` writes over the logits: tokens, and their probabilities.
            likely = logits.float().softmax(-1).topk(top)[::-1] if top else None
            noise, order = draw(config, numbers, start, i, mask_positions, logits.shape[-1])
            predicted, confidence = sample(logits, noise)
            committed = commit(confidence if order is None else order, candidates, config, i)
            n -= tokens_in_step(config, i)
            here = active[:, None], start + mask_positions
            step = record(tokens, here, predicted, confidence, committed, likely)
            tokens = step.tokens
            yield step


def generate_responses(model: Diffa2Model, tokenizer: Tokenizer, audio_embeddings: list[Tensor],
                       prompts: list[Prompt], decode: DecodeConfig,
                       numbers: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Responses [B, R] to prompts with audio embeddings [A, D], decoded together to their end, and
    the number of forward passes. `numbers`: see `generate`."""
    lengths = [decode.gen_length] * len(prompts)
    state = DecodingState(model, audio_embeddings, prompts, lengths, tokenizer.mask_id)
    n_steps = 0
    for step in generate(state, decode, tokenizer.eos_id, numbers=numbers):
        tokens, n_steps = step.tokens, n_steps + 1
    return tokens, n_steps * decode.passes_per_step
