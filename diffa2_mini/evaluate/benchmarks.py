"""The benchmarks: what their published files look like, how they ask, and which rule scores them.

    mmsu   arXiv 2506.04779, JSON lines: 5,000 questions about speech
    mmau   arXiv 2410.19168, a JSON list: 1,000 questions about speech, sound and music (test-mini)
    mmar   arXiv 2505.13032, a JSON list: 1,000 questions about these and their mixtures
    asr    a manifest, or Kaldi's wav.scp and text: transcripts
    toy    ToyBench (data/toybench.py), in MMAU's format

The first three ask as the authors of DIFFA-2 did. ToyBench asks as the toy model was taught: a free
question alone, a lettered one with its choices. A free answer must be the right one as a whole,
since "three one" is not "one three", which a rule of words cannot tell; of a lettered one the
letter counts.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from string import ascii_uppercase

import numpy as np

from ..config import DATA, TextConfig
from ..data import read_manifest
from ..errors import UserError, require
from .scoring import mmsu_letter, names_a_choice, same_text, score_by_words, score_mmsu, words

FREE = "free"  # in ToyBench the "difficulty" of a question that is asked without its choices
MMSU_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A question of a benchmark, its choices in the order in which they are shown; a transcript has
    none. The answer is one of the choices, or what the file has in its place, perhaps nothing."""

    id: str
    audio: Path | None
    prompt: str
    choices: tuple[str, ...]
    answer: str
    # for each table, such as "category", the rows in which the question counts
    groups: dict[str, tuple[str, ...]]
    row: dict  # the published fields


# ------------------------------------------------------------------------------- prompts and scores


def lettered(choices: tuple[str, ...]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices))


def ask_mmsu(question: str, choices: tuple[str, ...], row: dict) -> str:
    return ("Choose the most suitable answer from options A, B, C, and D to respond the question "
            "in next line, **you should only choose A or B or C or D.** Do not provide any "
            f"additional explanations or content.\n\nQuestion: {question}\n\n{lettered(choices)}")


def ask_mmau(question: str, choices: tuple[str, ...], row: dict) -> str:
    return ("You are given the audio and a multiple-choice question. Choose the best answer based "
            f"only on the speech content and style.\n\nQuestion: {question}\n\nChoices:\n"
            f"{lettered(choices)}\nAnswer:")


def ask_toy(question: str, choices: tuple[str, ...], row: dict) -> str:
    return question if row.get("difficulty") == FREE else f"{question}\n{lettered(choices)}"


def is_right_mmsu(reply: str, question: BenchmarkQuestion) -> bool:
    return score_mmsu(reply, question.answer, question.choices)


def is_right_mmau(reply: str, question: BenchmarkQuestion) -> bool:
    return score_by_words(reply, question.answer, question.choices)


def is_right_toy(reply: str, question: BenchmarkQuestion) -> bool:
    if question.row.get("difficulty") == FREE:
        return same_text(reply, question.answer)
    return dict(zip(ascii_uppercase, question.choices)).get(reply.strip()[:1]) == question.answer


def answers_mmsu(reply: str, question: BenchmarkQuestion) -> bool:
    """Whether the rule finds the letter of a choice; what does not answer is malformed."""
    return mmsu_letter(reply) in [*ascii_uppercase[:len(question.choices)]]


def answers_mmau(reply: str, question: BenchmarkQuestion) -> bool:
    return names_a_choice(reply, question.choices)


