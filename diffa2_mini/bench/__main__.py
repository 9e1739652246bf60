"""How fast a whole size trains and decodes on a GPU, against a large matrix product and a copy of
memory there, which are measured in the same run; or what each rule of decoding gives.

    python -m diffa2_mini.bench --size full --random-weights
    python data/toybench.py && python -m diffa2_mini.bench --decoders
    python -m diffa2_mini.bench --decoders --checkpoint runs/small/stage4.safetensors \\
        --file data/orders/test.json --type order

Random weights are never confident, so decoding follows a fixed schedule. A figure is the median
over `--runs`, with the fastest and the slowest run behind it. It is printed and written as soon as
it is there. In a clone, tutorials/speed.py measures the parts on a CPU, beside what others do.
"""

from ..command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch

from .. import weights
from ..command.script import Parser
from ..config import ACOUSTIC_AND_SEMANTIC, SIZES, DecodeConfig, StageConfig
from ..data import AnswerBatch, Batch, PreferenceBatch
from ..errors import require
from ..fast.compiling import compile_blocks
from ..fast.device import DTYPES, autocast, choose_device
from ..fast.llada import FastLlada
from ..fast.measure import copy_bandwidth, matmul_ceiling, peak_memory, time_runs
from ..listen import Diffa2, find_source
from ..lora import merge_lora
from ..model import Audio
from ..published.sources import load_tokenizer, locate_all
from ..tokenizer import Prompt
from ..training import dry_run
from ..training.objective import piece_loss
from ..training.random_weights import fill_at_random
from .decoders import decoders, questions_of
from .timing import Row, decode, report

DECODE = DecodeConfig(gen_length=64, block_length=32, steps=60, factor=None, cache="dual",
                      capture=True)


def encode_clips(diffa2: Diffa2, n: int) -> Audio:
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
                 response=response, valid=response >= 0)
    if stage.preference:
        return PreferenceBatch(**batch, masked=masks)
    return AnswerBatch(**batch, noisy=response, masked=masks[:, 0],
                       weight=torch.full((rows,), 2.0, device=device))


