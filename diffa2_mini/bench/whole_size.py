"""How fast a whole size trains and decodes, against what the device could do at best; for a GPU.

The two ceilings, the speed of a large matrix product and of copying memory, are measured in the
same run.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from .. import weights
from ..config import SIZES, DecodeConfig, StageConfig
from ..data import AnswerBatch, Batch, PreferenceBatch
from ..fast.compiling import compile_blocks
from ..fast.device import autocast
from ..fast.llada import FastLlada
from ..fast.measure import copy_bandwidth, matmul_ceiling, memory_above
from ..listen import Diffa2
from ..lora import merge_lora
from ..model import Audio
from ..published.sources import load_tokenizer, locate_all
from ..tokenizer import Prompt
from ..training import dry_run
from ..training.objective import piece_loss
from ..training.random_weights import fill_at_random
from .timing import Row, decode, take_turns

DECODE = DecodeConfig(gen_length=64, block_length=32, steps=60, factor=None, cache="dual",
                      capture=True)


def clips_of(diffa2: Diffa2, n: int) -> Audio:
    """n of the longest clips, encoded."""
    config, device = diffa2.config.audio, diffa2.device
    mel = torch.randn(n, config.n_mels, config.max_frames, device=device).to(diffa2.dtype)
    return diffa2.model.encode(mel, torch.full((n,), config.max_frames // 2, device=device))


def batch_of(diffa2: Diffa2, stage: StageConfig, n: int) -> Batch:
    """A batch of n clips, still without their audio. Half of each response counts as masked; what
    its tokens are changes no time."""
    rows, R, device = n * (1 + stage.preference), dry_run.RESPONSE, diffa2.device
    response = torch.randint(10, diffa2.config.llada.vocab_size - 10, (rows, R), device=device)
    masks = torch.arange(R, device=device).expand(rows, stage.vrpo_samples, R) % 2 == 0
    batch = dict(examples=[None] * n, prompts=[Prompt([7] * dry_run.PROMPT, 20)] * n,
                 response=response, valid=torch.ones_like(response, dtype=torch.bool))
    if stage.preference:
        return PreferenceBatch(**batch, masked=masks)
    return AnswerBatch(**batch, noisy=response, masked=masks[:, 0],
                       t=torch.full((rows,), 0.5, device=device))


def training_step(diffa2: Diffa2, stage: StageConfig, n: int) -> Callable:
    """A step on n of the longest clips, or pairs, the encoder's work included."""
    model, reference = diffa2.model, {}
    if "lora" in stage.trains:
        model.add_lora()
    optimizer = torch.optim.AdamW(model.train_only(stage.trains).values(), lr=1e-5)
    if stage.preference:
        reference = {name: p.clone() for name, p in weights.trained_tensors(model).items()}
    batch, stage = batch_of(diffa2, stage, n), dataclasses.replace(stage, batch_size=n)

    def step():
        encoded = dataclasses.replace(batch, audio=clips_of(diffa2, n))
        with autocast(diffa2.device, diffa2.dtype):
            figures = piece_loss(model, reference, encoded, stage, diffa2.tokenizer,
                                 batch.response.numel())
        figures["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def memory_at_one(diffa2: Diffa2, stage: StageConfig) -> Row:
    """The memory of a training step on one clip, or pair, with blocks recomputed."""
    diffa2.model.llada.recompute = "blocks"
    used = memory_above(training_step(diffa2, stage, 1), diffa2.device, all_of_it=True)
    return Row(f"stage {stage.number}, 1 at once, recomputed", "peak memory",
               ratio=used and used / dry_run.GIB, of="GiB", target="<= 22")


def best_training(diffa2: Diffa2, stage: StageConfig, runs: int) -> Row:
    """The training step of the best batch size, without recomputing: doubled until memory ends or
    it gets no better."""
    diffa2.model.llada.recompute, config, n = "nothing", diffa2.config, 1
    about = dict(of="of the matmul ceiling (MFU)", target=">= 0.5")
    best = Row(f"stage {stage.number}, training", "does not fit", **about)
    while True:
        try:
            step = training_step(diffa2, stage, n)
            (row,) = take_turns(best.case, {f"{n} at once": step}, runs, diffa2.device)
        except torch.OutOfMemoryError:
            return best
        flops = dry_run.step_flops(config, stage, dry_run.shape_of(config, stage, n))
        mfu = flops / row.median / matmul_ceiling(diffa2.device, diffa2.dtype)
        if mfu <= (best.ratio or 0):
            return best
        best, n = dataclasses.replace(row, ratio=mfu, **about), 2 * n


def decoding(diffa2: Diffa2, runs: int) -> list[Row]:
    """A clip in 60 steps, encoder included; and one cached step against the time to read the
    weights once."""
    def decode_clip() -> list[float]:
        clip = clips_of(diffa2, 1)
        with torch.no_grad(), autocast(diffa2.device, diffa2.dtype):
            return decode(diffa2.model, diffa2.model.embed_audio(clip, diffa2.parts), DECODE)

    seconds, llada = diffa2.config.audio.max_seconds, diffa2.model.llada
    (row,) = take_turns(f"{seconds} s of sound in {DECODE.steps} steps",
                        {"dual cache, captured": decode_clip}, runs, diffa2.device)
    row.ratio, row.of, row.target = row.median / seconds, "real-time factor", "<= 0.012"
    step = Row("one cached step", row.variant, sorted(np.diff(decode_clip()).tolist()),
               of="times the reading of the weights", target="<= 1.4")
    # of the embedding table a few rows are read
    n_bytes = sum(p.nbytes for p in llada.parameters()) - llada.wte.weight.nbytes
    step.ratio = step.median * copy_bandwidth(diffa2.device) / n_bytes
    return [row, step]


def whole_size(size: str, runs: int, device: torch.device, dtype: torch.dtype, compiled: bool,
               random: bool) -> list[Row]:
    """Memory of each stage, decoding, and the speed of stages 1 and 3."""
    config, stages = SIZES[size]
    paths = None if random else locate_all({"whisper": None, "llada": None}, size)
    model = weights.build(config, paths, device, dtype, FastLlada).eval()
    if random:
        fill_at_random(device, dtype, model.whisper, model.llada)
    tokenizer = load_tokenizer(config, None, random)
    diffa2 = Diffa2(model, ("acoustic", "semantic"), tokenizer, device, dtype)
    rows = [memory_at_one(diffa2, stage) for stage in stages.values()]
    merge_lora(model.llada)  # decoding and stage 1 have none beside the weights
    if compiled:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    rows += decoding(diffa2, runs)
    return rows + [best_training(diffa2, stages[number], runs) for number in (1, 3)
                   if number in stages]
