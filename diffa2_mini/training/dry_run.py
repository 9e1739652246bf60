"""The dry run: the memory, the operations and the hours that a stage would take.

The model is built on torch's `meta` device, where tensors have shapes and no values, so the counts
of weights are exact. Memory and floating-point operations follow from the shapes by the formulas
below, for the longest clips that the model takes.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..command.table import columns
from ..config import DATA, SIZES, Config, StageConfig
from ..data import n_embeddings, read_manifest
from ..fast.device import choose_device
from ..fast.token_losses import CHUNK
from ..model import PARTS, Diffa2Model, part_of
from ..quantize import BLOCK, GROUP, ROWS

GIB = 2**30
PROMPT, RESPONSE = 64, 128  # tokens of an example, beside its audio
HOURS = {1: 11_000, 2: 3_700, 3: 3_700}  # of audio that the authors trained on (section 4)
PAIRS = 3_000  # and preference pairs
# a second, dense bfloat16
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "L40S": 362e12}
UTILISATION = 0.4  # of that peak, assumed


@dataclass
class Shape:
    """What goes through the model: `clips` through the encoder; through the backbone rows of
    `lengths` (tokens before the answer, tokens of the answer), with `masked` tokens in all."""

    clips: int
    lengths: list[tuple[int, int]]
    masked: int

    @property
    def tokens(self) -> int:
        return sum(before + own for before, own in self.lengths)

    @property
    def answers(self) -> int:
        return sum(own for _, own in self.lengths)


def shape_of(config: Config, stage: StageConfig, clips: int) -> Shape:
    """The shape of `clips` examples or pairs of the longest clips, half of each answer masked."""
    before = n_embeddings(config.adapter, stage.audio, config.audio.max_frames // 2) + PROMPT
    rows = clips * (2 * stage.vrpo_samples if stage.preference else 1)
    return Shape(clips, [(before, RESPONSE)] * rows, rows * RESPONSE // 2)


def count_parameters(config: Config, stage: StageConfig) -> dict[str, tuple[int, int]]:
    """How many numbers each part has, and how many of them a stage trains."""
    with torch.device("meta"):
        model = Diffa2Model(config)
    if "lora" in stage.trains:
        model.add_lora()
    model.train_only(stage.trains)
    counts = {part: [0, 0] for part in (*PARTS.values(), "lora")}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        counts[part_of(name)][0] += tensor.numel()
        counts[part_of(name)][1] += tensor.numel() * tensor.requires_grad
    return {part: tuple(count) for part, count in counts.items() if count[0]}


def turned_back(config: Config, width: int, quantize: str) -> int:
    """Bytes of the largest slice of a quantised weight while its codes are turned back; from NF4,
    with a whole number for each two."""
    largest = config.llada.width * max(config.llada.hidden, min(ROWS, config.llada.vocab_size))
    return largest * {"int8": width, "nf4": width + 2}[quantize]


def frozen_bytes(config: Config, width: int, quantize: str) -> int:
    """Bytes of the frozen parts with quantised linear layers, as quantize.py has them."""
    with torch.device("meta"):
        model = Diffa2Model(config)
    parts = nn.ModuleList([model.whisper, model.llada])
    linear = [layer.weight for layer in parts.modules() if isinstance(layer, nn.Linear)]
    n, rows = sum(weight.numel() for weight in linear), sum(map(len, linear))
    kept = {"int8": n + 4 * rows, "nf4": n / 2 + n / BLOCK + 4 * n / BLOCK / GROUP}[quantize]
    rest = sum(tensor.numel() for tensor in [*parts.parameters(), *parts.buffers()]) - n
    return int(kept) + rest * width


def activation_bytes(config: Config, stage: StageConfig, shape: Shape, width: int,
                     recompute: str) -> int:
    """Most bytes the forward pass keeps and the backward pass adds; `width` for a frozen number."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    tokens, lora = shape.tokens, width * D * ("lora" in stage.trains)
    # A block keeps the float32 input of its norm, q, k, v and what attention gives; then that of
    # the other norm and the three inner tensors of SwiGLU; LoRA also the input of the projections
    # in each half. The last block answers for responses alone.
    attention, feed_forward = 4 * D + 4 * width * D + lora, 4 * D + 3 * width * H + lora
    last = tokens * attention + shape.answers * feed_forward
    kept, again = {
        "nothing": (tokens * (layers - 1) * (attention + feed_forward) + last, 0),
        "feed-forward": (tokens * layers * (attention + width * D), tokens * feed_forward),
        "blocks": (tokens * layers * width * D, tokens * (attention + feed_forward))}[recompute]
    inner = tokens * 3 * width * H  # gradients of SwiGLU, the widest place of the backward pass
    # Logits and, in float32, their logarithmic softmax, which becomes their gradient.
    head = min(CHUNK, shape.masked) * config.llada.vocab_size * 8
    E, T, taps = config.whisper.width, config.audio.max_frames // 2, len(config.whisper.taps)
    read = taps * ("acoustic" in stage.audio)  # by the acoustic adapter
    states = taps + 2 * read * config.adapter.qformer_layers + 6  # [T, E] each
    return kept + shape.clips * T * E * width * states + max(head, again + inner)


