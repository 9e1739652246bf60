"""From a manifest to batches: which clips with which questions and answers, tokenized, masked and
padded.

A manifest is a JSON list (or JSON lines) of objects with the fields of the authors' and of
DeSTA2's: `audio_filepath`, `transcription`, `input` (the instruction), `target` (the answer), and
for stage 4 `chosen` (or `target`) and `rejected`. Paths are relative to the manifest. The header of
every clip is read before training starts, so that a broken one stops a run in its first minute and
not in its last hour.

What differs: the release pads answers to the longest of the batch, and its noise depends on the
batch. Here the length of a response depends on its answer alone (`Tokenizer.response`), and its
noise on seed, stage, epoch and example alone.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import duration, encoder_frames, load_audio, log_mel
from .config import AdapterConfig, AudioConfig, Config, StageConfig
from .diffusion import draw_noise, forward_process
from .errors import UserError, require, require_contents
from .model import Audio
from .noise import stream
from .tokenizer import Prompt, Tokenizer
from .vrpo import draw_masks

NEVER = 2.0  # a uniform number above every time: its token is not masked
N_AROUND = 64  # an upper limit for the tokens of prompt and answer that are not from texts
Clip = tuple[Tensor, int]  # log-mel [n_mels, M], and how many encoder frames hold sound


# ---------------------------------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Example:
    """One entry of a manifest, as a stage uses it."""

    path: Path
    instruction: str
    answer: str
    rejected: str  # empty if there is none
    type: str  # of the question, for the accuracy table
    domain: str  # speech, sound or music, for the same
    seconds: float = 0.0  # length of the clip


def read_manifest(path: Path) -> list[dict]:
    """The entries of a manifest. Raises UserError that names the line where it is broken."""
    require(Path(path).is_file(),
            f"{path}: expected a manifest (JSON list or JSON lines), found no such file")
    require_contents(path, "a manifest")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows may put a mark first
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a manifest of text in UTF-8, got other bytes; save it "
                        "as JSON") from None
    is_list = text.lstrip().startswith("[")
    rows = []
    for line, piece in enumerate([text] if is_list else text.split("\n"), start=1):
        try:
            rows += [json.loads(piece)] if piece.strip() else []
        except (ValueError, RecursionError) as error:  # ValueError also of a number too long
            line += getattr(error, "lineno", 1) - 1
            raise UserError(f"{path}: line {line} is not JSON ({getattr(error, 'msg', error)}); "
                            "mend it") from None
    rows = rows[0] if is_list else rows
    require(len(rows) > 0, f"{path}: expected entries, got an empty manifest")
    return rows


def text_of(row: dict, *names: str, default: str | None = None) -> str:
    """The first of the fields `names` that a manifest's entry has, else `default`. Raises UserError
    if there is neither, or something that is not text."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        require(default is not None, f"the field {' or '.join(names)} is missing")
        return default
    value = row[name]
    require(isinstance(value, str), f"expected text in {name}, got {type(value).__name__}")
    require(not re.search("[\0\ud800-\udfff]", value),
            f"expected text in {name}, got characters that are none")
    return value


def read_example(row: dict, folder: Path, stage: StageConfig, instruction: str) -> Example:
    """A manifest's entry as an example of `stage`; `instruction` is for entries without one. Raises
    UserError."""
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
    if stage.data == "stage1":
        answer = text_of(row, "transcription", "target")
    elif stage.preference:
        answer = text_of(row, "chosen", "target")
    else:
        answer = text_of(row, "target", "transcription")
    return Example(path=folder / text_of(row, "audio_filepath"),
                   instruction=text_of(row, "input", default=instruction), answer=answer,
                   rejected=text_of(row, "rejected", default=None if stage.preference else ""),
                   type=text_of(row, "type", "dataset", default="all"),
                   domain=text_of(row, "domain", "dataset", default="all"))


def check_room(tokenizer: Tokenizer, limit: int, *texts: str) -> None:
    """Raise UserError if a prompt made of `texts` leaves no room for an answer."""
    if may_exceed(limit, *texts):
        n = len(tokenizer.prompt(*texts).ids)
        require(n < limit,
                f"its prompt of {n:,} tokens leaves an answer no room within {limit:,}")


