"""DIFFA-2 in one piece: the encoder hears, the adapters translate, the backbone reads and fills in the answer.

The audio's embeddings are spliced into the prompt right after `This is the audio:` (arXiv 2601.23161, section 3.2).
Rows of a batch are padded on the right and nothing attends to the padding, so a batch gives what each clip gives alone.
"""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .adapters import AcousticAdapter, SemanticAdapter
from .config import Config
from .llada import Llada
from .lora import add_lora
from .tokenizer import Prompt
from .whisper import WhisperEncoder

PREFIXES = {"semantic": "semantic_connector.", "acoustic": "acoustic_connector.", "prompts": "trainable_prompts.",
            "whisper": "whisper.", "llada": "llada."}


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: a key of PREFIXES, or `lora`."""
    if "lora_" in name:
        return "lora"
    return next(part for part, prefix in PREFIXES.items() if name.startswith(prefix))


@dataclass
class Audio:
    """What the encoder made of B clips: its final hidden state [B, T, E], its taps [B, N, T, E], and how many frames of
    each clip hold sound [B]."""

    final: Tensor
    taps: Tensor
    n_frames: Tensor


class Diffa2(nn.Module):
    """The whole model. All of it is frozen until `train_only` names the parts to train. The parts that are never trained may be
    made on the device `frozen_on`: on `meta`, they take no memory until they are filled."""

    def __init__(self, config: Config, frozen_on: str | None = None):
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
            self.llada = Llada(config.llada)
        self.requires_grad_(False)

    def add_lora(self) -> None:
        """Give the backbone its LoRA, which starts as the identity. Adding it again changes nothing."""
        add_lora(self.llada, self.config.lora)

    def train_only(self, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
        """Freeze all but `parts`; returns what is left to train, by name."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def encode(self, mel: Tensor, n_frames: Tensor) -> Audio:
        """log-mel [B, n_mels, M] -> hidden states. The encoder is never trained."""
        final, taps = self.whisper(mel)
        return Audio(final, taps, n_frames)

    def hear(self, audio: Audio, parts: tuple[str, ...]) -> list[Tensor]:
        """The embeddings [A, D] of each clip: `parts` in order, such as ("acoustic", "semantic")."""
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

    def splice(self, heard: list[Tensor], prompts: list[Prompt], response: Tensor, real: Tensor):
        """Embeddings [B, S, D] of prompt with audio, then response; which of them are not padding [B, S]; and where the
        response stands [B, R]. `response` is [B, R], `real` is False at its padding."""
        device, embed = response.device, self.llada.wte
        rows, reals, starts = [], [], []
        for audio, prompt, tokens, tokens_real in zip(heard, prompts, response, real, strict=True):
            text = embed(torch.tensor(prompt.ids, device=device))  # [L, D]
            row = torch.cat([text[:prompt.audio_at], audio.to(text.dtype), text[prompt.audio_at:], embed(tokens)])
            starts.append(len(row) - len(tokens))
            rows.append(row)
            reals.append(torch.cat([tokens_real.new_ones(starts[-1]), tokens_real]))
        at = torch.tensor(starts, device=device)[:, None] + torch.arange(response.shape[1], device=device)  # [B, R]
        return pad_sequence(rows, batch_first=True), pad_sequence(reals, batch_first=True), at

    def read(self, heard: list[Tensor], prompts: list[Prompt], response: Tensor, real: Tensor, select: Tensor) -> Tensor:
        """Logits [K, V] of the K tokens of `response` [B, R] that `select` [B, R] marks."""
        x, x_real, at = self.splice(heard, prompts, response, real)
        hidden = self.llada(x, x_real)  # [B, S, D]
        rows = torch.arange(len(at), device=at.device)[:, None]
        return self.llada.logits(hidden[rows, at][select])  # [B, R, D] -> [K, D] -> [K, V]

    def forward(self, audio: Audio, parts: tuple[str, ...], prompts: list[Prompt], response: Tensor, real: Tensor,
                select: Tensor) -> Tensor:
        """Hear, then read. With n responses to each of B clips, `response` has B * n rows, those of a clip together."""
        heard = self.hear(audio, parts)
        n = len(response) // len(heard)
        heard, prompts = [h for h in heard for _ in range(n)], [p for p in prompts for _ in range(n)]
        return self.read(heard, prompts, response, real, select)

    def predictor(self, heard: list[Tensor], prompts: list[Prompt], mask_id: int) -> Callable:
        """The function that `decode.generate` asks for predictions: response [B, R] -> logits [B, R, V].

        Called with `conditional=False` the prompt's text is masked, for classifier-free guidance.
        """
        blind = [Prompt([mask_id] * len(prompt.ids), prompt.audio_at) for prompt in prompts]

        def predict(response: Tensor, conditional: bool = True) -> Tensor:
            everything = torch.ones_like(response, dtype=torch.bool)
            logits = self.read(heard, prompts if conditional else blind, response, everything, everything)
            return logits.view(*response.shape, -1)

        return predict