def split_away(config: Config, processes: int) -> int:
    """Numbers of the frozen backbone that a device does not hold if `processes` share its blocks,
    of which the one that runs is whole."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    block = 4 * D**2 + 3 * D * H + 2 * D
    return (layers - 1) * (block - block // processes)


def resident_bytes(counts: dict[str, tuple[int, int]], stage: StageConfig, width: int,
                   away: int = 0) -> dict[str, int]:
    """Bytes that are there all the time, with so many numbers of the frozen parts `away`."""
    frozen = counts["whisper"][0] + counts["llada"][0]
    ours = sum(total for total, _ in counts.values()) - frozen
    trained = sum(count for _, count in counts.values())
    return {"weights, frozen": (frozen - away) * width,
            "weights of adapters and LoRA, float32": 4 * ours,
            "gradients": 4 * trained, "state of AdamW": 8 * trained,
            "reference of VRPO": 4 * ours if stage.preference else 0,
            "copies of what is trained, for autocast": 2 * ours if width == 2 else 0}


def step_flops(config: Config, stage: StageConfig, shape: Shape) -> float:
    """Floating-point operations of a forward and backward pass: two per weight and token each way,
    as a frozen weight has no gradient of its own. What recomputation repeats does not count."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    E, T = config.whisper.width, config.audio.max_frames // 2
    rest = 2 * D**2 + 3 * D * H  # all but keys and values; in the last block for answers alone
    pairs = sum((before + own) * ((layers - 1) * (before + own) + own)
                for before, own in shape.lengths)  # that attend
    weights = shape.tokens * (layers * 2 * D**2 + (layers - 1) * rest) + shape.answers * rest
    forward = 2 * (weights + 2 * pairs * D) + shape.masked * 2 * D * config.llada.vocab_size
    attention_gradients = 4 * pairs * D  # both factors of a product of activations have one
    encoder = shape.clips * T * config.whisper.n_layers * 2 * (12 * E**2 + 2 * T * E)
    reference = forward if stage.preference else 0
    return 2 * forward + attention_gradients + encoder + reference


@dataclass(frozen=True)
class Plan:
    """How the stages of a size would be run."""

    size: str
    dtype: str  # of the frozen parts, or "auto"
    recompute: str
    processes: int = 1
    shard: bool = False
    data: Path | None = None  # None: the authors'
    quantize: str | None = None  # int8 or nf4: how the linear layers of the frozen parts are kept


def number_of_examples(config: Config, stage: StageConfig, data: Path | None) -> tuple[int, str]:
    """How many examples an epoch has, and who says so. Raises UserError if `data` has none."""
    folder = data or DATA / ("toy" if config.from_scratch else "librispeech")
    manifest = folder if folder.is_file() else folder / f"{stage.data}.json"
    if data or manifest.is_file():
        return len(read_manifest(manifest)), str(manifest)
    if config.from_scratch:
        return 0, "the toy world is not made yet"
    if stage.preference:
        return PAIRS, "the authors' pairs"
    hours = HOURS[stage.number]
    return hours * 3600 // config.audio.max_seconds, f"the authors' {hours:,} hours"


def number_of_steps(stage: StageConfig, n_examples: int) -> int:
    """How many steps a stage has on so many examples."""
    return stage.steps or math.ceil(stage.epochs * n_examples / stage.batch_size)


def memory_of(plan: Plan, stage: StageConfig, counts: dict[str, tuple[int, int]]
              ) -> dict[str, int]:
    """Bytes in each process, by what they hold, with `count_parameters`."""
    config = SIZES[plan.size][0]
    width = choose_device("auto", plan.dtype, not config.from_scratch, trains=True)[1].itemsize
    away = split_away(config, plan.processes) if plan.shard else 0
    memory = resident_bytes(counts, stage, width, away)
    if kind := plan.quantize:
        memory["weights, frozen"] = frozen_bytes(config, width, kind)
        memory[f"a layer turned back from {kind}"] = turned_back(config, width, kind)
    again = "" if plan.recompute == "nothing" else f", {plan.recompute} recomputed"
    memory[f"activations, {stage.micro_batch} at once{again}"] = activation_bytes(
        config, stage, shape_of(config, stage, stage.micro_batch), width, plan.recompute)
    return memory | {"estimated peak memory": sum(memory.values())}


def work_of(plan: Plan, stage: StageConfig) -> tuple[dict[str, str], float]:
    """The work of a stage, as text, and its hours if each GPU reaches UTILISATION of its peak."""
    config, n_cards = SIZES[plan.size][0], plan.processes
    n_examples, source = number_of_examples(config, stage, plan.data)
    n_steps, step = number_of_steps(stage, n_examples), shape_of(config, stage, stage.batch_size)
    flops = step_flops(config, stage, step)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in card), PEAK_FLOPS["A100"])
    hours = n_steps * flops / (UTILISATION * peak * n_cards) / 3600
    return {"tokens per step": f"{step.tokens:,}", "operations per step": f"{flops:.3g}",
            "examples per epoch": f"{n_examples:,} ({source})",
            "steps": f"{n_steps:,} of {stage.batch_size} examples",
            f"hours on {'one' if n_cards == 1 else n_cards} {card}, at {UTILISATION:.0%} of "
            f"{peak / 1e12:.0f} TFLOP/s": f"{hours:,.2f}"}, hours


def show(plan: Plan, stages: list[StageConfig]) -> None:
    """`train.py --dry-run`: print what each stage would take, on its data."""
    config, total = SIZES[plan.size][0], 0.0
    for stage in stages:
        counts, (work, hours) = count_parameters(config, stage), work_of(plan, stage)
        total += hours
        parts = [(part, f"{n:,}", f"{trained:,}") for part, (n, trained) in counts.items()]
        memory = memory_of(plan, stage, counts)
        print(f"\nstage {stage.number}, {stage.title}; clips of {config.audio.max_seconds} s, "
              f"{RESPONSE} response tokens",
              columns([("part", "parameters", "trained"), *parts]),
              f"trainable parameters: {sum(trained for _, trained in counts.values()):,}",
              columns([(what, f"{n / GIB:.2f} GiB") for what, n in memory.items() if n]),
              columns(list(work.items())), sep="\n")
    if len(stages) > 1:
        print(f"\nhours of all stages: {total:,.2f}")