def load_examples(path: Path, stage: StageConfig, config: Config, skip_broken: bool, say: Callable,
                  tokenizer: Tokenizer | None = None) -> list[Example]:
    """The examples of a manifest. The header of every clip is read, and with a `tokenizer` the
    length of every prompt is checked. Raises UserError that names the first broken entries; with
    `skip_broken` they are left out, and `say` is called with that line."""
    examples, broken, seconds_of = [], [], cache(duration)
    for i, row in enumerate(read_manifest(path), start=1):
        try:
            example = read_example(row, Path(path).parent, stage, config.text.instruction)
            example = dataclasses.replace(example, seconds=seconds_of(example.path))
            if tokenizer:
                check_room(tokenizer, stage.max_tokens, config.text.train_system,
                           example.instruction)
            examples.append(example)
        except UserError as error:
            name = row.get("audio_id") if isinstance(row, dict) else None
            name = name if isinstance(name, str) else f"entry {i}"
            broken.append(" ".join(f"{name}: {error}".split()))  # one line, whatever is in the name
    if broken:
        what = f"{len(broken)} broken of {len(broken) + len(examples)} entries"
        rest = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        listed = "; ".join(broken[:5]) + rest
        require(skip_broken, f"{path}: {what}: {listed}. Mend them, or go on without them: "
                             "--skip-broken")
        say(f"skipped {what} of {path}: {listed}")
    require(len(examples) > 0, f"{path}: not one entry can be used")
    return examples


# ---------------------------------------------------------------------------- lengths of an example


def n_embeddings(config: AdapterConfig, parts: tuple[str, ...], n_frames: int) -> int:
    """How many audio embeddings `parts` give for a clip with sound in `n_frames` encoder frames."""
    n = {"semantic": n_frames // config.semantic_stride, "acoustic": config.n_queries,
         "prompts": config.n_prompts}
    return sum(n[part] for part in parts)


def may_exceed(limit: int, *texts: str) -> bool:
    """Whether prompt and answer, made of `texts`, may have more tokens than `limit`. A token has at
    least one byte, and counting bytes is much faster."""
    return sum(len(text.encode()) for text in texts) + N_AROUND > limit


# ------------------------------------------------------------------------------------------ batches


def load_clip(path: Path, config: AudioConfig, note: Callable[[str], None] | None = None) -> Clip:
    """A sound file as log-mel [n_mels, M] and its number of encoder frames. `note` is called with a
    line if the file is incomplete, as by `load_audio`."""
    samples = load_audio(path, config.sample_rate, config.max_seconds, note)
    return log_mel(samples, config), encoder_frames(len(samples), config)


@dataclass(kw_only=True)
class Batch:
    """What every batch of B examples has. R is the longest response of the batch; for pairs there
    are 2B responses: chosen, rejected, chosen, ..."""

    examples: list[Example]
    clips: list[Clip]  # empty if hidden states are kept
    prompts: list[Prompt]
    response: Tensor  # [B, R] token ids, padded with EOS
    valid: Tensor  # bool [B, R], False at that padding
    audio: Audio | None = None
    broken: tuple[str, ...] = ()  # what is wrong with clips that silence stands in for
    incomplete: dict[Path, str] = field(default_factory=dict)  # what other clips lack, by path

    def encoded(self, features: Callable, device: torch.device) -> "Batch":
        """The batch on the device, with what `features` makes of its clips as `audio`."""
        tensors = {name: value.to(device) for name, value in vars(self).items()
                   if isinstance(value, Tensor)}
        audio = features([example.path for example in self.examples], self.clips)
        return dataclasses.replace(self, **tensors, audio=audio)


@dataclass(kw_only=True)
class AnswerBatch(Batch):
    """Responses after the forward process, for stages 1 to 3."""

    noisy: Tensor  # [B, R] token ids, some of them masks
    masked: Tensor  # bool [B, R], where these are
    t: Tensor  # [B], the times

    @property
    def n_masked(self) -> int:
        return int(self.masked.sum())


