"""The dry run: what a stage would take, counted and not tried. Memory, floating-point operations,
hours.

The model is built on torch's `meta` device, where tensors have shapes and no values, so that the
counts of weights are exact. Memory and operations follow from the shapes by the formulas below, for
the longest clips that the model hears.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..command.table import columns
from ..config import DATA, SIZES, Config, StageConfig
from ..data import n_embeddings, read_manifest
from ..errors import UserError
from ..fast.device import DTYPES
from ..fast.token_losses import CHUNK
from ..model import PREFIXES, Diffa2Model, part_of

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
    """The shape of `clips` examples, or pairs, of the longest clips; half of the tokens of the
    response are masked."""
    before = n_embeddings(config.adapter, stage.audio, config.audio.max_frames // 2) + PROMPT
    rows = clips * (2 * stage.vrpo_samples if stage.preference else 1)
    return Shape(clips, [(before, RESPONSE)] * rows, rows * RESPONSE // 2)


def shape_of_step(stage: StageConfig, lengths: list[tuple[int, int]], n_masked: int,
                  encoded: bool) -> Shape:
    """The shape of a step on answers of known `lengths`, whose clips were `encoded` or are kept."""
    return Shape(stage.batch_size * encoded,
                 lengths * (stage.vrpo_samples if stage.preference else 1), n_masked)


def count_parameters(config: Config, stage: StageConfig) -> dict[str, tuple[int, int]]:
    """Numbers in each part, Whisper's table of positions among them, and how many of them the stage
    trains; LoRA is there once a stage trains it."""
    with torch.device("meta"):
        model = Diffa2Model(config)
    if "lora" in stage.trains:
        model.add_lora()
    model.train_only(stage.trains)
    counts = {part: [0, 0] for part in (*PREFIXES, "lora")}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        counts[part_of(name)][0] += tensor.numel()
        counts[part_of(name)][1] += tensor.numel() * tensor.requires_grad
    return {part: tuple(count) for part, count in counts.items() if count[0]}


def recompute(config: Config) -> str:
    """What of the backbone the backward pass computes again, if the user does not say."""
    return "nothing" if config.from_scratch else "blocks"


def activation_bytes(config: Config, stage: StageConfig, shape: Shape, width: int,
                     recompute: str) -> int:
    """Peak of what the forward pass keeps and the backward pass adds, with `width` bytes per number
    of the frozen parts (2 for bfloat16, 4 for float32)."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    tokens, lora = shape.tokens, width * D * ("lora" in stage.trains)
    # A block keeps the float32 input of its norm, q, k, v and what attention gives; then that of
    # the other norm and the three inner tensors of SwiGLU; LoRA also the input of the projections
    # in each half. The last block answers for responses alone.
    attention = 4 * D + 4 * width * D + lora
    feed_forward = 4 * D + 3 * width * H + lora
    kept, again = {
        "nothing": (tokens * layers * attention + (tokens *
                                                   (layers - 1) + shape.answers) * feed_forward, 0),
        "feed-forward": (tokens * layers * (attention + width * D), tokens * feed_forward),
        "blocks": (tokens * layers * width * D, tokens * (attention + feed_forward)),
    }[recompute]
    inner = tokens * 3 * width * H  # gradients of SwiGLU, the widest place of the backward pass
    # Logits and, in float32, their logarithmic softmax, which becomes their gradient; in bfloat16
    # that also in their dtype.
    head = min(CHUNK, shape.masked) * config.llada.vocab_size * 8
    E, T = config.whisper.width, config.audio.max_frames // 2
    taps = len(config.whisper.taps) if "acoustic" in stage.audio else 0
    audio_embeddings = shape.clips * T * E * width * (len(config.whisper.taps) +
                                                      2 * taps * config.adapter.qformer_layers + 6)
    return kept + audio_embeddings + max(head, again + inner)


