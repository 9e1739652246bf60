"""How fast it is, measured: each case beside what it is to be compared with, on the same random
weights.

    python -m diffa2_mini.bench                                  # the cases for a CPU
    python -m diffa2_mini.bench --toy                            # the caches on the toy tasks (after python data/toy.py)
    python -m diffa2_mini.bench --size full --random-weights     # training and decoding at full size, for a GPU

The confidences of random weights mean nothing, so that decoding follows a fixed schedule. A figure
is the median over `--runs`, in which the variants take turns; beside it stand the fastest and the
slowest run.
"""

from ..command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import dataclasses
import importlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import weights
from ..audio import log_mel, mel_filterbank
from ..command.script import Parser
from ..config import DATA, SIZES, AudioConfig, DecodeConfig, LladaConfig, to_dict
from ..data import load_examples
from ..diffusion import diffusion_loss
from ..errors import require
from ..evaluate.answers import answer
from ..evaluate.scoreboard import columns, report
from ..fast.device import DTYPES, choose_device
from ..fast.generate import generate
from ..fast.llada import FastLlada
from ..fast.measure import memory_above, now
from ..fast.memory import keep_freed_memory
from ..fast.state import BLOCK_STATES, DecodingState
from ..fast.token_losses import token_losses
from ..model import Diffa2Model
from ..tokenizer import Prompt
from ..training import checkpoint
from ..training.features import FeatureCache
from ..training.files import write

BACKBONE = LladaConfig(width=512, n_layers=8, n_heads=8, hidden=1536)
# embeddings, tokens, tokens, and two ids
AUDIO, PROMPT, RESPONSE, MASK, NO_EOS = 439, 60, 128, 5, -1
HALF = torch.full((1,), 0.5)  # the time of a training step
# 8 steps a block
SCHEDULE = DecodeConfig(gen_length=RESPONSE, block_length=32, steps=32, factor=None)


@dataclass
class Row:
    """One variant of a case. `ratio` is how many times faster it is than the variant that it is
    compared with, or, where `of` says so, something else."""

    case: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    of: str = "times as fast"
    target: str = ""
    more: dict = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def take_turns(case: str, variants: dict[str, Callable], runs: int,
               device: torch.device) -> list[Row]:
    """Time the variants, after a first run that does not count. The first variant is what the
    others are compared with."""
    rows = [Row(case, name) for name in variants]
    for run in range(runs + 1):
        for row, variant in zip(rows, variants.values()):
            start = now(device)
            variant()
            row.seconds += [now(device) - start] if run else []
    for row in rows:
        row.ratio = rows[0].median / row.median
    return rows


# --------------------------------------------------------------------- the cases, on random weights


class Released(DecodingState):
    """Reads as the authors' decoder does: everything in every step, and logits at all positions."""

    def forward_all(self, tokens: Tensor, keep: bool = False) -> Tensor:
        before, _ = self.model.splice(self.audio_embeddings, self.prompts)
        x = torch.cat([before, self.model.llada.wte(tokens)], dim=1)
        return self.model.llada.logits(self.model.llada(x, self.valid,
                                                        self.positions))[:, self.n_before:]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def random_backbone(device: torch.device) -> Diffa2Model:
    """A model of which no more than the backbone is used, of BACKBONE's size."""
    tiny = SIZES["toy"][0]
    model = Diffa2Model(dataclasses.replace(tiny, llada=BACKBONE, decode=SCHEDULE),
                        llada=FastLlada).to(device)
    for parameter in model.llada.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def decoding(runs: int, device: torch.device) -> list[Row]:
    """An answer, and eight of them, decoded in several ways."""
    keep_freed_memory()  # as sample.py does
    model = random_backbone(device)
    audio_embeddings, prompts = [*torch.randn(8, AUDIO, BACKBONE.width, device=device)
                                 ], [Prompt([7] * PROMPT, 20)] * 8

    def decode(cache: str, state: type = DecodingState, n_batches: int = 1, n: int = 1) -> Callable:
        config = dataclasses.replace(SCHEDULE, cache=cache)

        def run():
            for _ in range(n_batches):
                for _ in generate(
                        state(model, audio_embeddings[:n], prompts[:n], [RESPONSE] * n, MASK),
                        config, NO_EOS):
                    pass
        return run

    rows = take_turns("answer of 128 tokens, blocks of 32 in 8 steps", {
                          "as released": decode("none", Released), "ours, no cache": decode("none"),
                          "prefix cache": decode("prefix"), "dual cache": decode("dual")
                      }, runs, device)
    rows[2].target, rows[3].target = ">= 4", ">= 6"
    rows += take_turns("8 clips, dual cache",
                       {"one by one": decode("dual", n_batches=8), "a batch": decode("dual", n=8)},
                       runs, device)
    rows[-1].target = ">= 1.5"
    return rows