def training_step(diffa2: Diffa2, stage: StageConfig, n: int) -> Callable:
    """A step on n of the longest clips, or pairs, the encoder's work included."""
    model = diffa2.model
    if "lora" in stage.trains:
        model.add_lora()
    optimizer = torch.optim.AdamW(model.train_only(stage.trains).values(), lr=1e-5)
    reference = {name: p.clone() for name, p in weights.trained_tensors(model).items()
                 if stage.preference}
    batch, stage = batch_of(diffa2, stage, n), replace(stage, batch_size=n)

    def step() -> None:
        batch.audio = encode_clips(diffa2, n)
        with autocast(diffa2.device, diffa2.dtype):
            figures = piece_loss(model, reference, batch, stage, diffa2.tokenizer,
                                 batch.response.numel())
        figures["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def training(diffa2: Diffa2, stage: StageConfig, runs: int) -> Iterator[Row]:
    """Training steps without recomputing, on batches that double until memory ends or a step makes
    no better use of the device: the best of them counts."""
    diffa2.model.llada.recompute, config, best = "nothing", diffa2.config, 0.0
    case = f"stage {stage.number}, training"
    for n in (2**i for i in count()):
        try:
            step = training_step(diffa2, stage, n)
            row = Row(case, f"{n} at once", time_runs(step, diffa2.device, runs + 1)[1:])
        except torch.OutOfMemoryError:
            yield Row(case, f"{n} at once do not fit")
            return
        flops = dry_run.step_flops(config, stage, dry_run.shape_of(config, stage, n))
        row.ratio = flops / row.median / matmul_ceiling(diffa2.device, diffa2.dtype)
        row.of, row.target = "of the matmul ceiling (MFU)", ">= 0.5"
        yield row
        if row.ratio <= best:
            return
        best = row.ratio


def decoding(diffa2: Diffa2, runs: int) -> Iterator[Row]:
    """A clip in 60 steps, encoder included; and one cached step against the time to read the
    weights once."""
    ends = []  # of the steps of each run

    def decode_clip() -> None:
        clip = encode_clips(diffa2, 1)
        with torch.no_grad(), autocast(diffa2.device, diffa2.dtype):
            ends.append(decode(diffa2.model, diffa2.model.embed_audio(clip, diffa2.parts), DECODE))

    seconds, llada = diffa2.config.audio.max_seconds, diffa2.model.llada
    row = Row(f"{seconds} s of sound in {DECODE.steps} steps", "dual cache, captured",
              time_runs(decode_clip, diffa2.device, runs + 1)[1:])  # the first prepares
    row.ratio, row.of, row.target = row.median / seconds, "real-time factor", "<= 0.012"
    yield row
    step = Row("one cached step", row.variant, np.diff(ends[-1]).tolist(),
               of="times the reading of the weights", target="<= 1.4")
    # of the embedding table a few rows are read
    n_bytes = sum(p.nbytes for p in llada.parameters()) - llada.wte.weight.nbytes
    step.ratio = step.median * copy_bandwidth(diffa2.device) / n_bytes
    yield step


def whole_size(size: str, runs: int, device: torch.device, dtype: torch.dtype, compiled: bool,
               random: bool) -> Iterator[Row]:
    """Memory of a training step of each stage on one clip, or pair, with blocks recomputed; then
    decoding, and the speed of stages 1 and 3."""
    config, stages = SIZES[size]
    paths = None if random else locate_all({"whisper": None, "llada": None}, size)
    model = weights.build(config, paths, device, dtype, FastLlada).eval()
    if random:
        fill_at_random(device, dtype, model.whisper, model.llada)
    tokenizer = load_tokenizer(config, None, random)
    diffa2 = Diffa2(model, ACOUSTIC_AND_SEMANTIC, tokenizer, device, dtype)
    model.llada.recompute = "blocks"
    for stage in stages.values():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training_step(diffa2, stage, 1)()
        yield Row(f"stage {stage.number}, 1 at once, recomputed", "peak memory",
                  ratio=peak_memory(device), of="GiB", target="<= 22")
    merge_lora(model.llada)  # decoding and stage 1 have none beside the weights
    if compiled:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    yield from decoding(diffa2, runs)
    for number in {1, 3} & stages.keys():
        yield from training(diffa2, stages[number], runs)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES))
    add("--random-weights", action="store_true", help="instead of downloads")
    add("--compile", action="store_true", help="have torch.compile fuse operations")
    add("--runs", type=int, default=5)
    add("--decoders", action="store_true", help="how right and how fast each rule of decoding is")
    add("--checkpoint", type=Path, help="of --decoders: what train.py wrote (default: the size's)")
    add("--file", type=Path, help="of --decoders: a manifest (default: ToyBench)")
    add("--type", nargs="+", default=[], help="of its questions, as order (default: all)")
    add("--limit", type=int, help="of --decoders: ask so many questions, evenly spread")
    add("--out", type=Path,
        help="the same as JSON (default: runs/bench_SIZE.json or bench_decoders.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    add("--toy", "--only", "--data", dest="moved", nargs="?", const=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    require((args.size or args.decoders) and not args.moved,
            "expected --size or --decoders; the cases for a CPU and the toy's caches (--only, "
            "--toy) are measured by 'python tutorials/speed.py', in a clone")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    source = find_source(args.size, args.checkpoint) if args.decoders else None
    config = source.config if source else SIZES[args.size][0]
    device, dtype, _ = choose_device(args.device, args.dtype, not config.from_scratch)
    torch.manual_seed(0)
    if source:
        name, asked = "decoders", questions_of(args.file, args.type, args.limit, config.size)
        rows = decoders(Diffa2.load(source, device, dtype), asked)
    else:
        name, random = args.size, args.random_weights
        rows = whole_size(name, args.runs, device, dtype, args.compile, random)
    report(rows, args.out or Path("runs", f"bench_{name}.json"), argv, device, dtype)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
