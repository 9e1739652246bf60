"""The benchmarks: what their published files look like, how they ask, and which rule scores them.

    mmsu   arXiv 2506.04779, JSON lines: 5,000 questions about speech
    mmau   arXiv 2410.19168, a JSON list: 1,000 questions about speech, sound and music (test-mini)
    mmar   arXiv 2505.13032, a JSON list: 1,000 questions about these and their mixtures
    asr    a manifest of transcripts (data/kaldi.py makes one of Kaldi's tables)
    toy    ToyBench (data/toybench.py), in MMAU's format

The first three ask as the authors of DIFFA-2 did. ToyBench asks as the toy model was taught: a free
question alone, whose answer must be right as a whole ("three one" is not "one three"), or a
lettered one with its choices, of whose answer the letter counts.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from ..config import DATA, TextConfig
from ..data import read_manifest, text_of
from ..errors import UserError, require
from . import scoring
from .scoring import WordErrors

FREE = "free"  # in ToyBench the "difficulty" of a question that is asked without its choices
MMSU_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
MMAU_PROMPT = (
    "You are given the audio and a multiple-choice question. Choose the best answer based only on "
    "the speech content and style.\n\nQuestion: {question}\n\nChoices:\n{choices}\nAnswer:")


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked, judged and reported."""

    audio: str  # the field that names the clip
    answer: tuple[str, ...]  # the fields that may have the right choice's text, or the transcript
    prompt: str  # with {question} and {choices}
    choice_of: Callable | None  # (reply, choices) → the choice named, or None; none for transcripts
    tables: tuple[str, ...] = ()  # a row for each value of these fields together
    by_words: bool = False  # the words of a reply tell whether it is right, not the choice named
    length: int | None = 16  # tokens of a response of published weights, as the authors decode it


BENCHMARKS = {
    "mmsu": Benchmark("audio_path", ("answer_gt",),
        "Choose the most suitable answer from options A, B, C, and D to respond the question in "
        "next line, **you should only choose A or B or C or D.** Do not provide any additional "
        "explanations or content.\n\nQuestion: {question}\n\n{choices}",
        lambda reply, choices: dict(zip(ascii_uppercase, choices)).get(scoring.mmsu_letter(reply)),
        ("category", "category / sub-category", "category / sub-category / sub-sub-category",
         "task_name")),
    "mmau": Benchmark("audio_id", ("answer",), MMAU_PROMPT, scoring.named_choice,
                      ("task", "category", "sub-category", "difficulty"), by_words=True),
    "mmar": Benchmark("audio_path", ("answer",), MMAU_PROMPT, scoring.named_choice,
                      ("modality", "category", "sub-category", "language"), by_words=True),
    "asr": Benchmark("audio_filepath", ("transcription", "target"), TextConfig().instruction, None,
                     length=128),
    "toy": Benchmark("audio_id", ("answer",), "{question}\n{choices}",
        lambda reply, choices: dict(zip(ascii_uppercase, choices)).get(reply.strip()[:1]),
        ("task", "task / category", "sub-category", "difficulty"), length=None)}
TOY_FREE = replace(  # a reply that is none of the choices names itself, unless it is blank
    BENCHMARKS["toy"], prompt="{question}", choice_of=lambda reply, choices: next(
        (each for each in (*choices, reply) if each.strip() == reply.strip() != ""), None))


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A question to a model, and what is needed to judge the reply."""

    id: str
    audio: Path | None
    prompt: str
    answer: str  # one of the choices, or what the file has in its place
    row: dict  # the published fields
    benchmark: Benchmark
    choices: tuple[str, ...] = ()  # in the order in which they are shown; none of a transcript

    @property
    def can_be_scored(self) -> bool:
        """Whether the answer is one of the choices and not blank, as those of test sets are; nor
        without a word, which MMAU's rule finds in any reply."""
        if self.benchmark.choice_of is None:
            return True
        says = scoring.words(self.answer) if self.benchmark.by_words else self.answer.strip()
        return self.answer in self.choices and bool(says)

    def judge(self, reply: str) -> bool | WordErrors:
        """Whether a reply is right; of a transcript, what is wrong with it."""
        if self.benchmark.choice_of is None:
            return scoring.word_errors(scoring.normalise(self.answer), scoring.normalise(reply))
        if self.benchmark.by_words:
            return scoring.score_by_words(reply, self.answer, self.choices)
        return self.benchmark.choice_of(reply, self.choices) == self.answer


def text_in(row: dict, *names: str, default: str | None = None) -> str:
    """What `text_of` finds, where a number counts as text too."""
    numbers = {name: str(value) for name, value in row.items() if isinstance(value, (int, float))}
    return text_of(row | numbers, *names, default=default)


