"""The state of decoding a batch: prompts with audio, responses, and cached keys and values.

There are three ways to compute the hidden states of a block: without a cache, with a *prefix cache*
of everything before the block, and with a *dual cache* of everything after it too (Fast-dLLM, arXiv
2505.22618, section 3.2). Attention is bidirectional, so the keys and values of a token change
whenever another token does. Kept ones are an approximation, which a `fresh` step renews.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from ..config import DecodeConfig
from ..model import Diffa2Model, lay_out
from ..tokenizer import Prompt
from .cache import KeyValueCache, Slot, empty_caches, place, slot_for

CACHES = ("none", "prefix", "dual")
CAPTURES_ON = ("cuda",)  # kinds of device
PLAIN = DecodeConfig()  # without a cache


class DecodingState:
    """B responses of R tokens behind their prompts. Row b has `lengths[b]` tokens, then padding."""

    def __init__(self, model: Diffa2Model, audio_embeddings: list[Tensor], prompts: list[Prompt],
                 lengths: list[int], mask_id: int):
        self.model, self.audio_embeddings, self.prompts = model, audio_embeddings, prompts
        self.lengths, self.mask_id = lengths, mask_id
        self.before, n_before = model.splice(audio_embeddings, prompts)  # [B, P, D], [B]
        self.n_before = self.before.shape[1]  # P
        rows = [self.before.new_ones(n, dtype=torch.bool) for n in lengths]
        self.response = pad_sequence(rows, batch_first=True)  # bool [B, R], False at padding
        self.positions, self.valid = lay_out(n_before, self.n_before, self.response)  # [B, P + R]
        if len({(len(audio) + len(prompt.ids), n) for audio, prompt, n in
                zip(audio_embeddings, prompts, lengths)}) == 1:
            self.valid = None  # no padding, and attention without a mask is faster
        self.n_read = self.response.shape[1]  # columns of responses that are still to be read
        self.caches: list[KeyValueCache] = []
        self.slot: Slot | None = None  # with the caches of a step that is a CUDA graph

    def rows(self, keep: list[int]) -> "DecodingState":
        """The state of these rows alone, with an empty cache; with all rows, the state itself."""
        if len(keep) == len(self.lengths):
            return self
        self.slot = None
        batch = (self.audio_embeddings, self.prompts, self.lengths)
        kept = ([values[i] for i in keep] for values in batch)
        return DecodingState(self.model, *kept, self.mask_id)

    def unconditional(self) -> "DecodingState":
        """The state with the text of the prompts masked, for classifier-free guidance."""
        prompts = [Prompt([self.mask_id] * len(prompt.ids), prompt.audio_at)
                   for prompt in self.prompts]
        return DecodingState(self.model, self.audio_embeddings, prompts, self.lengths, self.mask_id)

    def hide(self, behind: Tensor) -> None:
        """From now on nothing attends to these tokens, bool [B, R], all until the end of a row. A
        recorded step reads them all the same, as its shape is fixed."""
        visible = ~pad(behind[:, :self.response.shape[1]], (self.n_before, 0))  # [B, P + R]
        self.valid = visible if self.valid is None else self.valid & visible
        if self.slot:
            self.slot.hide(self.valid)
        else:
            self.n_read = int(self.valid[:, self.n_before:].any(0).sum())

    def forward_all(self, tokens: Tensor, how: DecodeConfig = PLAIN) -> Tensor:
        """Hidden states [B, n, D] of the tokens [B, n], computed with everything before them. All
        keys and values are put into the cache, if there is one; with `capture`, into a graph's."""
        x = torch.cat([self.before, self.model.llada.wte(tokens)], dim=1)  # [B, P + n, D]
        caches, positions = None, self.positions[:, :x.shape[1]]
        valid = None if self.valid is None else self.valid[:, :x.shape[1]]
        if how.capture and x.device.type in CAPTURES_ON:
            self.slot = self.slot or slot_for(self, self.model.llada, *x.shape[:2], how.compile)
            return self.slot.read_all(x, valid, positions)[:, self.n_before:]
        if how.cache != "none":
            self.caches = self.caches or empty_caches(self.model.llada, *self.positions.shape)
            caches = place(self.caches, torch.arange(x.shape[1], device=x.device))
            valid = self.valid  # of all that is in the cache
        return self.model.llada(x, valid, positions, caches, self.n_before)

    def forward_block(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Hidden states [B, n, D] of the n tokens from `start` to `stop`, by the latest cache."""
        at = torch.arange(self.n_before + start, self.n_before + stop, device=tokens.device)  # [n]
        x = self.model.llada.wte(tokens[:, start:stop])  # [B, n, D]
        if self.slot:
            return self.slot.read_slice(x, at)
        return self.model.llada(x, self.valid, self.positions[:, at], place(self.caches, at))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.llada.logits(hidden)
