"""The cases for a CPU, on random weights: decoding, a training step, the log-mel."""

import dataclasses
import importlib
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ..audio import log_mel, mel_filterbank
from ..config import SIZES, AudioConfig, DecodeConfig, LladaConfig
from ..diffusion import diffusion_loss
from ..fast.generate import generate
from ..fast.llada import FastLlada
from ..fast.measure import memory_above
from ..fast.memory import keep_freed_memory
from ..fast.state import DecodingState
from ..fast.token_losses import token_losses
from ..model import Diffa2Model
from .timing import EOS_ID, MASK_ID, PROMPT, Row, take_turns

BACKBONE = LladaConfig(width=512, n_layers=8, n_heads=8, hidden=1536)
N_AUDIO, N_RESPONSE = 439, 128  # audio embeddings and response tokens
HALF = torch.full((1,), 0.5)  # the time t of a training step
# 8 steps a block; random weights are never confident, so the schedule is fixed
SCHEDULE = DecodeConfig(gen_length=N_RESPONSE, block_length=32, steps=32, factor=None)


def random_backbone(device: torch.device) -> Diffa2Model:
    """A model of which only the backbone is used, of BACKBONE's size."""
    tiny = SIZES["toy"][0]
    model = Diffa2Model(dataclasses.replace(tiny, llada=BACKBONE, decode=SCHEDULE),
                        llada=FastLlada).to(device)
    for parameter in model.llada.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


# ----------------------------------------------------------------------------------------- decoding


class ReleasedDecoding(DecodingState):
    """Computes as the authors' decoder does: everything in every step, and logits at all
    positions."""

    def forward_all(self, tokens: Tensor, keep: bool = False) -> Tensor:
        before, _ = self.model.splice(self.audio_embeddings, self.prompts)
        x = torch.cat([before, self.model.llada.wte(tokens)], dim=1)  # [B, P + R, D]
        hidden = self.model.llada(x, self.valid, self.positions)
        return self.model.llada.logits(hidden)[:, self.n_before:]  # [B, R, V]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def decoding(runs: int, device: torch.device) -> list[Row]:
    """One answer, and eight of them, decoded in several ways."""
    keep_freed_memory()  # as sample.py does
    model = random_backbone(device)
    clips = [*torch.randn(8, N_AUDIO, BACKBONE.width, device=device)]

    def decode(cache: str, state: type = DecodingState, n_batches: int = 1,
               batch_size: int = 1) -> Callable:
        config = dataclasses.replace(SCHEDULE, cache=cache)

        def run():
            for _ in range(n_batches):
                batch = state(model, clips[:batch_size], [PROMPT] * batch_size,
                              [N_RESPONSE] * batch_size, MASK_ID)
                for _ in generate(batch, config, EOS_ID):
                    pass
        return run

    ways = {"as released": decode("none", ReleasedDecoding), "ours, no cache": decode("none"),
            "prefix cache": decode("prefix"), "dual cache": decode("dual")}
    rows = take_turns("answer of 128 tokens, blocks of 32 in 8 steps", ways, runs, device)
    rows[2].target, rows[3].target = ">= 4", ">= 6"
    sizes = {"one by one": decode("dual", n_batches=8), "a batch": decode("dual", batch_size=8)}
    rows += take_turns("8 clips, dual cache", sizes, runs, device)
    rows[-1].target = ">= 1.5"
    return rows


# ----------------------------------------------------------------------------------------- training


def loss_at_masks(model: Diffa2Model, audio_embeddings: list[Tensor], response: Tensor,
                  masked: Tensor) -> Tensor:
    """The loss of an answer [1, R], as training computes it."""
    noisy, valid = response.masked_fill(masked, MASK_ID), torch.ones_like(masked)
    hidden = model.hidden_states(audio_embeddings, [PROMPT], noisy, valid)[masked]  # [K, D]
    losses_of = token_losses(model.llada.logits)
    return diffusion_loss(hidden, response, masked, HALF.to(hidden.device), N_RESPONSE, losses_of)