@dataclass(kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of responses, for stage 4."""

    masks: Tensor  # bool [2B, n, R]: what n samples mask of each response

    @property
    def n_masked(self) -> int:
        return int(self.masks.sum())


@dataclass
class Collate:
    """Makes batches of examples. It is sent to the processes that load data. Within it, an example
    is (epoch, number in `data`)."""

    data: list[Example]
    seed: int
    stage: StageConfig
    config: Config
    tokenizer: Tokenizer
    load: bool  # load the clips too
    skip_broken: bool = False  # put silence in place of broken clips, and mask nothing
    held_out: bool = False  # draw other noise than in training
    known: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # results of `lengths`

    def tokenize(self, number: int) -> tuple[Prompt, list[list[int]]]:
        """The prompt of an example and its response; for a pair, chosen and rejected. Prompt and
        response have at most `max_tokens`: the end of a longer response is cut."""
        example, stage, text = self.data[number], self.stage, self.config.text
        prompt = self.tokenizer.prompt(text.train_system, example.instruction)
        room = max(1, stage.max_tokens - len(prompt.ids))  # `check_room`: there is some
        answers = [example.answer] + [example.rejected] * stage.preference
        return prompt, [self.tokenizer.response(answer, text.response_multiple)[:room]
                        for answer in answers]

    def lengths(self, number: int) -> list[tuple[int, int]]:
        """For each answer to an example: P, the tokens before it with the audio, and R."""
        if number not in self.known:
            config, seconds = self.config, self.data[number].seconds
            frames = encoder_frames(round(seconds * config.audio.sample_rate), config.audio)
            n_audio = n_embeddings(config.adapter, self.stage.audio, frames)
            prompt, responses = self.tokenize(number)
            self.known[number] = [(len(prompt.ids) + n_audio, len(ids)) for ids in responses]
        return self.known[number]

    def __getitem__(self, pairs: list[tuple[int, int]]) -> Batch | UserError:
        """A batch of examples. What is wrong with a clip is returned, since an error raised in
        another process would come with a trace."""
        examples = [self.data[number] for _, number in pairs]
        try:
            clips, broken, incomplete = self.load_clips(examples if self.load else [])
        except UserError as error:
            return error
        prompts, rows, rngs = [], [], []
        for epoch, number in pairs:
            prompt, responses = self.tokenize(number)
            prompts.append(prompt)
            for which, ids in enumerate(responses):
                rows.append(torch.tensor(ids))
                rngs.append(self.rng(epoch, number, which))
        response = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_id)
        lengths = torch.tensor([len(row) for row in rows])
        valid = torch.arange(response.shape[1]) < lengths[:, None]  # [B or 2B, R]
        draw = self.draw_pairs if self.stage.preference else self.draw_answers
        make = PreferenceBatch if self.stage.preference else AnswerBatch
        return make(examples=examples, clips=clips, prompts=prompts, response=response, valid=valid,
                    broken=tuple(broken.values()), incomplete=incomplete,
                    **draw(rngs, response, lengths.tolist(), [*broken]))

    def rng(self, epoch: int, number: int, which: int) -> np.random.Generator:
        """All noise of answer `which` of an example in an epoch."""
        kind = "held-out answers" if self.held_out else "answers"
        return stream(kind, self.seed, self.stage.number, epoch, number, which)

    def draw_answers(self, rngs: list[np.random.Generator], response: Tensor, lengths: list[int],
                     broken: list[int]) -> dict[str, Tensor]:
        """The forward process: what an AnswerBatch has beside its `response` [B, R]."""
        drawn = [draw_noise(rng, length) for rng, length in zip(rngs, lengths, strict=True)]
        t = torch.tensor([t for t, _ in drawn], dtype=torch.float32)  # [B]
        uniforms = pad_sequence([torch.from_numpy(numbers).float() for _, numbers in drawn],
                                batch_first=True, padding_value=NEVER)  # [B, R]
        uniforms[broken] = NEVER
        noisy, masked, t = forward_process(response, t, uniforms, self.tokenizer.mask_id)
        return dict(noisy=noisy, masked=masked, t=t)

    def draw_pairs(self, rngs: list[np.random.Generator], response: Tensor, lengths: list[int],
                   broken: list[int]) -> dict[str, Tensor]:
        """The masks of B pairs: what a PreferenceBatch has beside its `response` [2B, R]."""
        drawn = [torch.from_numpy(draw_masks(rng, length, self.stage.vrpo_samples).T)  # [R, n]
                 for rng, length in zip(rngs, lengths, strict=True)]
        masks = pad_sequence(drawn, batch_first=True).transpose(1, 2)  # [2B, R, n] -> [2B, n, R]
        masks.unflatten(0, (-1, 2))[broken] = False  # a view [B, 2, n, R]
        return dict(masks=masks)

    def load_clips(self, examples: list[Example]
                   ) -> tuple[list[Clip], dict[int, str], dict[Path, str]]:
        """The clips of examples; what is wrong with broken ones, by place in the list, in whose
        place there is silence; and what incomplete ones lack, by path. Raises UserError if one is
        broken and is not to be skipped."""
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
        """The part of a step's examples that process `rank` of `size` has, in pieces of
        `micro_batch`. The longest come first, so that a piece has little padding. The gradient of
        the step does not depend on the pieces."""
        order = sorted(pairs, key=lambda pair: -max(map(sum, self.lengths(pair[1]))))
        mine = order[rank::size]
        return [mine[start:start + micro_batch] for start in range(0, len(mine), micro_batch)]