def split_away(config: Config, processes: int) -> int:
    """Numbers of the frozen backbone that are not on a device if its blocks are split among
    `processes`, one of which is whole while it runs."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    block = 4 * D**2 + 3 * D * H + 2 * D
    return (layers - 1) * (block - block // processes)


def resident_bytes(counts: dict[str, tuple[int, int]], stage: StageConfig, width: int,
                   away: int = 0) -> dict[str, int]:
    """Bytes that are there all the time, with so many numbers of the frozen parts `away`."""
    frozen = sum(
        total for part, (total, _) in counts.items() if part in ("whisper", "llada")) - away
    ours = sum(total for total, _ in counts.values()) - frozen - away
    trained = sum(count for _, count in counts.values())
    return {"weights, frozen": frozen * width, "weights of adapters and LoRA, float32": 4 * ours,
            "gradients": 4 * trained, "state of AdamW": 8 * trained,
            "reference of VRPO": 4 * ours if stage.preference else 0,
            "copies of what is trained, for autocast": 2 * ours if width == 2 else 0}


def peak_bytes(config: Config, stage: StageConfig, counts: dict, shape: Shape, width: int,
               recompute: str) -> int:
    """The most memory that a training step has at any time, in bytes."""
    return sum(resident_bytes(counts, stage, width).values()) + activation_bytes(
        config, stage, shape, width, recompute)


def step_flops(config: Config, stage: StageConfig, shape: Shape) -> float:
    """Floating-point operations that a forward and backward pass need: two per weight and token
    each way, as a frozen weight has no gradient of its own. What recomputation repeats does not
    count."""
    D, H, layers = config.llada.width, config.llada.hidden, config.llada.n_layers
    E, T = config.whisper.width, config.audio.max_frames // 2
    # The last block reads everything, and answers for responses alone: keys and values of all, the
    # rest of theirs.
    # that attend
    pairs = sum(
        (before + own) * ((layers - 1) * (before + own) + own) for before, own in shape.lengths)
    rest = 2 * D**2 + 3 * D * H
    backbone = 2 * (shape.tokens * (layers * 2 * D**2 +
                                    (layers - 1) * rest) + shape.answers * rest + 2 * pairs * D)
    head = shape.masked * 2 * D * config.llada.vocab_size
    attention_gradients = 4 * pairs * D  # both factors of a product of activations have one
    encoder = shape.clips * T * config.whisper.n_layers * 2 * (12 * E**2 + 2 * T * E)
    reference = backbone + head if stage.preference else 0
    return 2 * (backbone + head) + attention_gradients + encoder + reference


def throughput(config: Config, stage: StageConfig, shape: Shape, seconds: float,
               ceiling: float) -> dict[str, float]:
    """How fast a step was: tokens a second, padding not counted, and its share of the operations
    that a `ceiling` allows in that time (model FLOPs utilisation)."""
    return {
        "tokens_per_second": shape.tokens / seconds,
        "mfu": step_flops(config, stage, shape) / seconds / ceiling}


def gpu() -> tuple[str, float]:
    """The name of the GPU that is there, or of an H200, and its peak."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "H200"
    return name, next((peak for key, peak in PEAK_FLOPS.items() if key in name), PEAK_FLOPS["A100"])


MANIFESTS = {  # what each stage needs, and one entry of it
    1: ("stage1.json", "speech with its transcripts",
        '{"audio_filepath": "clip.wav", "transcription": "hello there"}'),
    2: ("sft.json", "questions about clips with their answers",
        '{"audio_filepath": "clip.wav", "input": "How many speakers are there?", "target": "two"}'),
    4: ("preference.json", "questions with a right and a wrong answer",
        '{"audio_filepath": "clip.wav", "input": "Who laughs?", "chosen": "a child", '
        '"rejected": "a man"}'),
}
MANIFESTS[3] = MANIFESTS[2]


def prepared_data(config: Config, stages: list[int]) -> Path:
    """Where data/librispeech.py puts the data of a downloaded model. Raises UserError that says
    what the first stage without data needs."""
    folder = DATA / "librispeech"
    for stage in stages:
        name, what, line = MANIFESTS[stage]
        if not (folder / name).exists():
            how = ("python data/librispeech.py prepares LibriSpeech" if stage == 1 else
                   "data/README.md says where the authors' data comes from")
            raise UserError(f"stage {stage} of size {config.size} needs --data: a manifest of "
                            f"{what}, an entry being {line}; {how}")
    return folder


def number_of_examples(config: Config, number: int, stage: StageConfig,
                       data: Path | None) -> tuple[int, str]:
    """How many examples an epoch has, and the source of that number. Raises UserError if `data` has
    none."""
    folder = data or DATA / ("toy" if config.from_scratch else "librispeech")
    manifest = folder if folder.is_file() else folder / MANIFESTS[number][0]
    if data or manifest.is_file():
        return len(read_manifest(manifest)), str(manifest)
    if config.from_scratch:
        return 0, "the toy world is not made yet"
    if stage.preference:
        return PAIRS, "the authors' pairs"
    return HOURS[number] * 3600 // config.audio.max_seconds, f"the authors' {HOURS[number]:,} hours"


