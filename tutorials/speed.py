"""How fast the parts are on a CPU, each beside what it is compared with: decoding and a training
step beside the released way, the log-mel beside others; and what the caches cost the toy model.

    python tutorials/speed.py                                # all cases
    python tutorials/speed.py --only decoding --runs 1       # one of them
    python data/toy.py && python tutorials/speed.py --toy    # the caches

All but the caches are measured on the same random weights, which are never confident, so decoding
follows a fixed schedule. A figure is the median over `--runs`, in which the variants take turns,
with the fastest and the slowest run behind it. It is printed and written as soon as it is there.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, product

import numpy as np
import torch
from torch import Tensor

from diffa2_mini import diffusion
from diffa2_mini.audio import log_mel, mel_filterbank
from diffa2_mini.bench.timing import MASK_ID, PROMPT, Row, decode, report
from diffa2_mini.command.script import Parser
from diffa2_mini.config import DATA, SIZES, AudioConfig, DecodeConfig, LladaConfig
from diffa2_mini.data import load_examples
from diffa2_mini.errors import require
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.fast import measure
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.state import CACHES, DecodingState
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.listen import Diffa2
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training.features import FeatureCache

BACKBONE = LladaConfig(width=512, n_layers=8, n_heads=8, hidden=1536)
N_AUDIO, N_RESPONSE = 439, 128  # audio embeddings and response tokens
# 8 steps a block; random weights are never confident, so the schedule is fixed
SCHEDULE = DecodeConfig(gen_length=N_RESPONSE, block_length=32, steps=32, factor=None)


def take_turns(case: str, variants: dict[str, Callable], runs: int, device: torch.device,
               targets: dict[str, str] | None = None) -> tuple[list[Row], list]:
    """Time the variants in turn, so that a change of the machine's speed meets all of them. A first
    run of each does not count. Returns a row for each, and what each returned last."""
    rows = [Row(case, name, target=(targets or {}).get(name, "")) for name in variants]
    for run in range(runs + 1):
        results = []
        for row, variant in zip(rows, variants.values()):
            start = measure.now(device)
            results.append(variant())
            row.seconds += [measure.now(device) - start] if run > 0 else []
    for row in rows:
        row.ratio = rows[0].median / row.median
    return rows, results


def random_backbone(device: torch.device) -> Diffa2Model:
    """A model of which only the backbone is used, of BACKBONE's size."""
    return Diffa2Model(replace(SIZES["toy"][0], llada=BACKBONE), llada=FastLlada).to(device).eval()


class ReleasedDecoding(DecodingState):
    """Computes as the authors' decoder does: everything in every step, and logits at all positions,
    those of prompt and audio too."""

    def forward_all(self, tokens: Tensor, how: DecodeConfig | None = None) -> Tensor:
        before, _ = self.model.splice(self.audio_embeddings, self.prompts)  # [B, P, D]
        x = torch.cat([before, self.model.llada.wte(tokens)], dim=1)  # [B, P + R, D]
        hidden = self.model.llada(x, self.valid, self.positions)
        return self.model.llada.logits(hidden)[:, self.n_before:]  # [B, R, V]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def decoding(runs: int, device: torch.device) -> Iterator[Row]:
    """One answer, and eight of them, decoded in several ways."""
    measure.keep_freed_memory()  # as sample.py does
    model = random_backbone(device)
    clips = [*torch.randn(8, N_AUDIO, BACKBONE.width, device=device)]
    plain, prefix, dual = (replace(SCHEDULE, cache=cache) for cache in CACHES)
    answer = partial(decode, model, clips[:1])
    ways = {"as released": partial(answer, plain, ReleasedDecoding),
            "ours, no cache": partial(answer, plain),
            "prefix cache": partial(answer, prefix),
            "dual cache": partial(answer, dual)}
    yield from take_turns("answer of 128 tokens, blocks of 32 in 8 steps", ways, runs, device,
                          {"prefix cache": ">= 4", "dual cache": ">= 6"})[0]
    ways = {"one by one": lambda: [decode(model, [clip], dual) for clip in clips],
            "a batch": partial(decode, model, clips, dual)}
    yield from take_turns("8 clips, dual cache", ways, runs, device, {"a batch": ">= 1.5"})[0]


def answer_loss(model: Diffa2Model, audio: Tensor, response: Tensor, released: bool) -> Tensor:
    """The loss of an answer [1, R] to a clip [A, D] at t = 0.5, as training computes it; or as
    `released`, from logits at all positions."""
    masked = torch.arange(response.shape[1], device=response.device)[None] % 2 == 0  # [1, R]
    noisy = response.masked_fill(masked, MASK_ID)
    if released:
        state = ReleasedDecoding(model, [audio], [PROMPT], [response.shape[1]], MASK_ID)
        found, losses_of = state.forward_all(noisy), diffusion.token_losses
    else:
        found = model.hidden_states([audio], [PROMPT], noisy, torch.ones_like(masked))
        losses_of = token_losses(model.llada.logits)
    return losses_of(found[masked], response[masked]).mean()  # all have the same weight


