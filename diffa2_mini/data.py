"""Manifests to batches: which clips with which questions, loaded, encoded and put side by side.

A manifest is a JSON list (or JSON lines) of objects with the fields of the authors' and of
DeSTA2's: `audio_filepath`, `transcription`, `input` (the instruction), `target` (the answer), and
for stage 4 `chosen` (or `target`) and `rejected`. Paths are relative to the manifest. Every clip is
looked at before training starts, so that a broken one stops a run in its first minute and not in
its last hour.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import duration, encoder_frames, load_audio, log_mel
from .config import AdapterConfig, AudioConfig, Config, StageConfig, TextConfig
from .diffusion import draw_noise, forward_process
from .errors import UserError, require, require_contents
from .model import Audio
from .noise import stream
from .tokenizer import Prompt, Tokenizer
from .vrpo import draw_masks

NEVER = 2.0  # a uniform number beyond every time: its token is not masked
N_AROUND = 64  # tokens at most of a prompt and its answer, beside what the texts have


@dataclass(frozen=True)
class Example:
    """One entry of a manifest, as a stage uses it. `rejected` is empty where there is none."""

    path: Path
    instruction: str
    answer: str
    rejected: str
    type: str  # of the question, for the accuracy table
    domain: str  # speech, sound, music: likewise
    seconds: float = 0.0  # how long the clip is


def read_manifest(path: Path) -> list[dict]:
    """The entries of a manifest. Raises UserError that names the line where it is broken."""
    require(Path(path).is_file(),
            f"{path}: expected a manifest (JSON list or JSON lines), found no such file")
    require_contents(path, "a manifest")
    try:
        # with or without the mark that Windows puts first
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: expected a manifest of text in UTF-8, got other bytes; save it as JSON"
        ) from None
    is_list = text.lstrip().startswith("[")
    pieces = [text] if is_list else text.split("\n")
    rows = []
    for line, piece in enumerate(pieces, start=1):
        try:
            rows += [json.loads(piece)] if piece.strip() else []
        # ValueError: no JSON, or a number of thousands of digits
        except (ValueError, RecursionError) as error:
            line += getattr(error, "lineno", 1) - 1
            raise UserError(
                f"{path}: line {line} is not JSON ({getattr(error, 'msg', error)}); mend it"
            ) from None
    rows = rows[0] if is_list else rows
    require(len(rows) > 0, f"{path}: expected entries, got an empty manifest")
    return rows


def read_example(row: dict, folder: Path, stage: StageConfig, instruction: str) -> Example:
    """An entry as an example of `stage`; missing instructions are replaced by `instruction`. Raises
    UserError."""
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")

    def text(*names, default=None):
        name = next((name for name in names if row.get(name) is not None), names[0])
        value = default if row.get(name) is None else row[name]
        require(value is not None, f"the field {' or '.join(names)} is missing")
        require(isinstance(value, str), f"expected text in {name}, got {type(value).__name__}")
        require(not re.search("[\0\ud800-\udfff]", value),
                f"expected text in {name}, got characters that are none")
        return value

    if stage.data == "stage1":
        answer = text("transcription", "target")
    else:
        answer = text("chosen", "target") if stage.preference else text("target", "transcription")
    rejected = text("rejected") if stage.preference else text("rejected", default="")
    return Example(folder / text("audio_filepath"), text("input", default=instruction), answer,
                   rejected, text("type", "dataset", default="all"),
                   text("domain", "dataset", default="all"))


def load_examples(path: Path, stage: StageConfig, config: Config, skip_broken: bool, say: Callable,
                  tokenizer: Tokenizer | None = None) -> list[Example]:
    """Read a manifest and look at every clip's header, and with a `tokenizer` at whether the answer
    has room behind its prompt. Raises UserError that names the first broken entries; with
    `skip_broken`, `say`s so and goes on without them."""
    examples, broken, seen = [], [], {}
    for i, row in enumerate(read_manifest(path), start=1):
        name = row.get("audio_id") if isinstance(row, dict) else None
        try:
            example = read_example(row, Path(path).parent, stage, config.text.instruction)
            if example.path not in seen:
                try:
                    seen[example.path] = duration(example.path)
                except UserError as error:
                    seen[example.path] = str(error)
            require(isinstance(seen[example.path], float), str(seen[example.path]))
            texts = (config.text.train_system, example.instruction)
            if tokenizer and may_exceed(stage.max_tokens, *texts):
                n = len(tokenizer.prompt(*texts).ids)
                require(n < stage.max_tokens, f"its prompt of {n:,} tokens leaves an answer "
                                              f"no room within {stage.max_tokens:,}")
            examples.append(dataclasses.replace(example, seconds=seen[example.path]))
        except UserError as error:
            name = name if isinstance(name, str) else f"entry {i}"
            # one line, whatever is in the names
            broken.append(" ".join(f"{name}: {error}".split()))
    if broken:
        listed = "; ".join(
            broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
        require(skip_broken,
                f"{path}: {len(broken)} broken of {len(broken) + len(examples)} entries: {listed}. "
                "Mend them, or go on without them: --skip-broken")
        say(f"skipped {len(broken)} broken of {len(broken) + len(examples)} entries of {path}: {listed}"
            )
    require(len(examples) > 0, f"{path}: not one entry can be used")
    return examples


def load_clip(path: Path, config: AudioConfig, note: Callable[[str], None] | None = None
              ) -> tuple[Tensor, int]:
    """log-mel [n_mels, M] of a sound file, and how many encoder frames of it hold sound. `note` is
    told of a file that is incomplete, as `load_audio` tells."""
    samples = load_audio(path, config.sample_rate, config.max_seconds, note)
    return log_mel(samples, config), encoder_frames(len(samples), config)


def n_embeddings(config: AdapterConfig, parts: tuple[str, ...], n_frames: int) -> int:
    """How many embeddings `parts` make of a clip with sound in `n_frames` encoder frames."""
    return sum({
        "semantic": n_frames //
        config.semantic_stride, "acoustic": config.n_queries, "prompts": config.n_prompts
    }[part] for part in parts)


@dataclass(kw_only=True)
class Batch:
    """What every batch of B examples has. Those of pairs have 2B responses: chosen, rejected,
    ..."""

    examples: list[Example]
    clips: list[tuple[Tensor, int]]  # log-mels and numbers of frames, unless hidden states are kept
    prompts: list[Prompt]
    response: Tensor  # [B, R] token ids, padded with EOS to the longest
    valid: Tensor  # bool [B, R], False at that padding
    audio: Audio | None = None
    # complaints about clips: silence takes their place, nothing is masked
    broken: tuple[str, ...] = ()
    incomplete: dict[Path, str] = dataclasses.field(default_factory=dict)  # what clips in it lack

    def encoded(self, features: Callable, device: torch.device) -> "Batch":
        """The batch on the device, with what `ears` makes of its clips."""
        tensors = {name: value.to(device) for name, value in vars(self).items()
                   if isinstance(value, Tensor)}
        audio = features([example.path for example in self.examples], self.clips)
        return dataclasses.replace(self, **tensors, audio=audio)


@dataclass(kw_only=True)
class AnswerBatch(Batch):
    """Responses that the forward process has hidden in part, for stages 1 to 3."""

    noisy: Tensor  # [B, R] token ids, with masks
    masked: Tensor  # bool [B, R], where they are
    t: Tensor  # [B], the times

    @property
    def n_masked(self) -> int:
        """How many tokens are to be predicted."""
        return int(self.masked.sum())


@dataclass(kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of responses, for stage 4."""

    masks: Tensor  # bool [2B, n, R]: what n samples hide of each response

    @property
    def n_masked(self) -> int:
        """How many tokens are to be predicted, in all samples."""
        return int(self.masks.sum())