def answers_toy(reply: str, question: BenchmarkQuestion) -> bool:
    if question.row.get("difficulty") == FREE:
        return bool(reply.strip())
    return reply.strip()[:1] in [*ascii_uppercase[:len(question.choices)]]


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is read, asked, scored and reported. `decode` is how the authors have
    published weights decode."""

    audio: str  # the field that names the clip
    answer: str  # the field with the right choice's text
    tables: tuple[tuple[str, ...], ...] = ()  # a row for each value of these fields together
    ask: Callable[[str, tuple[str, ...], dict], str] = ask_mmau
    is_right: Callable[[str, BenchmarkQuestion], bool] = is_right_mmau
    answers: Callable[[str, BenchmarkQuestion], bool] = answers_mmau
    decode: dict = field(
        default_factory=lambda: {"gen_length": 16, "block_length": 16, "steps": 16})


BENCHMARKS = {
    "mmsu": Benchmark(
        "audio_path", "answer_gt",
        (("category",), ("category", "sub-category"),
         ("category", "sub-category", "sub-sub-category"), ("task_name",)),
        ask_mmsu, is_right_mmsu, answers_mmsu),
    "mmau": Benchmark(
        "audio_id", "answer", (("task",), ("category",), ("sub-category",), ("difficulty",))),
    "mmar": Benchmark(
        "audio_path", "answer", (("modality",), ("category",), ("sub-category",), ("language",))),
    "asr": Benchmark(
        "audio_filepath", "transcription",
        decode={"gen_length": 128, "block_length": 128, "steps": 128}),
    "toy": Benchmark(
        "audio_id", "answer",
        (("task",), ("task", "category"), ("sub-category",), ("difficulty",)),
        ask_toy, is_right_toy, answers_toy, decode={}),
}


def can_be_scored(name: str, question: BenchmarkQuestion) -> bool:
    """Whether a question can be told right from wrong: its answer is one of its choices and, where
    words are counted, has one. Test sets are published with blank answers, which MMAU's rule would
    find in any reply. A transcript can be compared in any case."""
    by_words = BENCHMARKS[name].is_right is is_right_mmau
    return name == "asr" or (question.answer in question.choices and bool(question.answer.strip())
                             and bool(words(question.answer) or not by_words))


# ------------------------------------------------------------------------------------------ reading


def text_of(row: dict, *names: str) -> str:
    """The first of these fields that is there, as text. Raises UserError if none is."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    require(value is not None, f"the field {' or '.join(names)} is missing")
    require(isinstance(value, (str, int, float)),
            f"expected text in {' or '.join(names)}, got {type(value).__name__}")
    return str(value)


def values_of(row: dict, name: str) -> list[str]:
    """The values of a field that groups questions; it may hold one, several, or none."""
    value = row.get(name)
    values = value if isinstance(value, list) else [value]
    return [*dict.fromkeys(str(v) for v in values if v not in (None, ""))] or ["(none)"]


def id_of(row: dict) -> str:
    require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
    return text_of(row, "id", "audio_id", "audio_filepath")


def choices_of(row: dict) -> list[str]:
    """The choices of any format; nulls are dropped."""
    choices = row.get("choices")
    if not isinstance(choices, list):
        choices = [row.get(name) for name in MMSU_CHOICES]
    return [str(choice) for choice in choices if choice is not None]


def answer_of(name: str, row: dict, choices: tuple[str, ...]) -> str:
    """The choice that the row has as its answer, but for white space around it; else what stands
    there, which is blank in a test set. Raises UserError if the row is of another benchmark."""
    benchmark = BENCHMARKS[name]
    if row.get(benchmark.answer) is None and (benchmark.answer in row or benchmark.audio in row):
        return ""
    answer = text_of(row, benchmark.answer)
    return next((choice for choice in choices if same_text(choice, answer)), answer)


def with_choices(row: dict, choices: tuple[str, ...]) -> dict:
    """The published fields with these choices in place of theirs."""
    if isinstance(row.get("choices"), list):
        return row | {"choices": list(choices)}
    padded = [*choices, *[None] * len(MMSU_CHOICES)]
    return row | dict(zip(MMSU_CHOICES, padded))


def rows_in_tables(benchmark: Benchmark, row: dict) -> dict[str, tuple[str, ...]]:
    """For each table of the benchmark, the rows in which a question counts: one for each
    combination of the values that the fields have."""
    groups = {}
    for fields in benchmark.tables:
        combinations = product(*(values_of(row, name) for name in fields))
        groups[" / ".join(fields)] = tuple(" / ".join(values) for values in combinations)
    return groups