def number_of_steps(stage: StageConfig, n_examples: int) -> int:
    """How many steps a stage has on so many examples."""
    return stage.steps or math.ceil(stage.epochs * n_examples / stage.batch_size)


@dataclass(frozen=True)
class Plan:
    """How the stages would be run."""

    dtype: str  # of the frozen parts, or "auto"
    recompute: str | None  # None: the default
    processes: int = 1
    shard: bool = False

    def width(self, config: Config) -> int:
        """Bytes per number of the frozen parts."""
        name = self.dtype
        if name == "auto":
            is_large = not config.from_scratch
            name = "bfloat16" if is_large or torch.cuda.is_available() else "float32"
        return DTYPES[name].itemsize


def hours(config: Config, stage: StageConfig, n_examples: int, plan: Plan) -> float:
    """How long a stage takes, if each process reaches UTILISATION of a GPU's peak."""
    n_steps = number_of_steps(stage, n_examples)
    flops = step_flops(config, stage, shape_of(config, stage, stage.batch_size))
    return n_steps * flops / (UTILISATION * gpu()[1] * plan.processes) / 3600


def memory_rows(config: Config, stage: StageConfig, counts: dict, plan: Plan
                ) -> list[tuple[str, str]]:
    """The memory of each process, as rows of text."""
    width, recomputed = plan.width(config), plan.recompute or recompute(config)
    away = split_away(config, plan.processes) if plan.shard else 0
    resident = resident_bytes(counts, stage, width, away)
    piece = shape_of(config, stage, stage.micro_batch)
    activations = activation_bytes(config, stage, piece, width, recomputed)
    rows = [(name, f"{size / GIB:.2f} GiB") for name, size in resident.items() if size]
    name = f"activations, {stage.micro_batch} at once"
    if recomputed != "nothing":
        name += f", {recomputed} recomputed"
    total = sum(resident.values()) + activations
    return [*rows, (name, f"{activations / GIB:.2f} GiB"),
            ("estimated peak memory", f"{total / GIB:.2f} GiB")]


def plan_of_stage(config: Config, stage: StageConfig, examples: tuple[int, str], plan: Plan) -> str:
    """The plan of one stage, as text. `examples` are how many an epoch has, and the source of that
    number."""
    counts = count_parameters(config, stage)
    parts = [("part", "parameters", "trained")]
    parts += [(part, f"{total:,}", f"{trained:,}") for part, (total, trained) in counts.items()]
    n_trained = sum(trained for _, trained in counts.values())
    step, (n_examples, source), (name, peak) = (
        shape_of(config, stage, stage.batch_size), examples, gpu())
    cards = "one" if plan.processes == 1 else plan.processes
    work = [
        ("tokens per step", f"{step.tokens:,}"),
        ("operations per step", f"{step_flops(config, stage, step):.3g}"),
        ("examples per epoch", f"{n_examples:,} ({source})"),
        ("steps", f"{number_of_steps(stage, n_examples):,} of {stage.batch_size} examples"),
        (f"hours on {cards} {name}, at {UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s",
         f"{hours(config, stage, n_examples, plan):,.2f}")]
    title = (f"stage {stage.number}, {stage.title}; clips of {config.audio.max_seconds} s, "
             f"{RESPONSE} response tokens")
    memory = memory_rows(config, stage, counts, plan)
    return (f"\n{title}\n{columns(parts)}\ntrainable parameters: {n_trained:,}\n"
            f"{columns(memory)}\n{columns(work)}")


def show(size: str, stages: dict[int, StageConfig], data: Path | None, plan: Plan) -> None:
    """`train.py --dry-run`: print the plan of each of the `stages`, on `data` or by default on that
    of the authors. Raises UserError if `data` has no examples."""
    config, total = SIZES[size][0], 0.0
    for number, stage in stages.items():
        examples = number_of_examples(config, number, stage, data)
        print(plan_of_stage(config, stage, examples, plan))
        total += hours(config, stage, examples[0], plan)
    if len(stages) > 1:
        print(f"\nhours of all stages: {total:,.2f}")