def may_exceed(limit: int, *texts: str) -> bool:
    """Whether the texts may, with all that the prompt has around them, have more tokens than so
    many. A token has a byte at least, and to count bytes is much faster."""
    return sum(len(text.encode()) for text in texts) + N_AROUND > limit


def what_is_cut(data: list[Example], stage: StageConfig, config: Config, tokenizer: Tokenizer
                ) -> str:
    """Which of the data cannot be learnt whole, in one line; empty if all of it can."""
    limit, seconds, length = stage.max_tokens, config.audio.max_seconds, config.decode.gen_length
    found = {f"with text beyond {limit:,} tokens, which is cut": [],
             f"with a clip beyond the {seconds} s that the model hears": [],
             f"with an answer beyond the {length:,} tokens that it writes": []}
    count, system = cache(lambda text: len(tokenizer.encode(text))), config.text.train_system
    for example in data:
        answers = (example.answer, *[example.rejected] * stage.preference)
        n_text = 0  # with the end of the answer
        if may_exceed(limit, system, example.instruction, *answers):
            n_prompt = len(tokenizer.prompt(system, example.instruction).ids)
            n_text = n_prompt + max(map(count, answers)) + 1
        beyond = (n_text > limit, example.seconds > seconds, count(example.answer) > length)
        for names, is_beyond in zip(found.values(), beyond):
            names += [example.path.name] * is_beyond
    return "; ".join(f"{len(names):,} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                     for what, names in found.items() if names)


def tokenize(example: Example, answer: str, stage: StageConfig, text: TextConfig,
             tokenizer: Tokenizer) -> tuple[Prompt, list[int]]:
    """The prompt and a response to it. Together they have at most `max_tokens`: the end of a longer
    response is cut."""
    prompt = tokenizer.prompt(text.train_system, example.instruction)
    room = max(1, stage.max_tokens - len(prompt.ids))  # load_examples has seen to it
    return prompt, tokenizer.response(answer, text.response_multiple)[:room]


class Collate:
    """Makes batches of some data; what the processes that load it are given. `load` has it load the
    clips too, and `held_out` has the noise be another than that of training."""

    def __init__(self, data: list[Example], seed: int, stage: StageConfig, config: Config,
                 tokenizer: Tokenizer, load: bool, skip_broken: bool = False,
                 held_out: bool = False):
        self.data, self.seed, self.stage, self.config, self.tokenizer = data, seed, stage, config, tokenizer
        self.load, self.skip_broken, self.known = load, skip_broken, {}
        self.kind = "held-out answers" if held_out else "answers"

    def answers(self, number: int) -> list[tuple[Prompt, list[int]]]:
        """The prompt and the tokens of the answer; of a pair, of both."""
        example = self.data[number]
        both = (example.answer, example.rejected) if self.stage.preference else (example.answer,)
        return [
            tokenize(example, answer, self.stage, self.config.text, self.tokenizer)
            for answer in both]

    def lengths(self, number: int) -> list[tuple[int, int]]:
        """Of each answer to an example: the tokens that stand before it, audio included, and its
        own."""
        if number not in self.known:
            config, seconds = self.config, self.data[number].seconds
            frames = encoder_frames(round(seconds * config.audio.sample_rate), config.audio)
            n_audio = n_embeddings(config.adapter, self.stage.audio, frames)
            self.known[number] = [(len(prompt.ids) + n_audio, len(ids))
                                  for prompt, ids in self.answers(number)]
        return self.known[number]

    def __getitem__(self, pairs: list[tuple[int, int]]) -> "Batch | UserError":
        """A batch of (epoch, number in the data) pairs, or what is wrong with a clip."""
        examples = [self.data[number] for _, number in pairs]
        answers = [self.answers(number) for _, number in pairs]
        rows = [torch.tensor(ids) for of_example in answers for _, ids in of_example]
        try:
            clips, broken, incomplete = self.load_clips(examples if self.load else [])
        except UserError as error:
            return error  # raised in a worker, it would come with a trace
        common = dict(
            examples=examples, clips=clips, prompts=[of_example[0][0] for of_example in answers],
            response=pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_id),
            valid=pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows],
                              batch_first=True),
            broken=(*broken.values(),), incomplete=incomplete)
        noise = [(self.noise(*pair, which), len(ids))
                 for pair, of_example in zip(pairs, answers, strict=True)
                 for which, (_, ids) in enumerate(of_example)]
        if self.stage.preference:
            return self.preference_batch(noise, [*broken], common)
        return self.answer_batch(noise, [*broken], common)

    def noise(self, epoch: int, number: int, which: int) -> np.random.Generator:
        """What hides answer `which` of an example in an epoch depends on nothing else."""
        return stream(self.kind, self.seed, self.stage.number, epoch, number, which)

    def answer_batch(self, noise: list[tuple[np.random.Generator, int]], broken: list[int],
                     common: dict) -> AnswerBatch:
        """The batch with its responses hidden, of B generators with the lengths of their
        responses."""
        drawn = [draw_noise(rng, length) for rng, length in noise]
        t = torch.tensor([t for t, _ in drawn], dtype=torch.float32)
        uniforms = pad_sequence([torch.from_numpy(numbers).float() for _, numbers in drawn],
                                batch_first=True, padding_value=NEVER)  # [B, R]
        uniforms[broken] = NEVER
        noisy, masked, t = forward_process(common["response"], t, uniforms, self.tokenizer.mask_id)
        return AnswerBatch(noisy=noisy, masked=masked, t=t, **common)

    def preference_batch(self, noise: list[tuple[np.random.Generator, int]], broken: list[int],
                         common: dict) -> PreferenceBatch:
        """The batch with its masks, of 2B generators with the lengths of their responses."""
        drawn = [torch.from_numpy(draw_masks(rng, length, self.stage.vrpo_samples).T)
                 for rng, length in noise]  # [R, n] each
        masks = pad_sequence(drawn, batch_first=True).transpose(1, 2)  # [2B, n, R]
        masks.unflatten(0, (-1, 2))[broken] = False
        return PreferenceBatch(masks=masks, **common)

    def load_clips(self, examples: list[Example]
                   ) -> tuple[list[tuple[Tensor, int]], dict[int, str], dict[Path, str]]:
        """The clips of examples as log-mels; by number what is wrong with those that are broken, in
        whose place there is silence; and by path what is missing of those that are not whole.
        Raises UserError where a broken one is not to be skipped."""
        clips, broken, incomplete, config = [], {}, {}, self.config.audio
        for i, example in enumerate(examples):
            try:
                note = partial(incomplete.__setitem__, example.path)
                clips.append(load_clip(example.path, config, note))
            except UserError as error:
                if not self.skip_broken:
                    raise
                broken[i] = str(error)
                silence = np.zeros(round(example.seconds * config.sample_rate), np.float32)
                clips.append((log_mel(silence, config), encoder_frames(len(silence), config)))
        return clips, broken, incomplete

    def cut(self, pairs: list[tuple[int, int]], micro_batch: int, rank: int = 0,
            size: int = 1) -> list[list[tuple[int, int]]]:
        """The share that process `rank` of `size` has of the pairs of a step, in pieces of
        `micro_batch`, the longest first, so that what is padded together is of about the same
        length. The gradient of the step is the same however it is cut."""
        order = sorted(pairs, key=lambda pair: -max(map(sum, self.lengths(pair[1]))))
        share = order[rank::size]
        return [share[start:start + micro_batch] for start in range(0, len(share), micro_batch)]
