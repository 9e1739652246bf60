"""Manifests to batches: which clips with which questions, loaded, encoded and put side by side.

A manifest is a JSON list (or JSON lines) of objects with the fields of the authors' and of DeSTA2's: `audio_filepath`,
`transcription`, `input` (the instruction), `target` (the answer), and for stage 4 `chosen` (or `target`) and
`rejected`. Paths are relative to the manifest. Every clip is looked at before training starts, so that a broken one
stops a run in its first minute and not in its last hour.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import duration, encoder_frames, load_audio, log_mel
from .config import (AdapterConfig, AudioConfig, Config, StageConfig, TextConfig, UserError,
                     require, require_contents)
from .diffusion import draw_noise, forward_process
from .model import Audio
from .noise import stream
from .tokenizer import Prompt, Tokenizer
from .vrpo import draw_masks


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
    require(Path(path).is_file(), f"{path}: expected a manifest (JSON list or JSON lines), found no such file")
    require_contents(path, "a manifest")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts first
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected a manifest of text in UTF-8, got other bytes; save it as JSON") from None
    is_list = text.lstrip().startswith("[")
    pieces = [text] if is_list else text.split("\n")
    rows = []
    for line, piece in enumerate(pieces, start=1):
        try:
            rows += [json.loads(piece)] if piece.strip() else []
        except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
            line += getattr(error, "lineno", 1) - 1
            raise UserError(f"{path}: line {line} is not JSON ({getattr(error, 'msg', error)}); mend it") from None
    rows = rows[0] if is_list else rows
    require(len(rows) > 0, f"{path}: expected entries, got an empty manifest")
    return rows


def read_example(row: dict, folder: Path, stage: StageConfig, instruction: str) -> Example:
    """An entry as an example of `stage`; missing instructions are replaced by `instruction`. Raises UserError."""
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")

    def text(*names, default=None):
        name = next((name for name in names if row.get(name) is not None), names[0])
        value = default if row.get(name) is None else row[name]
        require(value is not None, f"the field {' or '.join(names)} is missing")
        require(isinstance(value, str), f"expected text in {name}, got {type(value).__name__}")
        require(not re.search("[\0\ud800-\udfff]", value), f"expected text in {name}, got characters that are none")
        return value

    if stage.data == "stage1":
        answer = text("transcription", "target")
    else:
        answer = text("chosen", "target") if stage.preference else text("target", "transcription")
    rejected = text("rejected") if stage.preference else text("rejected", default="")
    return Example(folder / text("audio_filepath"), text("input", default=instruction), answer, rejected,
                   text("type", "dataset", default="all"), text("domain", "dataset", default="all"))


def load_examples(path: Path, stage: StageConfig, config: Config, skip_broken: bool, say: Callable) -> list[Example]:
    """Read a manifest and look at every clip's header. Raises UserError that names the first broken entries; with
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
            examples.append(dataclasses.replace(example, seconds=seen[example.path]))
        except UserError as error:
            name = name if isinstance(name, str) else f"entry {i}"
            broken.append(" ".join(f"{name}: {error}".split()))  # one line, whatever is in the names
    if broken:
        listed = "; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")
        require(skip_broken, f"{path}: {len(broken)} broken of {len(broken) + len(examples)} entries: {listed}. "
                             "Mend them, or go on without them: --skip-broken")
        say(f"skipped {len(broken)} broken of {len(broken) + len(examples)} entries of {path}: {listed}")
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
    return sum({"semantic": n_frames // config.semantic_stride, "acoustic": config.n_queries, "prompts": config.n_prompts}[part]
               for part in parts)


@dataclass
class Batch:
    """B examples, or B preference pairs; then `response` has 2B rows: chosen, rejected, chosen, …"""

    examples: list[Example]
    clips: list[tuple[Tensor, int]]  # log-mels with their numbers of frames, unless hidden states are kept
    prompts: list[Prompt]
    response: Tensor  # [B, R] token ids, padded with EOS to the longest
    real: Tensor  # bool [B, R], False at that padding
    t: Tensor  # [B] times, and
    uniforms: Tensor  # [B, R] a number per token, for the forward process; or for VRPO:
    masks: Tensor  # bool [2B, n, R] the masks of n samples for each response
    n_masked: int  # tokens that will be predicted
    audio: Audio | None = None
    broken: tuple[str, ...] = ()  # what is wrong with clips that are left out: silence is in their place, and nothing masked
    incomplete: dict[Path, str] = dataclasses.field(default_factory=dict)  # what clips in it lack

    def heard(self, ears: Callable, device: torch.device) -> "Batch":
        """The batch on the device, with what `ears` makes of its clips."""
        tensors = {name: getattr(self, name).to(device) for name in ("response", "real", "t", "uniforms", "masks")}
        return dataclasses.replace(self, **tensors, audio=ears([example.path for example in self.examples], self.clips))


def tokenize(example: Example, answer: str, stage: StageConfig, text: TextConfig, tokenizer: Tokenizer
             ) -> tuple[Prompt, list[int]]:
    """The prompt and a response to it. Together they have at most `max_tokens`: the end of a longer response is cut."""
    prompt = tokenizer.prompt(text.train_system, example.instruction)
    room = max(1, stage.max_tokens - len(prompt.ids))
    return prompt, tokenizer.response(answer, text.response_multiple)[:room]


class Collate:
    """Makes batches of some data; what the processes that load it are given. `load` has it load the clips too, and
    `held_out` has the noise be another than that of training."""

    def __init__(self, data: list[Example], seed: int, stage: StageConfig, config: Config, tokenizer: Tokenizer, load: bool,
                 skip_broken: bool = False, held_out: bool = False):
        self.data, self.seed, self.stage, self.config, self.tokenizer = data, seed, stage, config, tokenizer
        self.load, self.skip_broken, self.known = load, skip_broken, {}
        self.kind = "held-out answers" if held_out else "answers"

    def answers(self, number: int) -> list[tuple[Prompt, list[int]]]:
        """The prompt and the tokens of the answer; of a pair, of both."""
        example = self.data[number]
        both = (example.answer, example.rejected) if self.stage.preference else (example.answer,)
        return [tokenize(example, answer, self.stage, self.config.text, self.tokenizer) for answer in both]

    def lengths(self, number: int) -> list[tuple[int, int]]:
        """Of each answer to an example: the tokens that stand before it, audio included, and its own."""
        if number not in self.known:
            config, seconds = self.config, self.data[number].seconds
            frames = encoder_frames(round(seconds * config.audio.sample_rate), config.audio)
            n_audio = n_embeddings(config.adapter, self.stage.audio, frames)
            self.known[number] = [(len(prompt.ids) + n_audio, len(ids)) for prompt, ids in self.answers(number)]
        return self.known[number]

    def __getitem__(self, pairs: list[tuple[int, int]]) -> "Batch | UserError":
        """A batch of (epoch, number in the data) pairs, or what is wrong with a clip. The noise is keyed by (seed, stage,
        epoch, number), and by which of its answers it hides."""
        stage, prompts, rows, t, uniforms, masks = self.stage, [], [], [], [], []
        for epoch, number in pairs:
            for which, (prompt, ids) in enumerate(self.answers(number)):
                rows.append(torch.tensor(ids))
                rng = stream(self.kind, self.seed, stage.number, epoch, number, which)
                if stage.preference:
                    drawn = draw_masks(rng, len(ids), stage.vrpo_samples)
                    masks.append(torch.from_numpy(drawn.T))  # [R, n]
                else:
                    at, numbers = draw_noise(rng, len(ids))
                    t.append(at)
                    uniforms.append(torch.from_numpy(numbers).float())
            prompts.append(prompt)
        examples, clips, broken = [self.data[number] for _, number in pairs], [], {}
        incomplete = {}
        for i, example in enumerate(examples if self.load else []):
            try:
                note = partial(incomplete.__setitem__, example.path)
                clips.append(load_clip(example.path, self.config.audio, note))
            except UserError as error:
                if not self.skip_broken:
                    return error  # raised in a worker, it would come with a trace
                broken[i] = str(error)
                silence = np.zeros(round(example.seconds * self.config.audio.sample_rate), np.float32)
                clips.append((log_mel(silence, self.config.audio), encoder_frames(len(silence), self.config.audio)))
        response = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eos_id)
        real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        t, none = torch.tensor(t, dtype=torch.float32), torch.empty(0)
        if stage.preference:
            masks = pad_sequence(masks, batch_first=True).transpose(1, 2)  # [2B, R, n] -> [2B, n, R]
            masks.unflatten(0, (-1, 2))[[*broken]] = False
            return Batch(examples, clips, prompts, response, real, none, none, masks,
                         int(masks.sum()), None, (*broken.values(),), incomplete)
        uniforms = pad_sequence(uniforms, batch_first=True, padding_value=2.0)  # 2: never masked
        uniforms[[*broken]] = 2.0
        n_masked = forward_process(response, t, uniforms, self.tokenizer.mask_id)[1].sum()
        return Batch(examples, clips, prompts, response, real, t, uniforms, none, int(n_masked),
                     None, (*broken.values(),), incomplete)

    def cut(self, pairs: list[tuple[int, int]], at_once: int, rank: int = 0, size: int = 1) -> list[list[tuple[int, int]]]:
        """The share that process `rank` of `size` has of the pairs of a step, in pieces of `at_once`, the longest first, so that
        what is padded together is of about the same length. The gradient of the step is the same however it is cut."""
        order = sorted(pairs, key=lambda pair: -max(map(sum, self.lengths(pair[1]))))
        share = order[rank::size]
        return [share[start:start + at_once] for start in range(0, len(share), at_once)]
