"""All of it together: a clip and a question go in, an answer comes out.

    from diffa2_mini import Diffa2
    diffa2 = Diffa2.from_pretrained("toy")
    print(diffa2.ask("clip.wav", "What is said?").text)

Log-mel → encoder → adapters → spliced into the prompt → decoding, by the faster ways of fast/.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import weights
from .audio import MAX_PEAK, MAX_RATE, MIN_RATE, encoder_frames, load_audio, log_mel, resample
from .config import SIZES, DecodeConfig
from .errors import require
from .fast.device import autocast, choose_device
from .fast.generate import Step, generate
from .fast.llada import FastLlada
from .fast.state import DecodingState
from .lora import merge_lora
from .model import Diffa2Model
from .published.sources import load_tokenizer
from .quantize import KINDS
from .tokenizer import Tokenizer
from .training.model_source import Source, find_source

Clip = str | Path | tuple[np.ndarray, int]  # a sound file, or samples and their rate in Hz


def decode_settings(default: DecodeConfig, **changes) -> DecodeConfig:
    """A size's way to decode with some fields changed. Steps, a threshold or random remasking leave
    factor-based decoding; another length brings blocks that fit, and a step for each token."""
    rules = {name for name in ("steps", "factor", "threshold") if changes.get(name) is not None}
    require(len(rules) <= 1, "--steps, --factor and --threshold exclude each other; choose one")
    if rules & {"steps", "threshold"} or changes.get("remasking") == "random":
        changes.setdefault("factor", None)
    if "gen_length" in changes:
        length, block = changes["gen_length"], default.block_length
        changes.setdefault("block_length", length if length % block else block)
        changes.setdefault("steps", length)
    return dataclasses.replace(default, **changes)


@dataclass
class Answer:
    """What was answered, and how."""

    text: str
    tokens: list[int]  # [R], with the end of the answer and what stands behind it
    steps: int  # of decoding
    seconds: float  # of the batch that it was part of
    history: list[Step] = dataclasses.field(repr=False)  # what each step did, as [1, R] tensors


class Diffa2:
    """DIFFA-2, ready to answer. `parts` are what it splices into the prompt, in order."""

    def __init__(self, model: Diffa2Model, parts: tuple[str, ...], tokenizer: Tokenizer,
                 device: torch.device, dtype: torch.dtype):
        self.model, self.parts, self.tokenizer = model, parts, tokenizer
        self.device, self.dtype, self.config = device, dtype, model.config

    @classmethod
    def from_pretrained(cls, name: str = "toy", *, sources: dict[str, str] | None = None,
                        checkpoint: str | Path | None = None, device: str = "auto",
                        dtype: str = "auto", quantize: str | None = None) -> "Diffa2":
        """The model of a size (`toy` comes with the package), or of a folder that train.py wrote.

        Args:
            name: a size; or a folder, whose last stage is taken.
            sources: files, folders or hub names of `whisper`, `llada`, `diffa2`, if not its own.
            checkpoint: what train.py wrote, instead of `name`.
            device: auto, cpu, cuda or mps.
            dtype: of the frozen parts: auto, float32, bfloat16, float16 or float64.
            quantize: int8, nf4 or fp8, to keep their linear layers in less memory.

        Raises UserError that says what is missing and how to get it.
        """
        if not checkpoint and name not in SIZES:
            stages = sorted(Path(name).glob("stage[1-4].safetensors"))
            require(stages, f"{name}: expected a size ({', '.join(SIZES)}) or a folder with "
                            "checkpoints of train.py, found neither")
            checkpoint = stages[-1]
        source = find_source(None if checkpoint else name, checkpoint, sources)
        on, precision, _ = choose_device(device, dtype, large=not source.config.from_scratch,
                                         quantize=quantize)
        return cls.load(source, on, precision, quantize=quantize)

    @classmethod
    def load(cls, source: Source, device: torch.device, dtype: torch.dtype,
             merge: bool = False, quantize: str | None = None) -> "Diffa2":
        """The model of a source, its linear layers quantised as `weights.load_part` tells, and the
        rest in `dtype` then. `merge` folds LoRA into layers that are not: faster, rounded again."""
        require(quantize in (None, *KINDS),
                f"--quantize: expected one of {', '.join(KINDS)}, got {quantize}")
        config, trained, paths, _ = source
        tokenizer = load_tokenizer(config, paths["llada"])
        model = weights.build(config, paths, device, dtype, FastLlada, weights.Loading(quantize))
        if trained:
            weights.restore(model, trained.model, "the checkpoint")
        parts = trained.audio if trained else weights.load_diffa2(model, paths["diffa2"])
        if merge:
            merge_lora(model)
        for parameter in model.parameters() if quantize else ():
            parameter.data = parameter.data.to(dtype)  # adapters and LoRA, which were float32
        return cls(model.eval().requires_grad_(False), parts, tokenizer, device, dtype)

    def load_clip(self, clip: Clip) -> np.ndarray:
        """A clip [samples] at the model's rate, cut to `max_seconds`; warns if it ends early."""
        audio = self.config.audio
        if not isinstance(clip, tuple):
            return load_audio(clip, audio.sample_rate, audio.max_seconds, warnings.warn)
        samples, rate = np.asarray(clip[0]), clip[1]
        require(samples.dtype.kind == "f" and samples.ndim == 1 and samples.size > 0
                and np.abs(samples).max() < MAX_PEAK and MIN_RATE <= rate <= MAX_RATE,
                "expected floats from -1 to 1 (divide integers by their full scale), of one channel"
                f", {MIN_RATE} to {MAX_RATE} Hz; got {samples.dtype} {samples.shape}, {rate} Hz")
        return resample(samples, int(rate), audio.sample_rate)[:audio.max_samples]

    @torch.no_grad()
    def answer(self, samples: list[np.ndarray], questions: list[str], decode: DecodeConfig,
               watch: Callable[[Iterator[Step]], Iterator[Step]] = iter, top: int = 0,
               first: int = 0) -> list[Answer]:
        """Answer questions about as many clips [samples], at the model's rate, as a batch.

        `watch` gets the steps of decoding while they are made, and hands them on. `first` numbers
        the first question among all that are asked, and `top` is as for `generate`.
        """
        start, n, tokenizer = time.perf_counter(), len(questions), self.tokenizer
        config = self.config.audio
        mels = torch.stack([log_mel(each, config) for each in samples])  # [B, n_mels, M]
        n_frames = torch.tensor([encoder_frames(len(each), config) for each in samples])
        audio = self.model.encode(mels.to(self.device, self.dtype), n_frames.to(self.device))
        prompts = [tokenizer.prompt(self.config.text.system, each) for each in questions]
        with autocast(self.device, self.dtype):
            embeddings = self.model.embed_audio(audio, self.parts)
            state = DecodingState(self.model, embeddings, prompts, [decode.gen_length] * n,
                                  tokenizer.mask_id)
            steps = generate(state, decode, tokenizer.eos_id, top, range(first, first + n))
            steps = list(watch(steps))
        seconds, answers = round(time.perf_counter() - start, 3), []
        for row, ids in enumerate(steps[-1].tokens.tolist()):
            history = [step_of_row(step, row) for step in steps if step.committed[row].any()]
            answers.append(Answer(tokenizer.decode(ids), ids, len(history), seconds, history))
        return answers

    def ask(self, clip: Clip | list[Clip], question: str | list[str] | None = None,
            **decoding) -> Answer | list[Answer]:
        """Answer a question about a clip. Of a list of clips all answers are decoded together.

        Args:
            clip: a path, or (samples, rate); or a list of them.
            question: a text, or one for each clip; None asks for a transcript.
            decoding: fields of DecodeConfig, such as steps=8 or temperature=0.7.

        Raises UserError for a clip that cannot be read, or settings that make no sense.
        """
        decode = decode_settings(self.config.decode, **decoding)
        clips = clip if isinstance(clip, list) else [clip]
        question = self.config.text.instruction if question is None else question
        questions = question if isinstance(question, list) else [question] * len(clips)
        require(len(questions) == len(clips) > 0,
                f"expected a question for each clip, got {len(questions)} for {len(clips)} clips")
        answers = self.answer([self.load_clip(each) for each in clips], questions, decode)
        return answers if isinstance(clip, list) else answers[0]


def step_of_row(step: Step, row: int) -> Step:
    """What a step did to one row of its batch, as [1, R] tensors."""
    here = slice(row, row + 1)
    likely = step.likely and tuple(each[here] for each in step.likely)
    return Step(step.tokens[here], step.predicted[here], step.confidence[here],
                step.committed[here], likely)
