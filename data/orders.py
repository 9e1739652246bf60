"""Manifests from spoken coffee orders: people who say what they want, and what they leave out.

    python data/orders.py                      # download the recordings, write data/orders
    python data/orders.py --source ~/benchmark # use a copy: a clone of the repository

619 clips of more than 50 speakers, who are not named, by Picovoice
(github.com/Picovoice/speech-to-intent-benchmark), under the Apache License 2.0. There is no text:
the labels say which drink, size, roast, shots, milk and sugar a clip asks for. This repository
contains none of it. A copy may also be a folder with `label.json` and the clips in `clean`, of any
format. The number of clips and the words of the labels are checked; nobody has told the hash of the
archive yet.

Labels lose their stray spaces, and one of two ways to say the same: `a bit of` becomes `a little
bit of`, `a lot of` becomes `lots of`. A fifth of the clips are the test split; equal orders are in
one split. A wrong answer to a slot that was said is another value, to one that was not said any
value, and to the whole order the sentence with one slot changed, or one added that was not said.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import json
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from data import corpus, toy_text
from data.toy import ask_row
from data.toy_text import Question
from diffa2_mini.audio import duration
from diffa2_mini.errors import UserError, read_text, require

ARCHIVE = corpus.Archive(
    "https://github.com/Picovoice/speech-to-intent-benchmark/archive/refs/heads/master.tar.gz")
N_CLIPS = 619
LONGEST = 15  # seconds; the 16 clips above 13 are cut by a model that hears no more
NONE = "none"  # the answer about a slot that was not said
SLOTS = {"drink": "coffeeDrink", "size": "size", "roast": "roast", "shots": "numberOfShots",
         "milk": "milkAmount", "sugar": "sugarAmount"}  # our names, and those of the labels
AMOUNTS = ("", "some ", "a little bit of ", "lots of ")
VALUES = {  # all that labels say
    "drink": ("coffee", "iced coffee", "drip coffee", "house coffee", "mocha", "iced mocha",
              "latte", "cappuccino", "espresso", "americano"),
    "size": ("small", "medium", "large", "eight ounce", "twelve ounce", "sixteen ounce",
             "twenty ounce"),
    "roast": ("light roast", "medium roast", "dark roast"),
    "shots": ("single shot", "double shot", "triple shot"),
    "milk": tuple(amount + kind for amount in AMOUNTS for kind in (
        "milk", "cream", "soy milk", "whole milk", "skim milk", "almond milk")),
    "sugar": tuple(amount + kind for amount in AMOUNTS
                   for kind in ("sugar", "brown sugar", "sweetener"))}
SAME = {"a bit of": "a little bit of", "a lot of": "lots of"}
WORDINGS = {
    "drink": ("Which drink is ordered?", "What does the customer want to drink?",
              "What kind of coffee is it?"),
    "size": ("What size?", "How large is the drink?", "Which size is ordered?"),
    "roast": ("Which roast?", "What roast is ordered?", "How dark is the roast?"),
    "shots": ("How many shots?", "Single, double or triple shot?", "How many shots are ordered?"),
    "milk": ("How much milk?", "Which milk is ordered?", "What milk or cream goes in?"),
    "sugar": ("How much sugar?", "What sweetens the drink?", "Which sugar is ordered?"),
    "order": ("What is the order?", "Repeat the whole order.", "What does the customer order?"),
}
TEST, VALIDATION = 0.2, 0.08  # shares of the clips
# questions per training clip, beside one about each slot: about the whole order, which teach most,
# as their answers name all that is said; and with lettered choices
N_WHOLE, N_LETTERED = 6, 2
N_PAIRS = 600  # for preference


@dataclass(frozen=True)
class Order:
    """A clip, and what it asks for: a value for each slot that was said."""

    path: Path
    slots: dict[str, str]


def cleaned(value: str) -> str:
    """A value of a label without stray spaces, in one of two ways to say the same."""
    value = " ".join(value.split())
    for start, same in SAME.items():
        if value.startswith(start + " "):
            value = same + value.removeprefix(start)
    return value


def read_orders(source: Path) -> list[Order]:
    """All orders of a clone of the repository, or of a folder with label.json and clean. Raises
    UserError."""
    label, speech = source / "data/label/label.json", source / "data/speech/clean"
    if not label.is_file():
        label, speech = source / "label.json", source / "clean"
    require(label.is_file() and speech.is_dir(),
            f"{source}: expected data/label/label.json and data/speech/clean, or label.json and "
            "clean, got neither; check --source")
    clips = {path.stem: path for path in sorted(speech.iterdir())}
    try:
        labels = {Path(name).stem: {slot: cleaned(said["slots"][key]) for slot, key
                                    in SLOTS.items() if key in said["slots"]}
                  for name, said in json.loads(read_text(label, "labels")).items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{label}: expected clips with their slots, got none ({error!r}); get it "
                        "again") from None
    odd = [value for slots in labels.values() for slot, value in slots.items()
           if value not in VALUES[slot]]
    require(not odd, f"{label}: expected words such as {', '.join(VALUES['size'])}, got {odd[:1]}; "
            "get it again")
    missing = [name for name in labels if name not in clips]
    require(not missing and len(labels) == N_CLIPS,
            f"{source}: expected {N_CLIPS} clips with their labels, got {len(labels)} labels and "
            f"no clip for {len(missing)} of them; get it again")
    return [Order(clips[name], slots) for name, slots in sorted(labels.items())]


def place(path: PurePosixPath) -> PurePosixPath | None:
    """Where a file of the archive goes: the labels, and the clips without noise."""
    if path.parts[1:] == ("data", "label", "label.json"):
        return PurePosixPath("label.json")
    is_clip = path.parts[1:-1] == ("data", "speech", "clean") and path.suffix == ".wav"
    return PurePosixPath("clean", path.name) if is_clip else None


def into_splits(orders: list[Order], rng: np.random.Generator) -> dict[str, list[Order]]:
    """The orders of each split, with equal orders in one of them."""
    groups: dict[str, list[Order]] = {}
    for order in orders:
        groups.setdefault(json.dumps(order.slots), []).append(order)
    equal, splits = list(groups.values()), {"test": [], "validation": [], "train": []}
    for i in rng.permutation(len(equal)):
        name = ("test" if len(splits["test"]) < TEST * len(orders) else "validation"
                if len(splits["validation"]) < VALIDATION * len(orders) else "train")
        splits[name] += equal[i]
    return splits


def sentence(slots: dict[str, str]) -> str:
    """`a large dark roast mocha, double shot, with soy milk and some sugar`."""
    what = " ".join(slots[name] for name in ("size", "roast", "drink") if name in slots)
    shots = f", {slots['shots']}" if "shots" in slots else ""
    extras = " and ".join(slots[name] for name in ("milk", "sugar") if name in slots)
    article = "an" if what.startswith(tuple("aei")) else "a"
    return f"{article} {what}{shots}" + f", with {extras}" * bool(extras)


def ask(slot: str, slots: dict[str, str], rng: np.random.Generator) -> Question:
    """A question about a slot of an order, or about the whole `order`, in a random wording. The
    type of one about a slot that was not said is `none`."""
    wording = str(rng.choice(WORDINGS[slot]))
    if slot == "order":
        wrong = tuple(sentence(slots | {name: value}) for name, values in VALUES.items()
                      for value in values if value != slots.get(name))
        return Question("order", wording, sentence(slots), wrong)
    said = slots.get(slot, NONE)
    wrong = tuple(value for value in VALUES[slot] if value != said)
    return Question(slot if slot in slots else NONE, wording, said, wrong)


def ask_lettered(slots: dict[str, str], rng: np.random.Generator) -> Question:
    """A question about a random slot with lettered choices, `none` mostly among them."""
    question = ask(str(rng.choice(list(SLOTS))), slots, rng)
    if question.type == NONE:
        return toy_text.lettered(question, rng)
    wrong = rng.choice(question.wrong, size=2, replace=False).tolist()
    return toy_text.lettered(replace(question, wrong=(*wrong, NONE)), rng)


def manifests(splits: dict[str, list[Order]], out: Path, seed: int) -> dict[str, list[dict]]:
    """Every manifest, by name. There is none for stage 1, which needs transcripts. Raises
    UserError."""
    rng = np.random.default_rng([seed, 99])

    def rows(order: Order, n_whole: int, n_lettered: int) -> list[dict]:
        seconds = duration(order.path)
        require(seconds <= LONGEST, f"{order.path}: expected {LONGEST} s at most, got "
                f"{seconds:.1f} s; get it again")
        asked = (*SLOTS, *["order"] * n_whole)
        questions = [ask(slot, order.slots, rng) for slot in asked]
        questions += [ask_lettered(order.slots, rng) for _ in range(n_lettered)]
        row = {"audio_id": order.path.stem, "audio_filepath": corpus.named_from(out, order.path),
               "dataset": "orders", "domain": "speech", "duration": seconds}
        return [ask_row(row, question, rng) for question in questions]

    found = {"sft": [row for order in splits["train"]
                     for row in rows(order, N_WHOLE, N_LETTERED)]}
    pairs = [row | {"chosen": row["target"]} for row in found["sft"] if "+" not in row["type"]]
    found["preference"] = rng.permutation(pairs)[:N_PAIRS].tolist()
    for split in ("validation", "test"):
        found[split] = [row for order in splits[split] for row in rows(order, 1, 1)]
    return found


def main(argv: list[str]) -> None:
    args = corpus.parser_of(__doc__, "orders").parse_args(argv)
    found = read_orders(corpus.find(args.source, args.out, ARCHIVE, place, read_orders))
    splits = into_splits(found, np.random.default_rng([args.seed, 98]))
    corpus.write_manifests(args.out, manifests(splits, args.out, args.seed))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
