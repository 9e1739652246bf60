"""Decoding as in decode.py, with less work and more options.

`generate` goes through the blocks and `fill_block` through the steps of one. They add

* logits at masks only, a cache (state.py) and classifier-free guidance: `predict`;
* sampling with a temperature, and random remasking: `uniform`, `gumbel`, `pick`, `sample`, `draw`;
* leaving out the rows that are finished: `ActiveBlock`;
* an early end, and columns behind it that are not read: `early_end`, `drop`;
* taking back tokens once, of which it was not sure: `unsure`;
* a record of each step: `Step`, `record`.
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
from .state import DecodingState


@dataclass
class Step:
    """What one step of decoding did to B responses of R tokens. The masks of a block are predicted
    (more in rows with fewer); elsewhere `predicted` is the token itself, with a confidence of 0."""

    tokens: Tensor  # [B, R] after the step; masks where nothing is committed yet
    predicted: Tensor  # [B, R] the token that each position would get now
    confidence: Tensor  # [B, R] softmax probability of that token, free of noise
    committed: Tensor  # bool [B, R], what this step committed
    likely: tuple[Tensor, Tensor] | None = None  # most likely tokens, probabilities [B, R, top]


@dataclass(frozen=True)
class ActiveBlock:
    """A block, and the b of B rows that are not finished when it begins."""

    start: int  # its tokens are from `start` to `stop`
    stop: int
    rows: Tensor  # [b]
    numbers: list[int]  # which answers these rows are, of all that are asked for
    states: list[DecodingState]  # of these rows; a second one is unconditional, for guidance
    eos_id: int  # what ends a response


def predict(block: ActiveBlock, config: DecodeConfig, tokens: Tensor, positions: Tensor,
            fresh: bool) -> Tensor:
    """Logits [b, n, V] at `positions` [b, n] of the block, from all `tokens` [b, R]. `fresh` renews
    a cache; else only the block is computed, and with a prefix cache all after it. With guidance:
    uncond + (s + 1)(cond - uncond)."""
    logits = []
    end = tokens.shape[1] if config.cache == "prefix" else min(block.stop, tokens.shape[1])
    for state in block.states:
        if fresh:
            hidden = state.forward_all(tokens, config)[:, block.start:block.stop]
        else:
            hidden = state.forward_block(tokens, block.start, end)
        logits.append(state.logits(hidden.take_along_dim(positions[..., None], 1)))  # [b, n, V]
    if config.cfg > 0:
        conditional, unconditional = logits
        logits = [unconditional + (config.cfg + 1) * (conditional - unconditional)]
    logits[0][..., block.states[0].mask_id] = -torch.inf  # a mask is not an answer
    return logits[0]


def uniform(kind: str, config: DecodeConfig, key: tuple[int, int, int], *shape: int) -> Tensor:
    """Numbers in [0, 1), float64 [block, *shape], that depend on kind, seed and key alone: which
    answer, start of the block, step. On the CPU, since a Mac's GPU has no float64."""
    drawn = stream(kind, config.seed, *key).random((config.block_length, *shape))
    return torch.from_numpy(drawn)


def gumbel(uniform: Tensor, temperature: float) -> Tensor:
    """What to add to log p, float32: -T log(-log u), for u in [0, 1) in float64. The token of the
    largest sum is a sample from p^(1/T) (Gumbel-max)."""
    return (-temperature * (-uniform.log()).log()).float()


def pick(values: list[Tensor], positions: Tensor) -> Tensor:
    """The values, of each row [block, ...], at `positions` [b, n], on the device of the latter."""
    row = torch.arange(len(positions), device=positions.device)[:, None]
    return torch.stack(values).to(positions.device)[row, positions]


