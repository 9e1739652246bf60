"""From a manifest to batches: clips, questions and answers, tokenized, masked and padded.

A manifest is a JSON list (or JSON lines) of objects with the fields of the authors' and of
DeSTA2's: `audio_filepath`, `transcription`, `input` (the instruction), `target` (the answer), and
for stage 4 `chosen` (or `target`) and `rejected`. Paths are relative to the manifest.

What differs: the release pads answers to the longest of the batch, and its noise depends on the
batch. Here the length of a response depends on its answer alone (`Tokenizer.response`), its noise
on seed, stage, epoch and example, and where times are spread on batch size and place as well.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import duration, encoder_frames, load_audio, log_mel
from .config import AdapterConfig, AudioConfig, Config, StageConfig
from .diffusion import forward_exactly, forward_process, stratified
from .errors import UserError, read_text, require
from .model import Audio
from .noise import stream
from .tokenizer import Prompt, Tokenizer
from .vrpo import draw_masks

ANSWER_FIELDS = {  # a stage's `data`: fields that may hold the answer, the preferred one first
    "stage1": ("transcription", "target"), "sft": ("target", "transcription"),
    "preference": ("chosen", "target")}
NEVER = 2.0  # a uniform number above every time: its token is not masked
# One response in so many is masked wholly, as each is when decoding begins. That is biased: the
# loss is no bound, but closer to how the model is used where few passes make an answer. The others
# keep their parts of 0 ... 1 (`stratified`): in batches of 4 the second and the last quarter alone.
MASKED_WHOLLY = {"half-masked": 2, "all-masked": 1}
LogMel = tuple[Tensor, int]  # log-mel [n_mels, M], and how many encoder frames hold sound


class Entry(NamedTuple):
    """An example of a step's batch."""

    epoch: int
    number: int  # which example it is
    place: int = 0  # in the step's batch


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
    text = read_text(path, "a manifest (JSON list or JSON lines)")
    is_list, rows = text.lstrip().startswith("["), []
    for line, piece in enumerate([text] if is_list else text.split("\n"), start=1):
        try:
            rows += [json.loads(piece)] if piece.strip() else []
        except (ValueError, RecursionError) as error:  # ValueError also of a number too long
            line += getattr(error, "lineno", 1) - 1
            message = getattr(error, "msg", error)
            raise UserError(f"{path}: line {line} is not JSON ({message}); mend it") from None
    rows = rows[0] if is_list else rows
    require(len(rows) > 0, f"{path}: expected entries, got an empty manifest")
    return rows


def text_of(row: dict, *names: str, default: str | None = None) -> str:
    """The first of an entry's fields `names`, or `default`. Raises UserError unless it is text."""
    name = next((name for name in names if row.get(name) is not None), None)
    require(name or default is not None, f"the field {' or '.join(names)} is missing")
    value = row[name] if name else default
    require(isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value),
            f"expected text in {name}, got {value!r:.60}")
    return value


def read_example(row: dict, folder: Path, stage: StageConfig, instruction: str) -> Example:
    """A manifest's entry as an example of `stage`; `instruction` is for those without one."""
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
    return Example(folder / text_of(row, "audio_filepath"),
                   instruction=text_of(row, "input", default=instruction),
                   answer=text_of(row, *ANSWER_FIELDS[stage.data]),
                   rejected=text_of(row, "rejected", default=None if stage.preference else ""),
                   type=text_of(row, "type", "dataset", default="all"),
                   domain=text_of(row, "domain", "dataset", default="all"))


def load_examples(path: Path, stage: StageConfig, config: Config, skip_broken: bool = False,
                  tokenizer: Tokenizer | None = None) -> list[Example]:
    """The examples of a manifest. The header of every clip is read, and with a `tokenizer` the
    length of every prompt is checked. Raises UserError that names the first broken entries; with
    `skip_broken` they are left out, and named in a line that is printed."""
    examples, broken, seconds_of = [], [], cache(duration)  # many questions may ask about a clip
    length_of = cache(lambda text: len(tokenizer.prompt(config.text.train_system, text).ids))
    for i, row in enumerate(read_manifest(path), start=1):
        try:
            example = read_example(row, Path(path).parent, stage, config.text.instruction)
            example = dataclasses.replace(example, seconds=seconds_of(example.path))
            n = length_of(example.instruction) if tokenizer else 0
            require(n < stage.max_tokens,
                    f"its prompt of {n:,} tokens leaves no room within {stage.max_tokens:,}")
            examples.append(example)
        except UserError as error:
            broken.append(" ".join(f"entry {i}: {error}".split()))  # one line, whatever is in it
    if broken:
        what = f"{len(broken)} broken of {len(broken) + len(examples)} entries"
        listed = "; ".join(broken[:5]) + f"; and {len(broken) - 5} more" * (len(broken) > 5)
        require(skip_broken, f"{path}: {what}: {listed}. Mend or skip them: --skip-broken")
        print(f"skipped {what} of {path}: {listed}")
    require(len(examples) > 0, f"{path}: not one entry can be used")
    return examples


def n_embeddings(config: AdapterConfig, parts: tuple[str, ...], n_frames: int) -> int:
    """How many audio embeddings `parts` give for a clip with sound in `n_frames` encoder frames."""
    n_semantic = n_frames // config.semantic_stride
    n = dict(semantic=n_semantic, acoustic=config.n_queries, prompts=config.n_prompts)
    return sum(n[part] for part in parts)


def load_clip(path: Path, config: AudioConfig, note: Callable[[str], None] | None = None) -> LogMel:
    """A sound file as the encoder wants it. `note` is as for `load_audio`."""
    samples = load_audio(path, config.sample_rate, config.max_seconds, note)
    return log_mel(samples, config), encoder_frames(len(samples), config)


