"""Manifests to batches: which clips with which questions, loaded, encoded and put side by side.

A manifest is a JSON list (or JSON lines) of objects with the fields of the authors' and of DeSTA2's: `audio_filepath`,
`transcription`, `input` (the instruction), `target` (the answer), and for stage 4 `chosen` (or `target`) and
`rejected`. Paths are relative to the manifest. Every clip is looked at before training starts, so that a broken one
stops a run in its first minute and not in its last hour.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .audio import duration, encoder_frames, load_audio, log_mel
from .config import ASSETS, AudioConfig, Config, StageConfig, TextConfig, UserError, require
from .diffusion import noise_for
from .model import Audio, Diffa2
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


def read_manifest(path: Path) -> list[dict]:
    """The entries of a manifest. Raises UserError that names the line where it is broken."""
    require(Path(path).is_file(), f"{path}: expected a manifest (JSON list or JSON lines), found no such file")
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
                    seen[example.path] = duration(example.path) and None
                except UserError as error:
                    seen[example.path] = str(error)
            require(seen[example.path] is None, str(seen[example.path]))
            examples.append(example)
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


def load_clip(path: Path, config: AudioConfig) -> tuple[Tensor, int]:
    """log-mel [n_mels, M] of a sound file, and how many encoder frames of it hold sound."""
    samples = load_audio(path, config.sample_rate, config.max_seconds)
    return log_mel(samples, config), encoder_frames(len(samples), config)


MANIFESTS = {  # what each stage needs, and one entry of it
    1: ("stage1.json", "speech with its transcripts",
        '{"audio_filepath": "clip.wav", "transcription": "hello there"}'),
    2: ("sft.json", "questions about clips with their answers",
        '{"audio_filepath": "clip.wav", "input": "How many speakers are there?", "target": "two"}'),
    4: ("preference.json", "questions with a right and a wrong answer",
        '{"audio_filepath": "clip.wav", "input": "Who laughs?", "chosen": "a child", "rejected": "a man"}'),
}
MANIFESTS[3] = MANIFESTS[2]


def default_data(config: Config, stages: list[int], random_weights: bool) -> Path:
    """Where the data is if the user does not say: the toy world, made if it is missing, or the prepared LibriSpeech.
    Raises UserError that says what the first stage without data needs."""
    if config.from_scratch or random_weights:
        from data import toy
        return toy.make_world(ASSETS / "toy")
    folder = ASSETS / "librispeech"
    for stage in stages:
        name, what, line = MANIFESTS[stage]
        if not (folder / name).exists():
            how = ("python data/librispeech.py prepares LibriSpeech" if stage == 1 else
                   "data/README.md says where the authors' data comes from")
            raise UserError(f"stage {stage} of size {config.size} needs --data: a manifest of {what}, an entry being {line}; {how}")
    return folder


class Ears:
    """What the frozen encoder makes of clips, computed once for each and kept in memory if `keep` is set.

    The encoder is never trained, so that keeping its hidden states changes nothing but time.
    """

    def __init__(self, model: Diffa2, device: torch.device, dtype: torch.dtype, keep: bool):
        self.model, self.device, self.dtype, self.keep = model, device, dtype, keep
        self.kept: dict[Path, Audio] = {}

    def encode(self, paths: list[Path]) -> Audio:
        """The hidden states of clips, through the encoder."""
        clips = [load_clip(path, self.model.config.audio) for path in paths]
        mel = torch.stack([mel for mel, _ in clips]).to(self.device, self.dtype)
        return self.model.encode(mel, torch.tensor([n for _, n in clips], device=self.device))

    def prepare(self, paths: list[Path], progress: Callable) -> None:
        """Encode clips ahead of time, 32 at once; nothing to do unless they are kept."""
        missing = [path for path in dict.fromkeys(paths) if path not in self.kept] if self.keep else []
        for start in progress(range(0, len(missing), 32)):
            chunk = missing[start:start + 32]
            audio = self.encode(chunk)
            for i, path in enumerate(chunk):
                self.kept[path] = Audio(audio.final[i], audio.taps[i], audio.n_frames[i])

    def __call__(self, paths: list[Path]) -> Audio:
        if not self.keep:
            return self.encode(paths)
        self.prepare(paths, lambda chunks: chunks)
        clips = [self.kept[path] for path in paths]
        return Audio(*(torch.stack([getattr(clip, name) for clip in clips]) for name in ("final", "taps", "n_frames")))


@dataclass
class Batch:
    """B examples, or B preference pairs, on the device; then `response` has 2B rows: chosen, rejected, chosen, …"""

    audio: Audio
    prompts: list[Prompt]
    response: Tensor  # [B, R] token ids, padded with EOS to the longest
    real: Tensor  # bool [B, R], False at that padding
    t: Tensor  # [B] times, and
    uniforms: Tensor  # [B, R] a number per token, for the forward process; or for VRPO:
    masks: Tensor  # bool [2B, n, R] the masks of n samples for each response
    examples: list[Example]


def tokenize(example: Example, answer: str, stage: StageConfig, text: TextConfig, tokenizer: Tokenizer
             ) -> tuple[Prompt, list[int]]:
    """The prompt and a response to it. Together they have at most `max_tokens`: the end of a longer response is cut."""
    prompt = tokenizer.prompt(text.train_system, example.instruction)
    room = max(1, stage.max_tokens - len(prompt.ids))
    return prompt, tokenizer.response(answer, text.response_multiple)[:room]


def collate(pairs: list[tuple[int, int]], data: list[Example], seed: int, stage: StageConfig, text: TextConfig,
            tokenizer: Tokenizer, ears: Ears) -> Batch:
    """Build a batch of (epoch, number in the data) pairs. The noise is keyed by (seed, epoch, number)."""
    examples = [data[number] for _, number in pairs]
    prompts, rows, t, uniforms, masks = [], [], [], [], []
    for (epoch, number), example in zip(pairs, examples):
        for which, answer in enumerate((example.answer, example.rejected) if stage.preference else (example.answer,)):
            prompt, ids = tokenize(example, answer, stage, text, tokenizer)
            rows.append(torch.tensor(ids))
            if stage.preference:
                drawn = draw_masks(np.random.default_rng([seed, epoch, number, which]), len(ids), stage.vrpo_samples)
                masks.append(torch.from_numpy(drawn.T))  # [R, n]
            else:
                time, numbers = noise_for(seed, epoch, number, len(ids))
                t.append(time)
                uniforms.append(torch.from_numpy(numbers))
        prompts.append(prompt)
    device = ears.device
    response = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_id).to(device)
    real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True).to(device)
    if stage.preference:
        masks = pad_sequence(masks, batch_first=True).transpose(1, 2).to(device)  # [2B, R, n] -> [2B, n, R]
    else:
        t = torch.tensor(t, dtype=torch.float32, device=device)
        uniforms = pad_sequence(uniforms, batch_first=True, padding_value=2.0).float().to(device)  # 2: never masked
    audio = ears([example.path for example in examples])
    return Batch(audio, prompts, response, real, t, uniforms, masks, examples)


def epoch_order(n_examples: int, epoch: int, seed: int) -> np.ndarray:
    """The order in which an epoch goes through the examples."""
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def batches(n_examples: int, batch_size: int, n_steps: int, first_step: int, seed: int) -> Iterator[tuple[int, list]]:
    """For each step from `first_step` on: the step, and its (epoch, number of the example) pairs. One epoch follows the
    other without a gap, so that every example is seen exactly once per epoch, whatever the batch size."""
    orders = {}
    for step in range(first_step, n_steps):
        pairs = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, at = divmod(position, n_examples)
            if epoch not in orders:
                orders = {epoch: epoch_order(n_examples, epoch, seed)}  # epochs only ever go up
            pairs.append((epoch, int(orders[epoch][at])))
        yield step, pairs
