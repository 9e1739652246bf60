"""The reverse process: from a response of masks to an answer, many tokens at a time (arXiv 2502.09992, section 2.4).

Each step predicts every masked token at once, then commits some of the predictions and leaves the rest masked. Which
ones is the decoder's whole question. The *fixed schedule* of LLaDA commits equally many in each step, the most
confident first (or random ones). The *threshold* of Fast-dLLM (arXiv 2505.22618, section 3.3) commits what is more
confident than, say, 0.9. Its *factor-based parallel decoding* commits as many as their joint confidence allows: sorted
c_1 >= c_2 >= ..., token n goes while (n + 1)(1 - c_n) <= f. Either way the most confident token goes always. The response
is filled in block by block, from left to right, and ends early once its EOS is settled.

Every token looks both ways: when one is committed, the keys and values of all others change, those of prompt and audio too.
So none can be remembered exactly, as they can in a model that looks back alone. But from one step to the next they change little
(Fast-dLLM, section 3.2): the *prefix cache* remembers, from a block's first step on, what stands before the block, the *dual
cache* what stands behind it too. Share of right answers, forward passes and seconds for the 958 toy questions, 64 at once,
blocks of 16 (`python -m diffa2_mini.bench --toy`; 2 cores of an Intel Xeon, family 6, model 207; an answer is one block, so that
nothing stands behind it and both caches are the same):

    f         0.25              0.5               1                 2
    none    0.928  49   9.7 s  0.924  45   8.7 s  0.919  42   8.1 s  0.907  31   6.5 s
    prefix  0.912  50   4.8 s  0.914  45   4.6 s  0.910  42   4.8 s  0.903  31   4.4 s
    dual    0.912  50   4.6 s  0.914  45   5.1 s  0.910  42   4.3 s  0.903  31   4.5 s

The default is no cache: it costs accuracy, and a toy answer alone takes 1.8 forward passes at f = 0.5 (`python tutorials/claims.py
--only factor`), the first of which reads everything in any case, so that there is little to save but in large batches.
Long answers are another matter: there the cache is several times faster (README, "Speed").
"""

from dataclasses import dataclass
from typing import Iterator, Sequence

import torch
from torch import Tensor

from .config import DecodeConfig
from .device import Captured
from .model import Reader
from .noise import stream


@dataclass
class Step:
    """What one step of decoding did to each of B responses of R tokens. Only the masks of the block that is being filled in
    are predicted; elsewhere `predicted` is what stands there, with a confidence of 0."""

    tokens: Tensor  # [B, R] after the step; masks where nothing is committed yet
    predicted: Tensor  # [B, R] the token that each position would get now
    confidence: Tensor  # [B, R] softmax probability of that token, free of noise
    committed: Tensor  # bool [B, R], what this step settled
    likely: tuple[Tensor, Tensor] | None = None  # if asked for: the likeliest tokens [B, R, top] and their probabilities


# ------------------------------------------------------------------------------------------------- what to commit


