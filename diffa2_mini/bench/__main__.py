"""How fast a whole size trains and decodes on a GPU, against a large matrix product and a copy of
memory there, which are measured in the same run; or what each rule of decoding gives.

    python -m diffa2_mini.bench --size full --random-weights
    python data/toybench.py && python -m diffa2_mini.bench --decoders
    python -m diffa2_mini.bench --decoders --size small --file data/orders/test.json --type order

Random weights are never confident, so decoding follows a fixed schedule. A figure is the median
over `--runs`, with the fastest and the slowest run behind it. It is printed and written as soon as
it is there. In a clone, tutorials/speed.py measures the parts on a CPU, beside what others do.
"""

from ..command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from .. import weights
from ..command.script import Parser
from ..config import ACOUSTIC_AND_SEMANTIC, SIZES, DecodeConfig, StageConfig
from ..data import AnswerBatch, Batch, PreferenceBatch
from ..errors import require
from ..fast.compiling import compile_blocks
from ..fast.device import DTYPES, FLOAT8, autocast, choose_device
from ..fast.llada import FastLlada
from ..fast.measure import copy_bandwidth, matmul_ceiling, peak_memory, time_runs
from ..listen import Diffa2, find_source
from ..lora import merge_lora
from ..model import Audio
from ..published.sources import load_tokenizer, locate_all
from ..quantize import KINDS
from ..tokenizer import Prompt
from ..training import dry_run
from ..training.objective import piece_loss
from ..training.random_weights import fill_at_random
from .decoders import decoders, questions_of
from .timing import Row, decode, report

DECODE = DecodeConfig(gen_length=64, block_length=32, steps=60, factor=None, cache="dual",
                      capture=True)
AT_ONCE = 8  # clips
# by kind of quantisation, and stage: times the reading of bfloat16 weights; GiB
STEP_TARGETS = {None: "<= 1.4", "fp8": "<= 1.15"}
WEIGHT_TARGETS = {"int8": "<= 9", "nf4": "<= 5.5"}
PEAK_TARGETS = {("nf4", 3): 9.5, ("nf4", 4): 11}