def loss_at_masks(model: Diffa2Model, audio_embeddings: list[Tensor], response: Tensor,
                  masked: Tensor) -> Tensor:
    """The loss of an answer, as training makes it."""
    noisy, valid = response.masked_fill(masked, MASK), torch.ones_like(masked)
    hidden = model.hidden_states(audio_embeddings, [Prompt([7] * PROMPT, 20)], noisy, valid)[masked]
    losses_of = token_losses(model.llada.logits)
    return diffusion_loss(hidden, response, masked, HALF.to(hidden.device), RESPONSE, losses_of)


def loss_from_all_logits(model: Diffa2Model, audio_embeddings: list[Tensor], response: Tensor,
                         masked: Tensor) -> Tensor:
    """The same from logits at all positions, prompt and audio too."""
    before, _ = model.splice(audio_embeddings, [Prompt([7] * PROMPT, 20)])
    x = torch.cat([before, model.llada.wte(response.masked_fill(masked, MASK))], dim=1)
    logits = model.llada.logits(model.llada(x))[:, -response.shape[1]:][masked]
    return diffusion_loss(logits, response, masked, HALF.to(x.device), RESPONSE)


def training(runs: int, device: torch.device) -> list[Row]:
    """A step of stage 3 on the backbone: LoRA, and the gradient of the audio's embeddings, which
    trains the adapters."""
    model = random_backbone(device)
    model.add_lora()
    optimizer = torch.optim.AdamW(model.train_only(("lora",)).values())
    response = torch.randint(10, BACKBONE.vocab_size, (1, RESPONSE), device=device)
    masked = torch.arange(RESPONSE, device=device)[None] % 2 == 0

    def step(loss: Callable, recompute: str = "nothing") -> Callable:
        def run():
            model.llada.recompute = recompute
            audio_embeddings = [
                torch.randn(AUDIO, BACKBONE.width, device=device, requires_grad=True)]
            loss(model, audio_embeddings, response, masked).backward()
            optimizer.step()
            optimizer.zero_grad()
        return run

    variants = {
        "logits at all positions": step(loss_from_all_logits),
        "ours, nothing recomputed": step(loss_at_masks), "ours, feed-forward recomputed": step(
            loss_at_masks, "feed-forward")}
    rows = take_turns("training step, stage 3", variants, runs, device)
    rows[-1].target = ">= 2"
    for row, variant in zip(rows, variants.values()):
        row.more["bytes above the weights"] = memory_above(variant, device)
    most, *others = (row.more["bytes above the weights"] for row in rows)
    rows += [
        Row("memory above the weights", row.variant, ratio=used and most / used, of="times less")
        for row, used in zip(rows[1:], others)]
    rows[-1].target = ">= 3"
    return rows