def sample(logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [...] from logits [..., V], and their probabilities without noise: the most likely, or
    drawn with `gumbel` noise [..., V]. Without noise, float32 logits are written over."""
    if noise is None:
        best, tokens = logits.max(-1, keepdim=True)
        return tokens.squeeze(-1), 1 / logits.float().sub_(best).exp_().sum(-1)
    logits = logits.float()
    tokens = (logits + noise).argmax(-1, keepdim=True)
    return tokens.squeeze(-1), (logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)).exp()


def draw(block: ActiveBlock, config: DecodeConfig, step: int, logits: Tensor, positions: Tensor
         ) -> tuple[Tensor, Tensor, Tensor]:
    """What to put at `positions`, its probability, and what is the first to be committed, [b, n]
    each, from logits [b, n, V], which may be written over."""
    keys, noise = [(number, block.start, step) for number in block.numbers], None
    if config.temperature > 0:
        drawn = (uniform("words", config, key, logits.shape[-1]) for key in keys)
        noise = pick([gumbel(u, config.temperature) for u in drawn], positions)  # [b, n, V]
    predicted, confidence = sample(logits, noise)
    if config.remasking == "random":
        places = [uniform("places", config, key).float() for key in keys]
        return predicted, confidence, pick(places, positions)
    return predicted, confidence, confidence


def early_end(predicted: Tensor, confidence: Tensor, candidates: Tensor, config: DecodeConfig,
              eos_id: int) -> tuple[Tensor, Tensor]:
    """Early end: the first candidate that is predicted as EOS with a confidence above
    `eos_threshold`, and all that is behind it, bool [B, R] each. It is committed, and nobody reads
    any more what is behind (arXiv 2601.17917 looks for a confident EOS too, after each block)."""
    ends = candidates & (predicted == eos_id) & (confidence > config.eos_threshold)
    first = ends & (ends.cumsum(-1) == 1)
    return first, (first.cumsum(-1) == 1) & ~first


def unsure(masked: Tensor, held: Tensor, done: Tensor, config: DecodeConfig
           ) -> tuple[Tensor, Tensor]:
    """Revision: once a row of a block has nothing `masked` left, the tokens whose confidence was
    below `revise` when they were committed (`held`, [B, R]) are masked again, bool [B, R]. Rows are
    `done`, bool [B, 1], after that: so a block of n tokens takes at most 2n steps.

    ReMDM (arXiv 2503.00307) draws tokens by that confidence; WINO (arXiv 2507.18578) asks again, at
    masks beside the block: what the model predicts where it sees a token says little."""
    full = ~masked.any(-1, keepdim=True)
    return full & ~done & (held < config.revise), full | done


def drop(block: ActiveBlock, tokens: Tensor, columns: Tensor, end: Tensor) -> Tensor:
    """Have nothing attend to the tokens [B, R] behind an `end`, bool [b, n] at `columns` [b, n];
    returns where they are, bool [B, R]."""
    last = torch.where(end, columns, tokens.shape[1]).amin(1, keepdim=True)  # [b, 1]
    behind = torch.arange(tokens.shape[1], device=end.device) > last  # [b, R]
    for state in block.states:
        state.hide(behind)
    return torch.zeros_like(tokens, dtype=torch.bool).index_put((block.rows,), behind)


def record(before: Tensor, here: tuple[Tensor, Tensor], predicted: Tensor, confidence: Tensor,
           committed: Tensor, likely: tuple[Tensor, Tensor] | None) -> Step:
    """The step that did this to the tokens `before` [B, R]: at `here`, rows and columns [b, n]."""
    def elsewhere_zero(values: Tensor) -> Tensor:  # [b, n, ...] -> [B, R, ...]
        return values.new_zeros(*before.shape, *values.shape[2:]).index_put(here, values)

    return Step(tokens=before.index_put(here, torch.where(committed, predicted, before[here])),
                predicted=before.index_put(here, predicted),
                confidence=elsewhere_zero(confidence), committed=elsewhere_zero(committed),
                likely=likely and tuple(map(elsewhere_zero, likely)))


def fill_block(block: ActiveBlock, tokens: Tensor, config: DecodeConfig, top: int
               ) -> Iterator[Step]:
    """Fill in a block of `tokens` [B, R]; yields each step. A fixed schedule without an early end
    never waits for the device, the other rules once a step or twice."""
    refresh = 1 if config.cache == "none" else config.refresh or config.steps_per_block
    state = block.states[0]
    n = block.stop - block.start  # most masks in a row
    held = torch.ones(tokens.shape, device=tokens.device)  # [B, R], confidence when committed
    done = torch.zeros_like(tokens[:, :1], dtype=torch.bool)  # [B, 1], rows that are revised
    for i in range(config.steps_per_block):
        if config.revise is not None:
            masked = tokens[:, block.start:block.stop] == state.mask_id  # [B, block]
            again, done = unsure(masked, held[:, block.start:block.stop], done, config)
            tokens = tokens.clone()
            tokens[:, block.start:block.stop].masked_fill_(again, state.mask_id)
        seen = tokens[block.rows, :state.n_read]  # [b, R]
        masked = seen[:, block.start:block.stop] == state.mask_id  # [b, block]
        if not config.is_scheduled or config.eos_threshold is not None:
            n = int(masked.sum(1).max())
        if n <= 0:
            return
        # Positions [b, n] of the masks; rows with fewer are filled up with others.
        positions = masked.int().topk(n).indices.sort().values
        candidates = masked.gather(1, positions)  # [b, n], which of them are masks
        here = block.rows[:, None], block.start + positions
        logits = predict(block, config, seen, positions, fresh=i % refresh == 0)  # [b, n, V]
        # Before `draw`, which may write over the logits.
        likely = logits.float().softmax(-1).topk(top)[::-1] if top else None
        predicted, confidence, priority = draw(block, config, i, logits, positions)  # [b, n] each
        committed = commit(priority, candidates, config, i)  # [b, n]
        if config.eos_threshold is not None:
            end, behind = early_end(predicted, confidence, candidates, config, block.eos_id)
            committed = (committed | end) & ~behind  # [b, n] each
            if end.any():
                behind = drop(block, tokens, here[1], end)  # [B, R]
                tokens, held = tokens.masked_fill(behind, block.eos_id), held.masked_fill(behind, 1)
        n -= tokens_in_step(config, i)
        step = record(tokens, here, predicted, confidence, committed, likely)
        tokens, held = step.tokens, torch.where(step.committed, step.confidence, held)
        yield step


@torch.no_grad()
def generate(state: DecodingState, config: DecodeConfig, eos_id: int, top: int = 0,
             numbers: Sequence[int] | None = None) -> Iterator[Step]:
    """Decode the responses of `state` together, each to its own end; yields each step.

    An answer does not depend on its neighbours: its noise depends on which one it is of all that
    are asked for, `numbers` [B] (default: 0, 1, ...). `top`: how many likely tokens a Step has.
    """
    states = [state, state.unconditional()] if config.cfg > 0 else [state]
    tokens = torch.where(state.response, state.mask_id, eos_id)  # [B, R]
    rows = torch.arange(len(tokens), device=tokens.device)  # those that are not finished
    numbers = list(range(len(tokens)) if numbers is None else numbers)
    for start in range(0, tokens.shape[1], config.block_length):
        active = (~finished(tokens[rows], state.mask_id, eos_id)).nonzero().squeeze(1)
        if len(active) == 0:
            return
        kept = active.tolist()  # waits for the device
        rows, numbers = rows[active], [numbers[i] for i in kept]
        states = [each.rows(kept) for each in states]
        stop = min(start + config.block_length, states[0].response.shape[1])
        block = ActiveBlock(start, stop, rows, numbers, states, eos_id)
        for step in fill_block(block, tokens, config, top):
            tokens = step.tokens
            yield step


def generate_responses(model: Diffa2Model, tokenizer: Tokenizer, audio_embeddings: list[Tensor],
                       prompts: list[Prompt], decode: DecodeConfig,
                       numbers: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """Responses [B, R] to prompts with audio embeddings [A, D], decoded together to their end, and
    the number of forward passes. `numbers`: see `generate`."""
    lengths = [decode.gen_length] * len(prompts)
    state = DecodingState(model, audio_embeddings, prompts, lengths, tokenizer.mask_id)
    steps = list(generate(state, decode, tokenizer.eos_id, numbers=numbers))
    return steps[-1].tokens, len(steps) * (2 if decode.cfg > 0 else 1)
