"""How fast a whole size trains and decodes, against what the device could do at best. Part of
`bench.py`, for a GPU.

The two ceilings, the speed of a large matrix product and of copying memory, are measured in the
same run.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import weights
from ..config import SIZES, DecodeConfig, StageConfig
from ..data import AnswerBatch, PreferenceBatch
from ..fast.compiling import compile_blocks
from ..fast.device import autocast
from ..fast.generate import generate
from ..fast.llada import FastLlada
from ..fast.measure import copy_bandwidth, matmul_ceiling, memory_above, now
from ..fast.state import DecodingState
from ..lora import merge_lora
from ..model import Audio, Diffa2Model
from ..tokenizer import Prompt, Tokenizer
from ..training import checkpoint, dry_run
from ..training.objective import piece_loss
from .__main__ import MASK, NO_EOS, PROMPT, Row, take_turns


def clips_of(model: Diffa2Model, n: int, device: torch.device, dtype: torch.dtype) -> Audio:
    config = model.config.audio
    mel = torch.randn(n, config.n_mels, config.max_frames, device=device).to(dtype)
    return model.encode(mel, torch.full((n,), config.max_frames // 2, device=device))


def batch_of(stage: StageConfig, response: Tensor, masks: Tensor, audio: Audio
             ) -> AnswerBatch | PreferenceBatch:
    """A batch of one prompt for all clips, of which nobody looks at the noisy tokens."""
    n = len(audio.n_frames)
    common = dict(examples=[None] * n, clips=[], prompts=[Prompt([7] * dry_run.PROMPT, 20)] * n,
                  response=response, valid=torch.ones_like(response, dtype=torch.bool), audio=audio)
    if stage.preference:
        return PreferenceBatch(masks=masks, **common)
    t = torch.full((len(response),), 0.5, device=response.device)
    return AnswerBatch(noisy=response, masked=masks[:, 0], t=t, **common)


def train_at(model: Diffa2Model, stage: StageConfig, n: int, device: torch.device,
             dtype: torch.dtype, tokenizer: Tokenizer) -> Callable:
    """A training step on n of the longest clips, or pairs, the encoder's work included."""
    if "lora" in stage.trains:
        model.add_lora()
    trained = model.train_only(stage.trains)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    reference = {name: p.clone()
                 for name, p in checkpoint.trained_tensors(model).items()
                 } if stage.preference else {}
    rows, R = n * (1 + stage.preference), dry_run.RESPONSE
    response = torch.randint(10, model.config.llada.vocab_size - 10, (rows, R), device=device)
    masks = torch.arange(R, device=device).expand(rows, stage.vrpo_samples, R) % 2 == 0
    stage = dataclasses.replace(stage, batch_size=n)

    def step():
        batch = batch_of(stage, response, masks, clips_of(model, n, device, dtype))
        with autocast(device, dtype):
            loss = piece_loss(model, reference, batch, stage, tokenizer, rows * R)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def whole_size(size: str, runs: int, device: torch.device, dtype: torch.dtype, compiled: bool,
               random: bool) -> list[Row]:
    config, stages = SIZES[size]
    model = weights.build(config, None, None, device, dtype, random, FastLlada).to(device).eval()
    tokenizer, rows = weights.load_tokenizer(config, None, random), []
    for number, stage in stages.items():  # at batch 1
        model.llada.recompute = "blocks"
        used = memory_above(train_at(model, stage, 1, device, dtype, tokenizer), device,
                            all_of_it=True)
        rows.append(Row(f"stage {number}, 1 at once, recomputed", "peak memory", ratio=used and
                        used / dry_run.GIB, of="GiB", target="<= 22"))
    merge_lora(model.llada)  # decoding and stage 1 have none beside the weights
    if compiled:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    rows += decode_at(model, runs, device, dtype)
    for number in sorted({1, 3} & set(stages)):
        rows.append(best_training(model, number, stages[number], runs, device, dtype, tokenizer))
    return rows


def best_training(model: Diffa2Model, number: int, stage: StageConfig, runs: int,
                  device: torch.device, dtype: torch.dtype, tokenizer: Tokenizer) -> Row:
    """The training step of the best batch size, without recomputing: doubled until memory ends or
    it gets no better."""
    model.llada.recompute, n, best = "nothing", 1, None
    while best is None or best.more["clips"] == n // 2:
        try:
            (row, ) = take_turns(
                f"stage {number}, training",
                {f"{n} at once": train_at(model, stage, n, device, dtype, tokenizer)}, runs, device)
        except torch.OutOfMemoryError:
            best = best or Row(f"stage {number}, training", "does not fit",
                               of="of the matmul ceiling (MFU)", target=">= 0.5")
            break
        row.more["clips"], row.of, row.target = n, "of the matmul ceiling (MFU)", ">= 0.5"
        row.ratio = dry_run.throughput(model.config, stage, dry_run.shape_of(
            model.config, stage, n), row.median, matmul_ceiling(device, dtype))["mfu"]
        best, n = row if best is None or row.ratio > best.ratio else best, 2 * n
    return best


def decode_at(model: Diffa2Model, runs: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """One cached step against the time to read the weights once; and a clip in 60 steps, encoder
    included."""
    config = model.config
    block = min(32, config.decode.gen_length)
    decode = DecodeConfig(gen_length=2 * block, block_length=block, steps=min(60, 2 * block),
                          factor=None, cache="dual", capture=True)

    def whole():
        clip = clips_of(model, 1, device, dtype)
        with torch.no_grad(), autocast(device, dtype):
            audio_embeddings = model.embed_audio(clip, ("acoustic", "semantic"))
            state = DecodingState(model, audio_embeddings, [Prompt([7] * PROMPT, 20)], [2 * block],
                                  MASK)
            times = []
            for _ in generate(state, decode, NO_EOS):
                times.append(now(device))
            return times

    (row, ) = take_turns(f"{config.audio.max_seconds} s of sound in {decode.steps} steps",
                         {"dual cache, captured": whole}, runs, device)
    row.ratio, row.of, row.target = row.median / config.audio.max_seconds, "real-time factor", "<= 0.012"
    steps = np.diff(whole())
    n_bytes = sum(p.numel() * p.element_size()
                  for p in model.llada.parameters()) - model.llada.wte.weight.nbytes
    step = Row("one cached step", "dual cache, captured", sorted(steps.tolist()),
               of="times the reading of the weights", target="<= 1.4")
    step.ratio = step.median * copy_bandwidth(device) / n_bytes
    return [row, step]