def read_question(name: str, row: dict, id: str, root: Path,
                  shuffle: int | None) -> BenchmarkQuestion:
    """An entry of a benchmark's file. `shuffle` is the seed of the order of the choices."""
    require(not re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)),
            "expected text, got characters that are none")
    benchmark = BENCHMARKS[name]
    audio = root / text_of(row, benchmark.audio) if row.get(benchmark.audio) else None
    if name == "asr":
        transcript = text_of(row, "transcription", "target")
        return BenchmarkQuestion(id, audio, TextConfig().instruction, (), transcript, {}, row)
    choices = choices_of(row)
    require(1 <= len(choices) <= 26, f"expected 1 to 26 choices, got {len(choices)}")
    if shuffle is not None:
        rng = np.random.default_rng([shuffle, zlib.crc32(id.encode())])
        choices = rng.permutation(np.array(choices, object)).tolist()
    choices = tuple(choices)
    prompt = benchmark.ask(text_of(row, "question"), choices, row)
    return BenchmarkQuestion(id, audio, prompt, choices, answer_of(name, row, choices),
                             rows_in_tables(benchmark, row), with_choices(row, choices))


def read_table(path: Path) -> dict[str, str]:
    """One of Kaldi's tables: what stands behind each id. Raises UserError."""
    require(path.is_file(), f"{path}: expected Kaldi's {path.name}, found no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: expected text in UTF-8, got other bytes; save it again") from None
    rows = [line.split(maxsplit=1) for line in lines if line.strip()]
    found = {id: rest[0].strip() if rest else "" for id, *rest in rows}
    require(len(found) == len(rows) > 0,
            f"{path}: expected lines with an id each, got none, or an id twice")
    return found


def read_kaldi(file: Path) -> list[dict]:
    """Kaldi's wav.scp (`id path` a line) and the `text` (`id words` a line) beside it, as a
    manifest. An utterance that has no clip stays in, without one."""
    file = file / "wav.scp" if file.is_dir() else file
    clips, texts = read_table(file), read_table(file.with_name("text"))
    unknown = ", ".join([id for id in clips if id not in texts][:5])
    require(not unknown, f"{file.with_name('text')}: expected a transcript of each clip, got none "
                         f"of {unknown}")
    piped = ", ".join([id for id, clip in clips.items() if clip.endswith("|")][:5])
    require(not piped, f"{file}: expected paths, got a command to run for {piped}; write the sound "
                       "to files first")
    return [{"id": id, "audio_filepath": clips.get(id), "transcription": text}
            for id, text in texts.items()]


def numbered(id: str, seen: dict[str, int]) -> str:
    """An id that differs from those `seen`: the second id becomes id#2. Published files may ask
    twice about a clip."""
    seen[id] = seen.get(id, 0) + 1
    return id if seen[id] == 1 else f"{id}#{seen[id]}"


def read_questions(name: str, rows: list[dict], source: Path, root: Path,
                   shuffle: int | None) -> list[BenchmarkQuestion]:
    """All questions of a benchmark. Raises UserError that names the first broken entry."""
    questions, seen = [], {}
    for i, row in enumerate(rows, start=1):
        try:
            questions.append(read_question(name, row, numbered(id_of(row), seen), root, shuffle))
        except UserError as error:
            raise UserError(f"{source}: entry {i} is no question of {name}: {error}") from None
    return questions


def transcripts_in(rows: list, file: Path) -> list:
    """The entries of a manifest that are transcripts; it may ask other things too. Raises UserError
    if none are."""
    found = [row for row in rows if not isinstance(row, dict) or row.get("type") in (None, "asr")]
    require(found, f"{file}: expected transcripts, got questions of other types alone")
    print(f"{file}: {len(found)} transcripts; entries of another type, which are left out: "
          f"{len(rows) - len(found)}")
    return found


def load_questions(name: str, file: Path | None, root: Path | None,
                   shuffle: int | None) -> list[BenchmarkQuestion]:
    """Read a benchmark's published file; without one, ToyBench where data/toybench.py makes it.
    Paths are relative to `root`, or else to the file. Raises UserError."""
    if file is None:
        file = DATA / "toy" / "toybench.json"
        require(file.is_file(), f"{file}: expected ToyBench, found no such file; in a clone of the "
                                "repository 'python data/toybench.py' makes it, or name it: --file")
    is_kaldi = name == "asr" and (file.is_dir() or file.name == "wav.scp")
    rows = read_kaldi(file) if is_kaldi else read_manifest(file)
    if name == "asr" and not is_kaldi:
        rows = transcripts_in(rows, file)
    folder = file if file.is_dir() else file.parent
    return read_questions(name, rows, file, root or folder, shuffle)
