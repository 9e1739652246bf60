"""DIFFA-2 in one piece: the encoder hears, the adapters translate, the backbone reads and fills in
the answer.

The audio's embeddings are spliced into the prompt right after `This is the audio:` (arXiv
2601.23161, section 3.2). A row of a batch is prompt with audio, padding, response, padding.
Positions count on as if the padding were not there, and nothing attends to it, so a batch gives
what each clip gives alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .adapters import AcousticAdapter, SemanticAdapter
from .config import Config
from .llada import Llada
from .lora import add_lora
from .tokenizer import Prompt
from .whisper import WhisperEncoder

PREFIXES = {
    "semantic": "semantic_connector.", "acoustic": "acoustic_connector.",
    "prompts": "trainable_prompts.", "whisper": "whisper.", "llada": "llada."}


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: a key of PREFIXES, or `lora`."""
    if "lora_" in name:
        return "lora"
    return next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))


@dataclass
class Audio:
    """What the encoder made of B clips: its final hidden state [B, T, E], its taps [B, N, T, E],
    and how many frames of each clip hold sound [B]."""

    final: Tensor
    taps: Tensor
    n_frames: Tensor


class Diffa2Model(nn.Module):
    """The whole model. All of it is frozen until `train_only` names the parts to train. The parts
    that are never trained may be made on the device `frozen_on`: on `meta`, they take no memory
    until they are filled. `llada` is the backbone's class."""

    def __init__(self, config: Config, frozen_on: str | None = None, llada: type[Llada] = Llada):
        super().__init__()
        self.config = config
        width = config.llada.width
        frozen = torch.device(frozen_on or torch.get_default_device())
        with frozen:
            self.whisper = WhisperEncoder(config.whisper)
        self.semantic_connector = SemanticAdapter(config.adapter, config.whisper.width, width)
        self.acoustic_connector = AcousticAdapter(config.adapter, config.whisper, width)
        self.trainable_prompts = nn.Embedding(config.adapter.n_prompts, width)
        with frozen:
            self.llada = llada(config.llada)
        self.requires_grad_(False)
        self.fingerprints: dict[str, str] = {}  # of what its parts were filled from, by weights.py

    def add_lora(self) -> None:
        """Give the backbone its LoRA, which starts as the identity. Adding it again changes
        nothing."""
        add_lora(self.llada, self.config.lora)

    def train_only(self, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
        """Freeze all but `parts`; returns what is left to train, by name."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad}

    @torch.no_grad()
    def encode(self, mel: Tensor, n_frames: Tensor) -> Audio:
        """log-mel [B, n_mels, M] -> hidden states. The encoder is never trained."""
        final, taps = self.whisper(mel)
        return Audio(final, taps, n_frames)

    def embed_audio(self, audio: Audio, parts: tuple[str, ...]) -> list[Tensor]:
        """The embeddings [A, D] of each clip: `parts` in order, such as ("acoustic",
        "semantic")."""
        rows = [[] for _ in audio.n_frames]
        for part in parts:
            if part == "semantic":
                embeddings, n_real = self.semantic_connector(audio.final, audio.n_frames)
            elif part == "acoustic":
                embeddings, n_real = self.acoustic_connector(audio.taps), None
            else:
                embeddings, n_real = self.trainable_prompts.weight.expand(len(rows), -1, -1), None
            for i, row in enumerate(rows):
                row.append(embeddings[i] if n_real is None else embeddings[i, :n_real[i]])
        return [torch.cat(row) for row in rows]

    def splice(self, audio_embeddings: list[Tensor],
               prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, D] of the prompts with the audio in them, padded on the right, and
        their lengths [B]."""
        rows = []
        for audio, prompt in zip(audio_embeddings, prompts, strict=True):
            text = self.llada.wte(torch.tensor(prompt.ids, device=audio.device))  # [L, D]
            rows.append(torch.cat([text[:prompt.audio_at],
                                   audio.to(text.dtype), text[prompt.audio_at:]]))
        return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows],
                                                                  device=audio_embeddings[0].device)

    def hidden_states(self, audio_embeddings: list[Tensor], prompts: list[Prompt], response: Tensor,
                      valid: Tensor) -> Tensor:
        """Final hidden states [B, R, D] of `response` [B, R] behind its prompt; `real` [B, R] is
        False at padding. The head makes logits of them: `llada.logits`."""
        before, lengths = self.splice(audio_embeddings, prompts)
        positions, valid = lay_out(lengths, before.shape[1], valid)
        x = torch.cat([before, self.llada.wte(response)], dim=1)  # [B, P + R, D]
        return self.llada(x, valid, positions, first=before.shape[1])

    def forward(self, audio: Audio, parts: tuple[str, ...], prompts: list[Prompt], response: Tensor,
                valid: Tensor, select: Tensor) -> Tensor:
        """Hidden states [K, D] of the K tokens that `select` [B * n, R] marks, of n responses
        [B * n, R] to each of B clips, those of a clip together. See `hear` and `hidden_states`."""
        audio_embeddings = self.embed_audio(audio, parts)
        n = len(response) // len(audio_embeddings)
        audio_embeddings, prompts = [h for h in audio_embeddings
                                     for _ in range(n)], [p for p in prompts for _ in range(n)]
        return self.hidden_states(audio_embeddings, prompts, response, valid)[select]


def lay_out(lengths: Tensor, n_columns: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, P + R] of prompts of `lengths` [B], padded to `n_columns`, and of the responses
    behind that padding, which go on counting where their prompt ended; and what of it is `real` [B,
    P + R], given that of the responses."""
    # [B, P]
    cache_positions = torch.arange(n_columns, device=valid.device).expand(len(lengths), -1)
    after = lengths[:, None] + torch.arange(valid.shape[1], device=valid.device)  # [B, R]
    return torch.cat([cache_positions, after], dim=1), torch.cat(
        [cache_positions < lengths[:, None], valid], dim=1)
