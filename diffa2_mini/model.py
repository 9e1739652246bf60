"""DIFFA-2 in one piece: encoder, adapters and backbone (arXiv 2601.23161, section 3.2).

    log-mel --encoder--> hidden states --adapters--> audio embeddings [A, D]
    prompt --embedding--> [L, D]      the audio is spliced in: [P, D], P = L + A
    response --embedding--> [R, D]    the backbone gives its hidden states [R, D]

Training (training/objective.py) and answering (listen.py) are, at their plainest,

    hidden = model.hidden_states(audio_embeddings, prompts, noisy, valid)  # [B, R, D]
    loss = diffusion_loss(model.llada.logits(hidden[masked]), response, masked, weight, n_tokens)

    answer = decode(lambda tokens: model.llada.logits(
        model.hidden_states(audio_embeddings, prompts, tokens, valid)), masks, ...)

The audio goes right after `This is the audio:`. A row of a batch is: prompt with audio, padding,
response, padding. Positions count on as if there were no padding, and nothing attends to it, so a
batch gives what each clip gives alone.

What differs: in the release, responses attend to the padding of shorter clips in a batch.
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

PARTS = {  # the modules of the model, and what we call each as a part
    "semantic_connector": "semantic", "acoustic_connector": "acoustic",
    "trainable_prompts": "prompts", "whisper": "whisper", "llada": "llada"}


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: one of PARTS, or `lora`."""
    return "lora" if "lora_" in name else PARTS[name.split(".")[0]]


@dataclass
class Audio:
    """B encoded clips."""

    final: Tensor  # [B, T, E], the encoder's final hidden state
    taps: Tensor  # [B, N, T, E], its hidden states at the taps
    n_frames: Tensor  # [B], how many of the T frames hold sound


class Diffa2Model(nn.Module):
    """The whole model, frozen until `train_only`. Encoder and backbone (`llada` is its class) are
    made on the device `frozen_on`: on `meta`, they take no memory until they are filled."""

    def __init__(self, config: Config, frozen_on: str | None = None, llada: type[Llada] = Llada):
        super().__init__()
        self.config = config
        width, frozen = config.llada.width, torch.device(frozen_on or torch.get_default_device())
        with frozen:
            self.whisper = WhisperEncoder(config.whisper)
        self.semantic_connector = SemanticAdapter(config.adapter, config.whisper.width, width)
        self.acoustic_connector = AcousticAdapter(config.adapter, config.whisper, width)
        self.trainable_prompts = nn.Embedding(config.adapter.n_prompts, width)
        with frozen:
            self.llada = llada(config.llada)
        self.requires_grad_(False)

    def add_lora(self) -> None:
        """Give the backbone its LoRA, which at first changes nothing. Again, it has no effect."""
        add_lora(self.llada, self.config.lora)

    def train_only(self, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
        """Freeze all but `parts`, some of PARTS or `lora`; returns the parameters of these."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in parts)
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def encode(self, mel: Tensor, n_frames: Tensor) -> Audio:
        """Hidden states of log-mels [B, n_mels, M] with sound in `n_frames` [B] encoder frames."""
        return Audio(*self.whisper(mel), n_frames)

    def embed_audio(self, audio: Audio, parts: tuple[str, ...]) -> list[Tensor]:
        """The embeddings [A, D] of each clip: those of `parts`, some of PARTS, in this order."""
        found = {}  # part: its embeddings [.., D] of each clip
        if "semantic" in parts:
            embeddings, n_valid = self.semantic_connector(audio.final, audio.n_frames)
            found["semantic"] = [row[:n] for row, n in zip(embeddings, n_valid.tolist())]
        if "acoustic" in parts:
            found["acoustic"] = self.acoustic_connector(audio.taps, audio.n_frames)
        if "prompts" in parts:
            found["prompts"] = self.trainable_prompts.weight.expand(len(audio.n_frames), -1, -1)
        return [torch.cat(clip) for clip in zip(*(found[part] for part in parts), strict=True)]

    def splice(self, audio_embeddings: list[Tensor],
               prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """Prompts with their audio as embeddings [B, P, D], padded on the right; lengths [B]."""
        ids, rows = [each for prompt in prompts for each in prompt.ids], []
        texts = self.llada.wte(torch.tensor(ids, device=audio_embeddings[0].device))
        texts = texts.split([len(prompt.ids) for prompt in prompts])  # [L, D] each
        for audio, prompt, text in zip(audio_embeddings, prompts, texts, strict=True):
            before, after = text[:prompt.audio_at], text[prompt.audio_at:]
            rows.append(torch.cat([before, audio.to(text.dtype), after]))  # [L + A, D]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return pad_sequence(rows, batch_first=True), lengths

    def hidden_states(self, audio_embeddings: list[Tensor], prompts: list[Prompt], noisy: Tensor,
                      valid: Tensor) -> Tensor:
        """Final hidden states [B, R, D] of the responses `noisy` [B, R], some of whose tokens are
        masks, behind their prompts; `valid`, bool [B, R], is False at padding."""
        before, lengths = self.splice(audio_embeddings, prompts)  # [B, P, D], [B]
        P = before.shape[1]
        positions, valid = lay_out(lengths, P, valid)  # [B, P + R] each
        x = torch.cat([before, self.llada.wte(noisy)], dim=1)  # [B, P + R, D]
        return self.llada(x, valid, positions, first=P)

    def forward(self, audio: Audio, parts: tuple[str, ...], prompts: list[Prompt], noisy: Tensor,
                valid: Tensor, select: Tensor) -> Tensor:
        """Hidden states [K, D] of the K response tokens where `select` is True, in row order.

        `noisy`, `valid` and `select` are [B * n, R]: n responses to each of B clips, those to
        the same clip one after another. `parts` are as for `embed_audio`.
        """
        n = len(noisy) // len(prompts)
        embeddings = [row for row in self.embed_audio(audio, parts) for _ in range(n)]  # B -> B * n
        prompts = [prompt for prompt in prompts for _ in range(n)]
        return self.hidden_states(embeddings, prompts, noisy, valid)[select]


def lay_out(lengths: Tensor, n_before: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [B, P + R] of the embeddings of a batch, and which are no padding, bool [B, P + R].

    The prompts with their audio have `lengths` [B] and are padded to P = `n_before`; `valid`, bool
    [B, R], is False at padding of the responses. The positions of a response go on where its prompt
    ends: with length 2 and P = 4 they are 0, 1, 2, 3, then 2, 3, ...
    """
    columns = torch.arange(n_before, device=valid.device).expand(len(lengths), -1)  # [B, P]
    after = lengths[:, None] + torch.arange(valid.shape[1], device=valid.device)  # [B, R]
    positions = torch.cat([columns, after], dim=1)
    return positions, torch.cat([columns < lengths[:, None], valid], dim=1)
