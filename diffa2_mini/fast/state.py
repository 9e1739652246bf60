"""The state of decoding a batch: prompts with audio, responses, and the keys and values that are
kept from one step to the next.

Three ways to make the hidden states of a block, which all give the same where everything is
renewed: without a cache, with a *prefix cache* of what stands before the block, and with a *dual
cache* of what stands behind it too (Fast-dLLM, arXiv 2505.22618, section 3.2).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import Diffa2Model, lay_out
from ..tokenizer import Prompt
from .cache import KeyValueCache, empty_caches, place


class DecodingState:
    """B responses of R tokens behind their prompts. `lengths` are those of the responses; what is
    behind is padding. Tokens are [B, R], hidden states [B, ..., D]."""

    def __init__(self, model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                 lengths: list[int], mask_id: int):
        self.model, self.audio_embeddings, self.prompts = model, audio_embeddings, prompts
        self.lengths, self.mask_id = lengths, mask_id
        self.before, n_before = model.splice(audio_embeddings, prompts)  # [B, P, D], [B]
        self.n_before = self.before.shape[1]
        until = torch.tensor(lengths, device=self.before.device)[:, None]
        # Which tokens of the responses are no padding: bool [B, R].
        self.response = torch.arange(max(lengths), device=self.before.device) < until
        self.positions, self.valid = lay_out(n_before, self.n_before, self.response)
        if len({*lengths}) == 1 and int(n_before.min()) == self.n_before:
            self.valid = None  # attention is faster if it has nothing to leave out
        self.caches: list[KeyValueCache] = []
        self.run_slice: Callable = self.forward_slice  # or one that is faster, on CUDA

    def rows(self, keep: list[int]) -> "DecodingState":
        """The state of these rows alone, with an empty cache."""
        if len(keep) == len(self.lengths):
            return self
        kept = ([values[i] for i in keep] for values in
                (self.audio_embeddings, self.prompts, self.lengths))
        return DecodingState(self.model, *kept, self.mask_id)

    def unconditional(self) -> "DecodingState":
        """The state with the text of the prompts masked, for classifier-free guidance."""
        prompts = [Prompt([self.mask_id] * len(prompt.ids), prompt.audio_at)
                   for prompt in self.prompts]
        return DecodingState(self.model, self.audio_embeddings, prompts, self.lengths, self.mask_id)

    def forward_all(self, tokens: Tensor, keep: bool = False) -> Tensor:
        """Hidden states [B, R, D] of responses, from prompt, audio and responses anew. With `keep`,
        all keys and values are put into the cache."""
        x = torch.cat([self.before, self.model.llada.wte(tokens)], dim=1)  # [B, P + R, D]
        caches = None
        if keep:
            self.caches = self.caches or empty_caches(self.model.llada, *x.shape[:2])
            caches = place(self.caches, torch.arange(x.shape[1], device=x.device))
        return self.model.llada(x, self.valid, self.positions, caches, self.n_before)

    def forward_block(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states [B, stop - start, D] of a block, from its tokens and the cache."""
        at = torch.arange(self.n_before + start, self.n_before + stop, device=tokens.device)
        x = self.model.llada.wte(tokens[:, start:stop])
        return self.run_slice(x, self.positions[:, at], at)

    def forward_slice(self, x: Tensor, positions: Tensor, at: Tensor) -> Tensor:
        """Hidden states of embeddings x [B, n, D] at the cache positions `at` [n], whose keys and
        values are renewed."""
        return self.model.llada(x, self.valid, positions, place(self.caches, at))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.llada.logits(hidden)


def uncached(state: DecodingState, tokens: Tensor, start: int, stop: int, fresh: bool) -> Tensor:
    """Everything is computed in every step."""
    return state.forward_all(tokens)[:, start:stop]


def prefix_cached(state: DecodingState, tokens: Tensor, start: int, stop: int, fresh: bool
                  ) -> Tensor:
    """Everything is computed when `fresh`, else the block and what follows it."""
    if fresh:
        return state.forward_all(tokens, keep=True)[:, start:stop]
    return state.forward_block(tokens, start, tokens.shape[1])[:, :stop - start]


def dual_cached(state: DecodingState, tokens: Tensor, start: int, stop: int, fresh: bool) -> Tensor:
    """Everything is computed when `fresh`, else the block alone."""
    if fresh:
        return state.forward_all(tokens, keep=True)[:, start:stop]
    return state.forward_block(tokens, start, stop)


BLOCK_STATES = {"none": uncached, "prefix": prefix_cached, "dual": dual_cached}  # [B, block, D]