def id_of(row: dict, seen: Counter) -> str:
    """An entry's id. Files may ask twice about a clip: an id that was `seen` becomes id#2."""
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
    id = text_in(row, "id", "audio_id", "audio_filepath")
    seen[id] += 1
    return id if seen[id] == 1 else f"{id}#{seen[id]}"


def choices_of(row: dict) -> list[str]:
    """The choices of any format; nulls are dropped."""
    choices = row.get("choices")
    if not isinstance(choices, list):
        choices = [row.get(name) for name in MMSU_CHOICES]
    return [str(choice) for choice in choices if choice is not None]


def rows_of(title: str, row: dict) -> list[str]:
    """The rows of a table in which a question counts: each combination of its fields' values."""
    columns = []
    for name in title.split(" / "):
        values = row.get(name) if isinstance(row.get(name), list) else [row.get(name)]
        columns.append(dict.fromkeys(str(v) for v in values if v not in (None, "")) or ["(none)"])
    return [" / ".join(each) for each in product(*columns)]


def read_question(name: str, row: dict, id: str, root: Path,
                  shuffle: int | None) -> BenchmarkQuestion:
    """An entry of a benchmark's file. `shuffle` is the seed of the order of the choices."""
    require(not re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)),
            "expected text, got characters that are none")
    benchmark = BENCHMARKS[name]
    audio = root / text_in(row, benchmark.audio) if row.get(benchmark.audio) else None
    if benchmark.choice_of is None:
        return BenchmarkQuestion(id, audio, benchmark.prompt, text_in(row, *benchmark.answer), row,
                                 benchmark)
    choices = choices_of(row)
    require(1 <= len(choices) <= 26, f"expected 1 to 26 choices, got {len(choices)}")
    if shuffle is not None:
        rng = np.random.default_rng([shuffle, zlib.crc32(id.encode())])
        choices = rng.permutation(np.array(choices, object)).tolist()
    is_ours = row.keys() & {benchmark.audio, *benchmark.answer}  # a test set has no answers
    answer = text_in(row, *benchmark.answer, default="" if is_ours else None)
    answer = next((each for each in choices if each.strip() == answer.strip()), answer)
    if name == "toy" and row.get("difficulty") == FREE:
        benchmark = TOY_FREE
    lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices)]
    prompt = benchmark.prompt.format(question=text_in(row, "question"), choices="\n".join(lines))
    shown = ({"choices": choices} if isinstance(row.get("choices"), list)
             else dict(zip_longest(MMSU_CHOICES, choices)))
    return BenchmarkQuestion(id, audio, prompt, answer, row | shown, benchmark, tuple(choices))


def read_questions(name: str, rows: list[dict], source: Path, root: Path = Path(),
                   shuffle: int | None = None) -> list[BenchmarkQuestion]:
    """All questions of a benchmark. Raises UserError that names the first broken entry."""
    questions, seen = [], Counter()
    for i, row in enumerate(rows, start=1):
        try:
            questions.append(read_question(name, row, id_of(row, seen), root, shuffle))
        except UserError as error:
            raise UserError(f"{source}: entry {i} is no question of {name}: {error}") from None
    return questions


def read_transcripts(file: Path) -> list[dict]:
    """The entries of a manifest that are transcripts; it may ask other things too."""
    rows = read_manifest(file)
    found = [row for row in rows if not isinstance(row, dict) or row.get("type") in (None, "asr")]
    require(found, f"{file}: expected transcripts, got questions of other types alone")
    print(f"{file}: {len(found)} transcripts; entries of another type, which are left out: "
          f"{len(rows) - len(found)}")
    return found


def load_questions(name: str, file: Path | None, root: Path | None = None,
                   shuffle: int | None = None) -> list[BenchmarkQuestion]:
    """Read a benchmark's published file; without one, ToyBench where data/toybench.py makes it.
    Paths are relative to `root`, or else to the file. Raises UserError."""
    if file is None:
        file = DATA / "toy" / "toybench.json"
        require(file.is_file(), f"{file}: expected ToyBench, found no such file; in a clone of the "
                                "repository 'python data/toybench.py' makes it, or name it: --file")
    folder = file if file.is_dir() else file.parent
    require(name != "asr" or file not in (folder, folder / "wav.scp"), f"{file}: expected a "
            f"manifest, got a folder or Kaldi's tables: in a clone, python data/kaldi.py {folder}")
    rows = read_transcripts(file) if name == "asr" else read_manifest(file)
    return read_questions(name, rows, file, root or folder, shuffle)