def encode_clips(diffa2: Diffa2, n: int) -> Audio:
    """n of the longest clips, encoded."""
    config, device = diffa2.config.audio, diffa2.device
    mel = torch.randn(n, config.n_mels, config.max_frames, device=device).to(diffa2.dtype)
    return diffa2.model.encode(mel, torch.full((n,), config.max_frames // 2, device=device))


def batch_of(diffa2: Diffa2, stage: StageConfig, n: int) -> Batch:
    """A batch of n clips, still without their audio. Half of each response counts as masked."""
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


def decode_clips(diffa2: Diffa2, n: int, runs: int, how: DecodeConfig
                 ) -> tuple[list[float], list[float]]:
    """Seconds that n clips at once take in each run, the first of which prepares, and of steps."""
    steps = []  # of each run

    def decode_them() -> None:
        clips = encode_clips(diffa2, n)
        with torch.no_grad(), autocast(diffa2.device, diffa2.dtype):
            steps.append(decode(diffa2.model, diffa2.model.embed_audio(clips, diffa2.parts), how))

    return time_runs(decode_them, diffa2.device, runs + 1), sum(steps[1:], [])


def decoding(diffa2: Diffa2, runs: int, kind: str | None, how: DecodeConfig) -> Iterator[Row]:
    """A clip in 60 steps; a cached step, the median one, against the time to read the backbone's
    weights once in `dtype`, without its embeddings; 8 clips at once; and what was compiled."""
    length, device = diffa2.config.audio.max_seconds, diffa2.device
    name = f"{kind or diffa2.dtype}, dual cache, captured{', compiled' * how.compile}"
    compiled = torch._dynamo.utils.counters["stats"]  # since the process began
    before = compiled["unique_graphs"]
    (first, *clip), steps = decode_clips(diffa2, 1, runs, how)
    one = Row(f"{length} s of sound in {how.steps} steps", name, clip, target="<= 0.0165")
    one.ratio, one.of = one.median / length, "real-time factor"
    yield one
    yield Row("its first run, which prepares", name, [first])
    of = diffa2.config.llada
    n_weights = of.width * (of.n_layers * (4 * of.width + 3 * of.hidden) + of.vocab_size)
    floor = n_weights * diffa2.dtype.itemsize / copy_bandwidth(device)
    step = Row("a cached step", name, steps, target=STEP_TARGETS.get(kind, ""))
    step.ratio, step.of = step.median / floor, f"times the reading of the weights ({floor:.4g} s)"
    yield step
    (_, *clips), all_steps = decode_clips(diffa2, AT_ONCE, runs, how)
    for alone, seconds, target in ((one, clips, ">= 4"), (step, all_steps, ">= 5.5")):
        row = Row(f"{alone.case}, {AT_ONCE} at once", name, seconds, target=target)
        row.ratio, row.of = AT_ONCE * alone.median / row.median, "times the throughput of one"
        yield row
    if how.compile:
        yield Row("compiled", name, ratio=compiled["unique_graphs"] - before, of="times",
                  target="<= 4")


def memory(diffa2: Diffa2, stages: dict[int, StageConfig], kind: str | None) -> Iterator[Row]:
    """Of a training step of each stage on one clip, or pair; then of all weights to answer."""
    model, device = diffa2.model, diffa2.device
    model.llada.recompute = "blocks"
    for stage in stages.values():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        training_step(diffa2, stage, 1)()
        yield Row(f"stage {stage.number}, 1 at once, recomputed, {kind or diffa2.dtype}",
                  "peak memory", ratio=peak_memory(device), of="GiB",
                  target=f"<= {PEAK_TARGETS.get((kind, stage.number), 22)}")
    for parameter in model.requires_grad_(False).parameters():
        parameter.data, parameter.grad = parameter.data.to(diffa2.dtype), None
    n_bytes = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
    yield Row(f"all weights, {kind or diffa2.dtype}", "to answer", ratio=n_bytes / 2**30, of="GiB",
              target=WEIGHT_TARGETS.get(kind, ""))


def load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, kind: str | None
         ) -> Diffa2:
    """The size, with downloaded or random weights."""
    config, random = SIZES[args.size][0], args.random_weights
    paths = None if random else locate_all({"whisper": None, "llada": None}, args.size)
    model = weights.build(config, paths, device, dtype, FastLlada, weights.Loading(kind)).eval()
    if random:
        fill_at_random(device, dtype, model.whisper, model.llada, quantize=kind)
    return Diffa2(model, ACOUSTIC_AND_SEMANTIC, load_tokenizer(config, None, random), device, dtype)


def answering(diffa2: Diffa2, stages: dict[int, StageConfig], runs: int, kind: str | None
              ) -> Iterator[Row]:
    """Memory; then decoding, on a GPU as it is recorded and then compiled too."""
    yield from memory(diffa2, {} if kind == "fp8" else stages, kind)
    if kind is None:
        merge_lora(diffa2.model.llada)  # decoding has none beside the weights
    yield from decoding(diffa2, runs, kind, DECODE)
    if diffa2.device.type == "cuda" and kind in (None, "fp8"):
        yield from decoding(diffa2, runs, kind, replace(DECODE, compile=True))


def whole_size(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """What the device can do; the size in each kind of `--quantize`, on a GPU as it is and in all
    kinds that this has; and how fast it trains in stages 1 and 3, if nothing is quantised."""
    stages, on_gpu = SIZES[args.size][1], device.type == "cuda"
    n_kinds = 3 + (torch.cuda.get_device_capability() >= FLOAT8) if on_gpu else 1  # fp8 is last
    yield Row("copy of memory", str(device), ratio=copy_bandwidth(device) / 1e12, of="TB/s")
    yield Row("product of matrices", str(dtype), ratio=matmul_ceiling(device, dtype) / 1e12,
              of="TFLOP/s")
    for kind in args.quantize or (None, *KINDS)[:n_kinds]:
        yield from answering(load(args, device, dtype, kind), stages, args.runs, kind)
        gc.collect()  # so that no tensor of a kind counts for the next
    if args.quantize:
        return
    diffa2 = load(args, device, dtype, None)
    if args.compile:
        compile_blocks(diffa2.model.whisper.blocks, diffa2.model.llada.blocks)
    for number in {1, 3} & stages.keys():
        yield from training(diffa2, stages[number], args.runs)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--size", choices=list(SIZES))
    add("--random-weights", action="store_true", help="instead of downloads")
    add("--compile", action="store_true", help="compile in training (decoding is measured so too)")
    add("--quantize", nargs="+", choices=list(KINDS), default=[], help="measure these kinds alone")
    add("--runs", type=int, default=5)
    add("--decoders", action="store_true", help="how right and how fast each rule of decoding is")
    add("--checkpoint", type=Path, help="of --decoders: what train.py wrote (default: the size's)")
    add("--file", type=Path, help="of --decoders: a manifest (default: ToyBench)")
    add("--type", nargs="+", default=[], help="of its questions, as order (default: all)")
    add("--limit", type=int, help="of --decoders: ask at most so many, evenly spread")
    add("--out", type=Path,
        help="the same as JSON (default: runs/bench_SIZE.json or bench_decoders.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    add("--toy", "--only", "--data", dest="moved", nargs="?", const=True, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    require((args.size or args.decoders) and not args.moved,
            "expected --size or --decoders; the cases for a CPU and the toy's caches are measured "
            "by 'python tutorials/speed.py', in a clone")
    of_rules = args.checkpoint or args.file or args.type or args.limit
    require(not (args.quantize or args.random_weights or args.compile) if args.decoders
            else not of_rules, "--checkpoint, --file, --type and --limit are of --decoders, and "
            "--quantize, --random-weights and --compile of --size alone; leave them out")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    source = find_source(args.size, args.checkpoint) if args.decoders else None
    config = source.config if source else SIZES[args.size][0]
    device, dtype, _ = choose_device(args.device, args.dtype, not config.from_scratch,
                                     quantize="fp8" if "fp8" in args.quantize else None)
    torch.manual_seed(0)
    if source:
        name, asked = "decoders", questions_of(args.file, args.type, args.limit, config.size)
        rows = decoders(Diffa2.load(source, device, dtype), asked)
    else:
        name, rows = args.size, whole_size(args, device, dtype)
    report(rows, args.out or Path("runs", f"bench_{name}.json"), argv, device, dtype)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
