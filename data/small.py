"""The data of `--size small`: one curriculum over real digits, orders and people, with the toy's
sounds and music.

    python data/fsdd.py --hold-out george && python data/orders.py && python data/people.py
    python data/toy.py && python data/small.py    # their manifests as one: data/small
    python data/small.py --tokenizer    # train diffa2_mini/assets/small.bpe on their texts

Stage 1 has what people read, digits, and the toy's speech; the other stages have questions of all.
Each corpus keeps its own test.json, to be named with `train.py --test`.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from data import corpus, orders, people, toy_text
from data.bpe import count_words, save_ranks, train_bpe
from data.toy import TextExample, text_example
from data.toy_sound import DIGITS
from diffa2_mini.command.script import Parser
from diffa2_mini.config import ASSETS, DATA, SIZES, TextConfig
from diffa2_mini.data import read_manifest, text_of
from diffa2_mini.errors import UserError, require
from diffa2_mini.tokenizer import SPECIAL_TOKENS

FOLDERS = ("fsdd", "orders", "people", "toy")
NAMES = ("stage1", "sft", "preference", "validation")
MOST = {"sft": {"fsdd": 1500, "toy": 1500}, "preference": dict.fromkeys(FOLDERS, 480)}
N_PER_TYPE = 30  # questions of each type and corpus in the validation set
FILLERS = ("can i have", "i would like", "please", "with", "and", "um", "thank you", "get me")
SHARES = {"dictation": 0.35, "order": 0.25, "person": 0.1, "digits": 0.1, "toy": 0.2}  # of texts


def read_rows(path: Path, *names: str) -> list[dict]:
    """The entries of a corpus's manifest, each with text in the fields `names`. Raises UserError
    that names one without."""
    rows = read_manifest(path)
    for i, row in enumerate(rows, start=1):
        try:
            require(isinstance(row, dict), f"expected an object, got {type(row).__name__}")
            for name in names:
                text_of(row, name)
        except UserError as error:
            raise UserError(f"{path}: entry {i}: {error}; python data/{path.parent.name}.py makes "
                            "it anew") from None
    return rows


def rows_of(folder: Path, name: str) -> list[dict]:
    """The rows of a corpus that go into a manifest of small, with whole paths to their clips.
    Raises UserError."""
    if name == "stage1" and folder.name == "orders":  # which have no transcripts
        return []
    rows = read_rows(folder / f"{name}.json", "audio_filepath", "type", "domain")
    if folder.name == "toy" and name != "stage1":
        rows = [row for row in rows if row["domain"] != "speech"]
    return [row | {"audio_filepath": str((folder / row["audio_filepath"]).resolve())}
            for row in rows]


def mix(data: Path, out: Path, seed: int = 0) -> None:
    """Write the manifests of small into `out`, from the folders in `data`. Raises UserError that
    names what is missing."""
    missing = [folder for folder in FOLDERS if not (data / folder / "sft.json").is_file()]
    flags = {"fsdd": " --hold-out george"}
    commands = " && ".join(f"python data/{name}.py{flags.get(name, '')}" for name in missing)
    require(not missing, f"{data}: expected {', '.join(FOLDERS)} with their manifests, got none "
            f"for {', '.join(missing)}; {commands} makes them")
    rng, manifests = np.random.default_rng(seed), {name: [] for name in NAMES}
    for name in NAMES:
        for folder in FOLDERS:
            rows = rows_of(data / folder, name)
            rows = [rows[i] for i in rng.permutation(len(rows))[:MOST.get(name, {}).get(folder)]]
            seen = Counter()
            for row in rows:
                seen[row["type"]] += 1
                if name != "validation" or seen[row["type"]] <= N_PER_TYPE:
                    manifests[name].append(row)
    corpus.write_manifests(out, manifests)


def order_example(rng: np.random.Generator) -> TextExample:
    """A question about an order that nobody said: its slots in random order, with words between."""
    slots = {slot: str(rng.choice(values)) for slot, values in orders.VALUES.items()
             if slot == "drink" or rng.random() < 0.5}
    words = []
    for slot in rng.permutation(list(slots)):
        if rng.random() < 0.5:
            words += str(rng.choice(FILLERS)).split()
        words += slots[slot].split()
    if rng.random() < 0.3:
        question = orders.ask_lettered(slots, rng)
    else:
        question = orders.ask(str(rng.choice([*slots, *orders.SLOTS, "order"])), slots, rng)
    return TextExample(["speech", *words], [], question.type, question.instruction,
                       question.answer)


def person_example(texts: list[str], rng: np.random.Generator) -> TextExample:
    """A question about what someone reads, or about who does."""
    words, kind = str(rng.choice(texts)).split(), str(rng.choice(people.KINDS))
    utterance = people.Utterance(Path(), "", False, " ".join(words), kind)
    question = people.ask(utterance, rng)
    if rng.random() < 0.5:
        question = people.transcribe(utterance, rng)
    elif rng.random() < people.SHARE_LETTERED:
        question = toy_text.lettered(question, rng)
    return TextExample(["speech", kind, *words], [], question.type, question.instruction,
                       question.answer)


def without_ordinals(example: TextExample) -> TextExample:
    """The same, its items one after the other: Whisper writes down what is said, and does not
    count."""
    return replace(example, traits=[*example.traits, *(item for _, item in example.items)],
                   items=[])


def digits_example(rng: np.random.Generator, evaluation: bool) -> TextExample:
    """A question about digits that someone with a name says; half are transcripts."""
    scene = toy_text.random_named_scene(rng, evaluation)
    question = (toy_text.ask("asr", scene, rng) if rng.random() < 0.5
                else toy_text.random_question(scene, rng, {}, people.SHARE_LETTERED))
    return without_ordinals(TextExample(*toy_text.describe(scene, rng), question.type,
                                        question.instruction, question.answer))


def dictation(texts: list[str], rng: np.random.Generator) -> TextExample:
    """Words to be written down in their order, which makes no sense: digits, or words that people
    read."""
    known = DIGITS if rng.random() < 0.5 else " ".join(rng.choice(texts, 8)).split()
    words = rng.choice(known, int(rng.integers(1, 9))).tolist()
    return TextExample(["speech", str(rng.choice(people.KINDS)), *words], [], "asr",
                       str(rng.choice(people.INSTRUCTIONS)), " ".join(words))


def draw_text(said: dict[bool, list[str]], rng: np.random.Generator,
              evaluation: bool = False) -> TextExample:
    """A dictation, or a question about an order, a person, digits or a clip of the toy. `said`:
    what people read, in the evaluation and not."""
    kind = rng.choice([*SHARES], p=[*SHARES.values()])
    if kind == "dictation":
        return dictation(said[evaluation], rng)
    if kind == "order":
        return order_example(rng)
    if kind == "person":
        return person_example(said[evaluation], rng)
    if kind == "digits":
        return digits_example(rng, evaluation)
    example = text_example(rng, evaluation)
    return without_ordinals(example) if rng.random() < 0.5 else example


def transcripts(folder: Path, name: str) -> list[str]:
    """What people read, of a manifest. Raises UserError."""
    return [row["transcription"] for row in read_rows(folder / f"{name}.json", "transcription")]


def texts(folder: Path = DATA / "people") -> Callable[[np.random.Generator, bool], TextExample]:
    """What draws the texts of small's backbone. Raises UserError where there are no transcripts of
    people."""
    require((folder / "stage1.json").is_file(), f"{folder}: expected stage1.json with transcripts, "
            "got none; python data/people.py makes it")
    return partial(draw_text, {False: transcripts(folder, "stage1"),
                               True: transcripts(folder, "validation")})


def make_tokenizer(path: Path, folder: Path = DATA / "people", seed: int = 0) -> None:
    """Train a BPE on the texts of small. Each word of questions, orders and the toy becomes one
    token; of what people read, only training's transcripts count, by how often a word is there.
    Raises UserError as `texts` does."""
    draw, rng = texts(folder), np.random.default_rng(seed)
    every = [TextConfig().train_system, "This is the audio: <audio>.", "system", "user",
             "assistant", *(f" {filler}" for filler in FILLERS)]
    for _ in range(20_000):
        example = draw(rng)
        every.append(example.instruction)
        if example.type != "asr":
            every.append(example.answer)
        if not {*example.traits} & {*people.KINDS}:
            every += [f" {word}" for word in example.words()]
    counted = Counter(dict.fromkeys(count_words("\n".join(every)), 1000))
    counted += count_words("\n".join(f"{text}\n {text}" for text in transcripts(folder, "stage1")))
    n_merges = SIZES["small"][0].llada.vocab_size - 256 - len(SPECIAL_TOKENS)
    save_ranks(train_bpe(counted, n_merges), path)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, default=DATA,
                        help="the folder that has those of the corpora (default: data)")
    parser.add_argument("--out", type=Path, default=DATA / "small",
                        help="where the manifests go (default: data/small)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", action="store_true", help="train small.bpe instead")
    args = parser.parse_args(argv)
    if args.tokenizer:
        make_tokenizer(ASSETS / "small.bpe", args.data / "people", args.seed)
    else:
        mix(args.data, args.out, args.seed)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
