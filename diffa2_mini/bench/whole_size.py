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
from ..data import Batch
from ..fast.compiling import compile_blocks
from ..fast.device import autocast
from ..fast.llada import FastLlada
from ..fast.measure import copy_bandwidth, matmul_ceiling, memory_above
from ..lora import merge_lora
from ..model import Audio, Diffa2Model
from ..published.sources import load_tokenizer, locate_all
from ..tokenizer import Prompt, Tokenizer
from ..training import dry_run
from ..training.objective import piece_loss
from ..training.random_weights import fill_at_random
from .timing import Row, decode, take_turns

DECODE = DecodeConfig(gen_length=64, block_length=32, steps=60, factor=None, cache="dual",
                      capture=True)


def computes_in(model: Diffa2Model) -> tuple[torch.device, torch.dtype]:
    """Where the model is, and the precision of its frozen parts."""
    return model.llada.wte.weight.device, model.llada.wte.weight.dtype


def clips_of(model: Diffa2Model, n: int) -> Audio:
    """n of the longest clips, encoded."""
    config, (device, dtype) = model.config.audio, computes_in(model)
    mel = torch.randn(n, config.n_mels, config.max_frames, device=device).to(dtype)
    return model.encode(mel, torch.full((n,), config.max_frames // 2, device=device))


def batch_of(model: Diffa2Model, stage: StageConfig, n: int) -> Batch:
    """A batch of n clips, still without their audio. Half of each response counts as masked; what
    its tokens are changes no time."""
    device, R = computes_in(model)[0], dry_run.RESPONSE
    rows = n * (1 + stage.preference)
    response = torch.randint(10, model.config.llada.vocab_size - 10, (rows, R), device=device)
    masks = torch.arange(R, device=device).expand(rows, stage.vrpo_samples, R) % 2 == 0
    common = dict(examples=[None] * n, clips=[], prompts=[Prompt([7] * dry_run.PROMPT, 20)] * n,
                  response=response, valid=torch.ones_like(response, dtype=torch.bool))
    if stage.preference:
        return Batch(masked=masks, **common)
    t = torch.full((n,), 0.5, device=device)
    return Batch(noisy=response, masked=masks[:, 0], t=t, **common)


def training_step(model: Diffa2Model, tokenizer: Tokenizer, stage: StageConfig, n: int) -> Callable:
    """A step on n of the longest clips, or pairs, the encoder's work included."""
    if "lora" in stage.trains:
        model.add_lora()
    trained, reference = model.train_only(stage.trains), {}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    if stage.preference:
        reference = {name: p.clone() for name, p in weights.trained_tensors(model).items()}
    batch, stage = batch_of(model, stage, n), dataclasses.replace(stage, batch_size=n)
    n_tokens = batch.response.numel()

    def step():
        encoded = dataclasses.replace(batch, audio=clips_of(model, n))
        with autocast(*computes_in(model)):
            loss = piece_loss(model, reference, encoded, stage, tokenizer, n_tokens)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def memory_at_one(model: Diffa2Model, tokenizer: Tokenizer, stage: StageConfig) -> Row:
    """The memory of a training step on one clip, or pair, with blocks recomputed."""
    model.llada.recompute = "blocks"
    step = training_step(model, tokenizer, stage, 1)
    used = memory_above(step, computes_in(model)[0], all_of_it=True)
    return Row(f"stage {stage.number}, 1 at once, recomputed", "peak memory",
               ratio=used and used / dry_run.GIB, of="GiB", target="<= 22")


def best_training(model: Diffa2Model, tokenizer: Tokenizer, stage: StageConfig, runs: int) -> Row:
    """The training step of the best batch size, without recomputing: doubled until memory ends or
    it gets no better."""
    model.llada.recompute, n, device = "nothing", 1, computes_in(model)[0]
    about = dict(of="of the matmul ceiling (MFU)", target=">= 0.5")
    best = Row(f"stage {stage.number}, training", "does not fit", **about)
    while True:
        try:
            step = training_step(model, tokenizer, stage, n)
            (row,) = take_turns(best.case, {f"{n} at once": step}, runs, device)
        except torch.OutOfMemoryError:
            return best
        mfu = dry_run.throughput(model.config, stage, dry_run.shape_of(model.config, stage, n),
                                 row.median, matmul_ceiling(*computes_in(model)))["mfu"]
        if mfu <= (best.ratio or 0):
            return best
        best, n = dataclasses.replace(row, ratio=mfu, **about), 2 * n


def decoding(model: Diffa2Model, runs: int) -> list[Row]:
    """A clip in 60 steps, encoder included; and one cached step against the time to read the
    weights once."""
    device, dtype = computes_in(model)

    def decode_clip() -> list[float]:
        clip = clips_of(model, 1)
        with torch.no_grad(), autocast(device, dtype):
            return decode(model, model.embed_audio(clip, ("acoustic", "semantic")), DECODE)

    seconds = model.config.audio.max_seconds
    (row,) = take_turns(f"{seconds} s of sound in {DECODE.steps} steps",
                        {"dual cache, captured": decode_clip}, runs, device)
    row.ratio, row.of, row.target = row.median / seconds, "real-time factor", "<= 0.012"
    step = Row("one cached step", row.variant, sorted(np.diff(decode_clip()).tolist()),
               of="times the reading of the weights", target="<= 1.4")
    n_bytes = sum(p.nbytes for p in model.llada.parameters())
    n_bytes -= model.llada.wte.weight.nbytes  # of which a few rows are read
    step.ratio = step.median * copy_bandwidth(device) / n_bytes
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
    rows = [memory_at_one(model, tokenizer, stage) for stage in stages.values()]
    merge_lora(model.llada)  # decoding and stage 1 have none beside the weights
    if compiled:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    rows += decoding(model, runs)
    return rows + [best_training(model, tokenizer, stages[number], runs)
                   for number in (1, 3) if number in stages]
