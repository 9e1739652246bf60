"""How fast a whole size trains and decodes, against what the device could do at best; for a GPU.

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
from ..published.sources import load_tokenizer, locate_all
from ..tokenizer import Prompt, Tokenizer
from ..training import dry_run
from ..training.objective import piece_loss
from .timing import EOS_ID, MASK_ID, PROMPT, Row, take_turns

MFU = "of the matmul ceiling (MFU)"


def clips_of(model: Diffa2Model, n: int, device: torch.device, dtype: torch.dtype) -> Audio:
    """n of the longest clips [n, n_mels, M], encoded."""
    config = model.config.audio
    mel = torch.randn(n, config.n_mels, config.max_frames, device=device).to(dtype)
    return model.encode(mel, torch.full((n,), config.max_frames // 2, device=device))


def batch_of(stage: StageConfig, response: Tensor, masks: Tensor, audio: Audio
             ) -> AnswerBatch | PreferenceBatch:
    """A batch of one prompt for all clips; its noisy tokens are never read."""
    n = len(audio.n_frames)
    common = dict(examples=[None] * n, clips=[], prompts=[Prompt([7] * dry_run.PROMPT, 20)] * n,
                  response=response, valid=torch.ones_like(response, dtype=torch.bool), audio=audio)
    if stage.preference:
        return PreferenceBatch(masks=masks, **common)
    t = torch.full((len(response),), 0.5, device=response.device)
    return AnswerBatch(noisy=response, masked=masks[:, 0], t=t, **common)


# ----------------------------------------------------------------------------------------- training


def train_at(model: Diffa2Model, stage: StageConfig, n: int, device: torch.device,
             dtype: torch.dtype, tokenizer: Tokenizer) -> Callable:
    """A training step on n of the longest clips, or pairs, the encoder's work included."""
    if "lora" in stage.trains:
        model.add_lora()
    trained = model.train_only(stage.trains)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    reference = {}
    if stage.preference:
        reference = {name: p.clone() for name, p in weights.trained_tensors(model).items()}
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


def memory_at_one(model: Diffa2Model, number: int, stage: StageConfig, device: torch.device,
                  dtype: torch.dtype, tokenizer: Tokenizer) -> Row:
    """The memory of a training step on one clip, or pair, with blocks recomputed."""
    model.llada.recompute = "blocks"
    used = memory_above(train_at(model, stage, 1, device, dtype, tokenizer), device, all_of_it=True)
    return Row(f"stage {number}, 1 at once, recomputed", "peak memory",
               ratio=used and used / dry_run.GIB, of="GiB", target="<= 22")


def best_training(model: Diffa2Model, number: int, stage: StageConfig, runs: int,
                  device: torch.device, dtype: torch.dtype, tokenizer: Tokenizer) -> Row:
    """The training step of the best batch size, without recomputing: doubled until memory ends or
    it gets no better."""
    model.llada.recompute, n, best = "nothing", 1, None
    case = f"stage {number}, training"
    while best is None or best.more["clips"] == n // 2:
        try:
            step = train_at(model, stage, n, device, dtype, tokenizer)
            (row,) = take_turns(case, {f"{n} at once": step}, runs, device)
        except torch.OutOfMemoryError:
            return best or Row(case, "does not fit", of=MFU, target=">= 0.5")
        shape = dry_run.shape_of(model.config, stage, n)
        row.more["clips"], row.of, row.target = n, MFU, ">= 0.5"
        row.ratio = dry_run.throughput(model.config, stage, shape, row.median,
                                       matmul_ceiling(device, dtype))["mfu"]
        if best is None or row.ratio > best.ratio:
            best = row
        n *= 2
    return best


# ----------------------------------------------------------------------------------------- decoding


def decode_at(model: Diffa2Model, runs: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """A clip in 60 steps, encoder included; and one cached step against the time to read the
    weights once."""
    config = model.config
    block = min(32, config.decode.gen_length)
    decode = DecodeConfig(gen_length=2 * block, block_length=block, steps=min(60, 2 * block),
                          factor=None, cache="dual", capture=True)

    def decode_clip() -> list[float]:
        """Returns the time at the end of each step."""
        clip = clips_of(model, 1, device, dtype)
        with torch.no_grad(), autocast(device, dtype):
            audio_embeddings = model.embed_audio(clip, ("acoustic", "semantic"))
            state = DecodingState(model, audio_embeddings, [PROMPT], [2 * block], MASK_ID)
            return [now(device) for _ in generate(state, decode, EOS_ID)]

    seconds = config.audio.max_seconds
    (row,) = take_turns(f"{seconds} s of sound in {decode.steps} steps",
                        {"dual cache, captured": decode_clip}, runs, device)
    row.ratio, row.of, row.target = row.median / seconds, "real-time factor", "<= 0.012"
    steps = np.diff(decode_clip())
    n_bytes = sum(p.numel() * p.element_size() for p in model.llada.parameters())
    n_bytes -= model.llada.wte.weight.nbytes  # of which a few rows are read
    step = Row("one cached step", "dual cache, captured", sorted(steps.tolist()),
               of="times the reading of the weights", target="<= 1.4")
    step.ratio = step.median * copy_bandwidth(device) / n_bytes
    return [row, step]


# ------------------------------------------------------------------------------------ a whole size


def whole_size(size: str, runs: int, device: torch.device, dtype: torch.dtype, compiled: bool,
               random: bool) -> list[Row]:
    """Memory of each stage, decoding, and the speed of stages 1 and 3."""
    config, stages = SIZES[size]
    paths = None if random else locate_all({"whisper": None, "llada": None}, size)
    model = weights.build(config, paths, device, dtype, FastLlada).eval()
    tokenizer = load_tokenizer(config, None, random)
    rows = [memory_at_one(model, number, stage, device, dtype, tokenizer)
            for number, stage in stages.items()]
    merge_lora(model.llada)  # decoding and stage 1 have none beside the weights
    if compiled:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    rows += decode_at(model, runs, device, dtype)
    for number in sorted({1, 3} & set(stages)):
        rows.append(best_training(model, number, stages[number], runs, device, dtype, tokenizer))
    return rows