def loss_from_all_logits(model: Diffa2Model, audio_embeddings: list[Tensor], response: Tensor,
                         masked: Tensor) -> Tensor:
    """The same from logits at all positions, those of prompt and audio too."""
    before, _ = model.splice(audio_embeddings, [PROMPT])
    noisy = response.masked_fill(masked, MASK_ID)
    x = torch.cat([before, model.llada.wte(noisy)], dim=1)  # [1, P + R, D]
    logits = model.llada.logits(model.llada(x))[:, -response.shape[1]:][masked]  # [K, V]
    return diffusion_loss(logits, response, masked, HALF.to(x.device), N_RESPONSE)


def training(runs: int, device: torch.device) -> list[Row]:
    """A step of stage 3 on the backbone: LoRA, and the gradient of the audio embeddings, which
    trains the adapters."""
    model = random_backbone(device)
    model.add_lora()
    optimizer = torch.optim.AdamW(model.train_only(("lora",)).values())
    response = torch.randint(10, BACKBONE.vocab_size, (1, N_RESPONSE), device=device)
    masked = torch.arange(N_RESPONSE, device=device)[None] % 2 == 0

    def step(loss: Callable, recompute: str = "nothing") -> Callable:
        def run():
            model.llada.recompute = recompute
            audio = torch.randn(N_AUDIO, BACKBONE.width, device=device, requires_grad=True)
            loss(model, [audio], response, masked).backward()
            optimizer.step()
            optimizer.zero_grad()
        return run

    variants = {
        "logits at all positions": step(loss_from_all_logits),
        "ours, nothing recomputed": step(loss_at_masks),
        "ours, feed-forward recomputed": step(loss_at_masks, "feed-forward"),
    }
    rows = take_turns("training step, stage 3", variants, runs, device)
    rows[-1].target = ">= 2"
    for row, variant in zip(rows, variants.values()):
        row.more["bytes above the weights"] = memory_above(variant, device)
    most = rows[0].more["bytes above the weights"]
    for row in rows[1:]:
        used = row.more["bytes above the weights"]  # None where it cannot be measured
        rows.append(Row("memory above the weights", row.variant, ratio=used and most / used,
                        of="times less"))
    rows[-1].target = ">= 3"
    return rows


# ------------------------------------------------------------------------------------------ log-mel


def naive_log_mel(x: np.ndarray, config: AudioConfig) -> np.ndarray:
    """The log-mel [n_mels, M] of samples, a frame at a time: window, discrete Fourier transform by
    its definition, filterbank."""
    n = np.arange(config.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / config.n_fft)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(config.n_fft // 2 + 1), n) / config.n_fft)
    filters = mel_filterbank(config).numpy()
    padded = np.pad(x, config.n_fft // 2, mode="reflect")
    frames = []
    for i in range(config.max_frames):
        frame = padded[i * config.hop_length:][:config.n_fft]
        frames.append(filters @ np.abs(fourier @ (window * frame))**2)
    log = np.log10(np.maximum(np.stack(frames, axis=1), 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def front_end(runs: int, device: torch.device) -> list[Row]:
    """The log-mel of 30 s of sound, on the CPU."""
    config = AudioConfig()
    x = np.random.default_rng(0).normal(0, 0.1, config.max_samples).astype(np.float32)
    variants = {"naive, in NumPy": lambda: naive_log_mel(x, config)}
    if find_spec("whisper"):  # of the extra `reference`
        theirs = importlib.import_module("whisper.audio").log_mel_spectrogram
        name = f"openai-whisper {version('openai-whisper')}"
        variants[name] = lambda: theirs(x, config.n_mels)
    variants["ours"] = lambda: log_mel(x, config)
    rows = take_turns("log-mel of 30 s", variants, max(runs, 20), torch.device("cpu"))
    rows[-1].target = "no slower than openai-whisper"
    return rows


# in this order, as decoding keeps freed memory
CASES = {"training": training, "decoding": decoding, "log-mel": front_end}