def choose(logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """A token for each position and its probability, from logits [..., V]. With `gumbel` noise
    [..., V], float32, the token is drawn; the probability is the same with and without noise."""
    if noise is None:
        best, tokens = logits.max(-1, keepdim=True)
        return tokens.squeeze(-1), 1 / logits.float().sub_(best).exp_().sum(-1)
    logits = logits.float()
    tokens = (logits + noise).argmax(-1, keepdim=True)
    return tokens.squeeze(-1), (logits.gather(-1, tokens).squeeze(-1) - logits.logsumexp(-1)).exp()


def most_confident(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Fixed schedule: the k candidates [B, R] of highest confidence (fewer if there are fewer), as bool [B, R]."""
    ranked = confidence.masked_fill(~candidates, -1).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidates).scatter(-1, ranked[:, :k], True)
    return chosen & candidates


def factor_based(confidence: Tensor, candidates: Tensor, factor: float) -> Tensor:
    """Factor-based parallel decoding: how many candidates go is decided by their confidence; bool [B, R]."""
    ordered, ranked = confidence.masked_fill(~candidates, -1).sort(dim=-1, descending=True, stable=True)
    n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    go = (n + 1) * (1 - ordered) <= factor
    go[:, 0] = True
    until_first_failure = go.long().cumprod(-1).bool()
    return torch.zeros_like(candidates).scatter(-1, ranked, until_first_failure) & candidates


def above_threshold(confidence: Tensor, candidates: Tensor, threshold: float) -> Tensor:
    """The candidates more confident than the threshold, and the most confident one in any case; bool [B, R]."""
    return candidates & (confidence > threshold) | most_confident(confidence, candidates, 1)


def finished(tokens: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """bool [B]: the response has an EOS with no mask before it."""
    first_eos = (tokens == eos_id).long().cumsum(-1) == 0  # True before the first EOS
    has_eos = ~first_eos[:, -1]
    return has_eos & ~((tokens == mask_id) & first_eos).any(-1)


# --------------------------------------------------------------------------------------------------------- caches


def uncached(reader: Reader, tokens: Tensor, start: int, stop: int, fresh: bool) -> Tensor:
    """Prompt, audio and response are read in every step."""
    return reader.read(tokens)[:, start:stop]


def prefix_cached(reader: Reader, tokens: Tensor, start: int, stop: int, fresh: bool) -> Tensor:
    """What stands before the block is read when `fresh`, and remembered; the block and what follows is read in every step."""
    if fresh:
        return reader.read(tokens, remember=True)[:, start:stop]
    return reader.reread(tokens, start, tokens.shape[1])[:, :stop - start]


def dual_cached(reader: Reader, tokens: Tensor, start: int, stop: int, fresh: bool) -> Tensor:
    """What stands before and behind the block is read when `fresh`, and remembered; the block is read in every step."""
    if fresh:
        return reader.read(tokens, remember=True)[:, start:stop]
    return reader.reread(tokens, start, stop)


HIDDEN = {"none": uncached, "prefix": prefix_cached, "dual": dual_cached}  # states [B, stop - start, D] of the block


# ---------------------------------------------------------------------------------------------------------- chance


def gumbel(uniform: Tensor, temperature: float) -> Tensor:
    """What to add to log p, as float32: -T log(-log u), for u in [0, 1) in float64. The largest sum
    is then a sample from p^(1/T) (Gumbel-max). As a quotient, p / (-log u)^T would be 0/0 where T
    is high and p is 0."""
    return (-temperature * (-uniform.log()).log()).float()


def draw(config: DecodeConfig, numbers: list[int], start: int, step: int, places: Tensor,
         n_tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """What chance adds in a step to the log probabilities [B, n, V] at `places` [B, n] of a block,
    of the answers with these `numbers`; and in which order [B, n] it settles them. None where it
    decides nothing. float32, and made on the CPU, since a Mac's GPU has no float64."""
    def uniform(kind: str, number: int, *shape: int) -> Tensor:
        drawn = stream(kind, config.seed, number, start, step).random((config.block_length, *shape))
        return torch.from_numpy(drawn)  # in [0, 1), float64

    noise = order = None
    rows = torch.arange(len(numbers), device=places.device)[:, None]
    if config.temperature > 0:
        noise = torch.stack([gumbel(uniform("words", number, n_tokens), config.temperature)
                             for number in numbers]).to(places.device)[rows, places]
    if config.remasking == "random":
        order = torch.stack([uniform("places", number).float()
                             for number in numbers]).to(places.device)[rows, places]
    return noise, order


# -------------------------------------------------------------------------------------------------------- the loop


def share(config: DecodeConfig, i: int) -> int:
    """How many tokens step i of a block settles on a fixed schedule; the remainder goes first."""
    equal, remainder = divmod(config.block_length, config.steps_per_block)
    return equal + (i < remainder)


def commit(confidence: Tensor, candidates: Tensor, order: Tensor, k: int, config: DecodeConfig) -> Tensor:
    """What a step settles: bool [B, n]. A fixed schedule takes k, the first in `order`."""
    if config.factor is not None:
        return factor_based(confidence, candidates, config.factor)
    if config.threshold is not None:
        return above_threshold(confidence, candidates, config.threshold)
    return most_confident(order, candidates, k)


def logits_at(places: Tensor, reader: Reader, hidden: Tensor) -> Tensor:
    """Logits [B, n, V] at `places` [B, n] of a block with the states `hidden` [B, block, D]."""
    return reader.logits(hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])))