def naive_log_mel(x: np.ndarray, config: AudioConfig) -> np.ndarray:
    """The log-mel frame by frame: window, discrete Fourier transform by its definition,
    filterbank."""
    n = np.arange(config.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / config.n_fft)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(config.n_fft // 2 + 1), n) / config.n_fft)
    padded, filters = np.pad(x, config.n_fft // 2, mode="reflect"), mel_filterbank(config).numpy()
    frames = [
        filters @ np.abs(fourier @ (window * padded[i * config.hop_length:][:config.n_fft]))**2
        for i in range(config.max_frames)]
    log = np.log10(np.maximum(np.stack(frames, axis=1), 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def front_end(runs: int, device: torch.device) -> list[Row]:
    """The log-mel of 30 s of sound, on the CPU."""
    config = AudioConfig()
    x = np.random.default_rng(0).normal(0, 0.1, config.max_samples).astype(np.float32)
    variants = {"naive, in NumPy": lambda: naive_log_mel(x, config)}
    if find_spec("whisper"):  # of the extra `reference`
        reference = importlib.import_module("whisper.audio")
        variants[
            f"openai-whisper {version('openai-whisper')}"] = lambda: reference.log_mel_spectrogram(
                x, config.n_mels)
    variants["ours"] = lambda: log_mel(x, config)
    rows = take_turns("log-mel of 30 s", variants, max(runs, 20), torch.device("cpu"))
    rows[-1].target = "no slower than openai-whisper"
    return rows


# in this order: decoding keeps freed memory
CASES = {"training": training, "decoding": decoding, "log-mel": front_end}


# --------------------------------------------------------------------------------- the toy's caches


def toy(data: Path, runs: int, device: torch.device) -> list[Row]:
    """The shipped toy model on its validation questions: every cache at several factors of parallel
    decoding, 64 questions at once; and on every tenth question one at a time, as the model decodes
    by default."""
    require((data / "validation.json").is_file(),
            f"{data}: expected the toy world, found none; in a clone of the repository "
            "'python data/toy.py' makes it, or name it: --data")
    trained = checkpoint.load(weights.SHIPPED["diffa2"])
    config = trained.config
    model = weights.build(config, None, None, device, torch.float32, llada_class=FastLlada).eval()
    checkpoint.restore(model, trained.model, "the shipped checkpoint")
    tokenizer, features = weights.load_tokenizer(config), FeatureCache(
        model, device, torch.float32, keep=True)
    examples = load_examples(
        data / "validation.json", SIZES["toy"][1][2], config, False, print)
    features.prepare([example.path for example in examples], iter)
    rows = []
    for block, micro_batch, asked in ((8, 64, examples), (16, 64, examples), (16, 1,
                                                                              examples[::10])):
        for factor in (0.25, 0.5, 1.0, 2.0) if micro_batch > 1 else (config.decode.factor,):
            found = {}

            def ask(cache: str) -> Callable:
                decode = dataclasses.replace(config.decode, block_length=block, factor=factor,
                                             cache=cache)

                def run():
                    found[cache] = answer(model, tokenizer, features, asked, trained.audio, decode,
                                          micro_batch)
                return run

            case = f"toy, blocks of {block}, f = {factor:g}, {len(asked)} questions, {micro_batch} at once"
            rows += take_turns(case, {cache: ask(cache) for cache in BLOCK_STATES}, runs, device)
            for row in rows[-len(BLOCK_STATES):]:
                replies, row.more["forward passes"] = found[row.variant]
                row.ratio, row.of = report(
                    asked, replies
                ).figures["overall"], f"right, {row.more['forward passes']} forward passes"
    return rows


# -------------------------------------------------------------------------------------- the command


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(
        line.split(":", 1)
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines()) if cpuinfo.exists() else {}
    about = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = f"{about['model name']} (family {about['cpu family']}, model {about['model']})" if "model name" in about else platform.machine(
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "dtype": str(dtype), "threads": str(torch.get_num_threads()), "cores": str(
            os.cpu_count()), "system": platform.system(), "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__}


def table(rows: list[Row]) -> str:
    """The rows as text, a column for each figure."""
    cells = [("case", "variant", "median s", "fastest", "slowest", "", "", "target")]
    for row in rows:
        times = [f"{t:.4g}" for t in (row.median, min(row.seconds),
                                      max(row.seconds))] if row.seconds else ["", "", ""]
        cells.append((row.case, row.variant, *times,
                      "" if row.ratio is None else f"{row.ratio:.3g}", row.of, row.target))
    return columns(cells)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--toy", action="store_true", help="measure the caches on the toy tasks")
    add("--data", type=Path, default=DATA / "toy",
        help="of --toy: the toy world (default: data/toy in a clone)")
    add("--size", choices=list(SIZES), help="measure training and decoding of a whole size")
    add("--random-weights", action="store_true", help="with --size: instead of downloads")
    add("--compile", action="store_true", help="with --size: have torch.compile fuse operations")
    add("--only", action="append", choices=list(CASES),
        help="of the cases for a CPU; may be given again")
    add("--runs", type=int, default=5)
    add("--out", type=Path, help=
        "a file for the same as JSON (default: runs/bench.json, bench_toy.json or bench_SIZE.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    args = parser.parse_args(argv)
    require(not (args.toy and args.size), "--toy and --size exclude each other; choose one")
    args.out = args.out or Path(
        "runs", "_".join(["bench", *["toy"] * args.toy, *[args.size] * bool(args.size)]) + ".json")
    return args


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    large = bool(args.size) and not SIZES[args.size][0].from_scratch
    device, dtype, _ = choose_device(args.device, args.dtype, large)
    about = machine(device, dtype)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    torch.manual_seed(0)
    if args.size:
        from .whole_size import whole_size
        rows, config = whole_size(args.size, args.runs, device, dtype, args.compile,
                                  args.random_weights), to_dict(SIZES[args.size][0])
    elif args.toy:
        rows, config = toy(args.data, args.runs, device), to_dict(SIZES["toy"][0])
    else:
        config = {
            "llada": to_dict(BACKBONE), "audio": AUDIO, "prompt": PROMPT, "response": RESPONSE,
            "decode": to_dict(SCHEDULE)}
        rows = [
            row for name, case in CASES.items() if not args.only or name in args.only
            for row in case(args.runs, device)]
    found = [
        dataclasses.asdict(row) | {"median": row.median if row.seconds else None} for row in rows]
    text = json.dumps({"machine": about, "sizes": config, "rows": found}, indent=2) + "\n"
    write(args.out, lambda path: path.write_text(text))
    print(table(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