@dataclass(kw_only=True)
class Batch:
    """What batches of B examples have in common. R is the longest response; of pairs there are 2B
    responses: chosen, rejected, chosen, ..."""

    examples: list[Example]
    prompts: Sequence[Prompt]
    response: Tensor  # [B, R] token ids, padded with EOS
    valid: Tensor  # bool [B, R], False at that padding
    clips: list[LogMel] = field(default_factory=list)  # empty if hidden states are kept
    audio: Audio | None = None
    broken: dict[int, str] = field(default_factory=dict)  # clips that are silence, by place
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
    weight: Tensor  # [B], of the cross-entropies of its masked tokens


@dataclass(kw_only=True)
class PreferenceBatch(Batch):
    """Pairs of responses, for stage 4."""

    masked: Tensor  # bool [2B, n, R]: what n samples mask of each response


@dataclass
class BatchDataset:
    """Batches of the examples `data`. A batch's index is the list of its entries."""

    data: list[Example]
    seed: int
    stage: StageConfig
    config: Config
    tokenizer: Tokenizer
    load: bool = False  # load the clips too
    skip_broken: bool = False  # put silence in place of broken clips, and mask no response to it
    noise: str = "answers"  # the kind of its random streams
    known: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # results of `lengths`

    def tokenize(self, number: int) -> tuple[Prompt, list[list[int]]]:
        """The prompt of an example and its response; of a pair, chosen and rejected. Prompt and
        response have at most `max_tokens`: the end of a longer response is cut."""
        example, stage, text = self.data[number], self.stage, self.config.text
        prompt = self.tokenizer.prompt(text.train_system, example.instruction)
        room = max(1, stage.max_tokens - len(prompt.ids))  # `load_examples`: there is some
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

    def micro_batches(self, entries: list[Entry], size: int, rank: int = 0,
                      n_processes: int = 1) -> list[list[Entry]]:
        """The part of a step's entries that process `rank` has, in micro-batches of `size`, the
        longest first: so there is little padding, and the gradient of the step is the same."""
        order = sorted(entries, key=lambda entry: -max(map(sum, self.lengths(entry.number))))
        mine = order[rank::n_processes]
        return [mine[start:start + size] for start in range(0, len(mine), size)]

    def __getitem__(self, entries: list[Entry]) -> Batch | UserError:
        """A batch, or the error in a clip: raised in a loading process, it would have a trace."""
        examples = [self.data[entry.number] for entry in entries]
        try:
            loaded = self.load_clips(examples) if self.load else {}
        except UserError as error:
            return error
        prompts, answers = zip(*(self.tokenize(entry.number) for entry in entries))
        responses = [torch.tensor(ids) for each in answers for ids in each]
        rngs = [stream(self.noise, self.seed, self.stage.number, entry.epoch, entry.number, which)
                for entry in entries for which in range(1 + self.stage.preference)]
        response = pad_sequence(responses, batch_first=True, padding_value=self.tokenizer.eos_id)
        lengths = [len(ids) for ids in responses]
        valid = torch.arange(response.shape[1]) < torch.tensor(lengths)[:, None]  # [B or 2B, R]
        batch = dict(examples=examples, prompts=prompts, response=response, valid=valid, **loaded)
        broken = [*loaded.get("broken", {})]  # in whose responses nothing is masked
        if self.stage.preference:
            masked = self.mask_pairs(rngs, lengths)  # [2B, n, R]
            masked.unflatten(0, (-1, 2))[broken] = False  # a view [B, 2, n, R]
            return PreferenceBatch(**batch, masked=masked)
        noisy, masked, weight = self.mask_answers(rngs, lengths, response, entries)
        noisy[broken], masked[broken] = response[broken], False
        return AnswerBatch(**batch, noisy=noisy, masked=masked, weight=weight)

    def mask_answers(self, rngs: list[np.random.Generator], lengths: list[int], response: Tensor,
                     entries: list[Entry]) -> tuple[Tensor, Tensor, Tensor]:
        """The forward process on `response` [B, R], as the stage's `masking` says."""
        t, mask_id = torch.tensor([rng.random() for rng in rngs]), self.tokenizer.mask_id  # t: [B]
        uniforms = pad_sequence([torch.from_numpy(rng.random(length)).float()
                                 for rng, length in zip(rngs, lengths, strict=True)],
                                batch_first=True, padding_value=NEVER)  # [B, R]
        if self.stage.masking == "published":
            return forward_process(response, t, uniforms, mask_id)
        places = torch.tensor([entry.place for entry in entries])
        t = stratified(t, places, self.stage.batch_size)
        if self.stage.masking in MASKED_WHOLLY:
            t[places % MASKED_WHOLLY[self.stage.masking] == 0] = 1
        return forward_exactly(response, t, uniforms, torch.tensor(lengths), mask_id)

    def mask_pairs(self, rngs: list[np.random.Generator], lengths: list[int]) -> Tensor:
        """What n samples mask of the responses of B pairs, bool [2B, n, R]: all, if the stage's
        `masking` is "all-masked"."""
        n, wholly = self.stage.vrpo_samples, self.stage.masking == "all-masked"
        drawn = [torch.ones(length, n, dtype=torch.bool) if wholly
                 else torch.from_numpy(draw_masks(rng, length, n).T)  # [R, n]
                 for rng, length in zip(rngs, lengths, strict=True)]
        return pad_sequence(drawn, batch_first=True).transpose(1, 2)

    def load_clips(self, examples: list[Example]) -> dict:
        """What a Batch has of its clips. Raises UserError if one is broken and not skipped."""
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
        return dict(clips=clips, broken=broken, incomplete=incomplete)