def predict(readers: list[Reader], config: DecodeConfig, seen: Tensor, places: Tensor, start: int,
            stop: int, fresh: bool) -> Tensor:
    """Logits [B, n, V] at `places` [B, n] of the block from `start` to `stop`, where `seen` [B, R]
    are the tokens so far. With a second reader, which is blind, they are guided. `fresh` has a
    cache read everything."""
    logits, *blind = [
        logits_at(places, reader, HIDDEN[config.cache](reader, seen, start, stop, fresh))
        for reader in readers]
    if blind:
        logits = blind[0] + (config.cfg + 1) * (logits - blind[0])
    logits[..., readers[0].mask_id] = -torch.inf  # a mask is not an answer
    return logits


def tell(before: Tensor, here: tuple[Tensor, Tensor], predicted: Tensor, confidence: Tensor,
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


def captured(reader: Reader, config: DecodeConfig) -> Reader:
    """The reader, which on CUDA records the step that reads from its cache, if that is asked for."""
    on_cuda = reader.response.device.type == "cuda"
    if config.capture and on_cuda and not isinstance(reader.again, Captured):
        reader.again = Captured(reader.read_slice)
    return reader


@torch.no_grad()
def generate(reader: Reader, config: DecodeConfig, eos_id: int, top: int = 0,
             numbers: Sequence[int] | None = None) -> Iterator[Step]:
    """Decode the responses that `reader` reads, together, each to its own end; yields each step.
    An answer does not depend on its neighbours: what is drawn for it depends on which of all that
    are asked it is, as `numbers` tells (default: from 0 on). A fixed schedule waits for the device
    once a block, the others once a step. With `top`, a step tells the likeliest tokens of each mask
    too."""
    mask_id, device = reader.mask_id, reader.response.device
    refresh = config.refresh or config.block_length
    readers = [reader, reader.blind()] if config.cfg > 0 else [reader]
    tokens = torch.where(reader.response, mask_id, eos_id)  # [B, R]
    going = torch.arange(len(tokens), device=device)  # the rows that are not finished
    numbers = list(range(len(tokens)) if numbers is None else numbers)  # of these rows
    for start in range(0, tokens.shape[1], config.block_length):
        left = (~finished(tokens[going], mask_id, eos_id)).nonzero().squeeze(1)
        if len(left) == 0:
            return
        kept = left.tolist()
        going, numbers = going[left], [numbers[i] for i in kept]
        readers = [captured(reader.rows(kept), config) for reader in readers]
        stop = min(start + config.block_length, readers[0].response.shape[1])
        n = stop - start  # masks in a row of the block, at most
        for i in range(config.steps_per_block):
            seen = tokens[going, :readers[0].response.shape[1]]
            masked = seen[:, start:stop] == mask_id
            n = n if config.is_scheduled else int(masked.sum(1).max())
            if n <= 0:
                break
            places = masked.int().topk(n).indices.sort().values  # [B, n]; others too where fewer
            logits = predict(readers, config, seen, places, start, stop, fresh=i % refresh == 0)
            # Now, since `choose` writes over the logits: tokens, and their probabilities.
            likely = logits.float().softmax(-1).topk(top)[::-1] if top else None
            noise, order = draw(config, numbers, start, i, places, logits.shape[-1])
            predicted, confidence = choose(logits, noise)
            committed = commit(confidence, masked.gather(1, places),
                               confidence if order is None else order, share(config, i), config)
            n -= share(config, i)
            step = tell(tokens, (going[:, None], start + places), predicted, confidence, committed,
                        likely)
            tokens = step.tokens
            yield step