def memory_above(function: Callable, device: torch.device) -> int | None:
    """The most bytes in use while `function` runs, less those before it: on CUDA of tensors, on
    Linux of the process. None on other systems."""
    def bytes_of(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        peak = torch.cuda.max_memory_allocated()
    elif sys.platform == "linux":
        with suppress(OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what is kept
        before = bytes_of("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        function()
        peak = bytes_of("VmHWM")
    else:
        return None
    return peak - before


def training(runs: int, device: torch.device) -> Iterator[Row]:
    """A step of stage 3 on the backbone: LoRA, and the gradient of the audio embeddings, which
    trains the adapters."""
    model = random_backbone(device)
    model.add_lora()
    optimizer = torch.optim.AdamW(model.train_only(("lora",)).values())
    response = torch.randint(10, BACKBONE.vocab_size, (1, N_RESPONSE), device=device)

    def step(released: bool = False, recompute: str = "nothing") -> None:
        model.llada.recompute = recompute
        audio = torch.randn(N_AUDIO, BACKBONE.width, device=device, requires_grad=True)
        answer_loss(model, audio, response, released).backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = {"logits at all positions": partial(step, released=True),
            "ours, nothing recomputed": step,
            "ours, feed-forward recomputed": partial(step, recompute="feed-forward")}
    yield from take_turns("training step, stage 3", ways, runs, device,
                          {"ours, feed-forward recomputed": ">= 2"})[0]
    used = [memory_above(way, device) for way in ways.values()]
    if all(used):  # this system tells it
        for name, n_bytes, target in zip(ways, used, ("", "", ">= 3")):
            yield Row("memory above the weights", name, ratio=used[0] / n_bytes,
                      of=f"times less, {n_bytes / 2**20:.0f} MiB", target=target)


def naive_log_mel(x: np.ndarray, config: AudioConfig) -> np.ndarray:
    """The log-mel [n_mels, M] of samples, a frame at a time: window, discrete Fourier transform by
    its definition, filterbank."""
    n = np.arange(config.n_fft)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / config.n_fft)
    fourier = np.exp(-2j * np.pi * np.outer(np.arange(config.n_fft // 2 + 1), n) / config.n_fft)
    filters, padded = mel_filterbank(config).numpy(), np.pad(x, config.n_fft // 2, mode="reflect")
    frames = (window * padded[start:start + config.n_fft]
              for start in range(0, config.max_samples, config.hop_length))
    bands = [filters @ np.abs(fourier @ frame)**2 for frame in frames]
    log = np.log10(np.maximum(np.stack(bands, axis=1), 1e-10))
    return (np.maximum(log, log.max() - 8) + 4) / 4


def front_end(runs: int, device: torch.device) -> list[Row]:
    """The log-mel of 30 s of sound, on the CPU."""
    config = AudioConfig()
    x = np.random.default_rng(0).normal(0, 0.1, config.max_samples).astype(np.float32)
    ways = {"naive, in NumPy": partial(naive_log_mel, x, config)}
    if find_spec("whisper"):  # of the extra `reference`
        whisper = import_module("whisper")
        ways[f"openai-whisper {whisper.__version__}"] = partial(whisper.log_mel_spectrogram, x,
                                                                config.n_mels)
    ways["ours"] = partial(log_mel, x, config)
    return take_turns("log-mel of 30 s", ways, max(runs, 20), torch.device("cpu"),
                      {"ours": "no slower than openai-whisper"})[0]


def toy(data: Path, runs: int, device: torch.device) -> Iterator[Row]:
    """The shipped toy model on its validation questions: every cache at several factors of parallel
    decoding, 64 questions at once; and every tenth question alone, as the model decodes by default.
    """
    require((data / "validation.json").is_file(),
            f"{data}: expected the toy world, found none; in a clone of the repository "
            "'python data/toy.py' makes it, or name it: --data")
    diffa2 = Diffa2.from_pretrained("toy", device=device.type, dtype="float32")
    config, features = diffa2.config, FeatureCache(diffa2.model, device, diffa2.dtype, keep=True)
    examples = load_examples(data / "validation.json", SIZES["toy"][1][2], config)
    settings = [(block, factor, examples, 64)
                for block, factor in product((8, 16), (0.25, 0.5, 1.0, 2.0))]
    for block, factor, asked, at_once in [*settings, (16, config.decode.factor, examples[::10], 1)]:
        ways = {}
        for cache in CACHES:
            decode = replace(config.decode, block_length=block, factor=factor, cache=cache)
            respondent = Respondent(features, diffa2.tokenizer, diffa2.parts, decode)
            ways[cache] = partial(respondent.answer, asked, at_once)
        case = f"toy, blocks of {block}, f = {factor:g}, {len(asked)} questions, {at_once} at once"
        for row, (replies, n_passes) in zip(*take_turns(case, ways, runs, device)):
            row.ratio = scoreboard.report(asked, replies).figures["overall"]
            row.of = f"right, {n_passes} forward passes"
            yield row


# in this order, as decoding keeps freed memory
CASES = {"training": training, "decoding": decoding, "log-mel": front_end}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--toy", action="store_true", help="measure the caches on the toy's questions")
    add("--data", type=Path, default=DATA / "toy", help="of --toy: the toy world")
    add("--only", action="append", choices=list(CASES), help="of the cases; repeatable")
    add("--runs", type=int, default=5)
    add("--out", type=Path, help="the same as JSON (default: runs/bench.json or bench_toy.json)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    add("--threads", type=int, help="CPU threads (default: one per core)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, dtype, _ = choose_device(args.device, "float32")
    torch.manual_seed(0)
    if args.toy:
        name, rows = "bench_toy", toy(args.data, args.runs, device)
    else:
        asked = [CASES[case] for case in CASES if case in (args.only or CASES)]
        name, rows = "bench", chain.from_iterable(case(args.runs, device) for case in asked)
    report(rows, args.out or Path("runs", f"{name}.json"), argv, device, dtype)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
