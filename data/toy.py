"""The toy world on disk: clips, and the manifests of stages 1 to 4. Nothing is downloaded.

    python data/toy.py                      # all of it into data/toy: 2,810 clips
    python data/toy.py --listen /tmp/clips  # a few clips with their questions, to play
    python data/toy.py --tokenizer toy      # train the byte-level BPE in diffa2_mini/assets/toy.bpe
    python data/toy.py --clips              # make the clips that ship in data/clips

`train.py --stage 0` makes clips of its own here, with their alignment.

A clip depends on the seed, the split and its number alone. Scenes of evaluation are never those of
training.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, progress, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import io
import json
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import soundfile

from data import toy_text
from data.bpe import count_words, save_ranks, train_bpe
from data.toy_sound import SAMPLE_RATE, Scene, synthesize
from diffa2_mini.command.script import Parser
from diffa2_mini.config import ASSETS, DATA, TextConfig
from diffa2_mini.errors import require
from diffa2_mini.training.files import write_whole, writing

KINDS = ("speech", "sound", "music")
SPLITS = {  # clips of each kind, in the order of KINDS
    "stage0": (3000, 1500, 1500),
    "train": (1000, 1000, 600),
    "evaluation": (90, 60, 60),
    "toybench": (145, 170, 115),
}
HELD_OUT = ("evaluation", "toybench")  # splits whose scenes no training shows
# about a training clip: stage 1 has taught digits, but no sounds, and music is easy
N_QUESTIONS = {"speech": 5, "sound": 7, "music": 3}
# how often the backbone's pretraining asks a type
TEXT_WEIGHTS = {"asr": 3, "sounds": 2, "after": 4, "caption": 2, "premise": 4, "present": 3,
                "absent": 3}
# and training on clips
WEIGHTS = {"asr": 3, "sounds": 3, "first": 2, "last": 2, "after": 6, "caption": 5,
           "kind": 0.5, "who": 0.5, "speed": 0.7, "tempo": 2, "present": 5,
           "absent": 0.3, "premise": 0.3}  # few false premises: stage 4 has them
N_PAIRS = 2752  # of all types alike; 1.5 times as many ask about premises, half of them false
N_PER_TYPE = 20  # questions of each type in the validation set


def write_clip(path: Path, samples: np.ndarray) -> None:
    """Write a clip, mono, 16 bits a sample. Raises UserError when the disk is full."""
    wav = io.BytesIO()  # soundfile waits for the disk after each file that it writes itself
    soundfile.write(wav, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    with writing(path):
        path.write_bytes(wav.getvalue())


def random_scenes(split: str, seed: int) -> list[tuple[Scene, np.random.Generator]]:
    """The scenes of a split, each with the generator of what else is random in its clip."""
    kinds = [kind for kind, n in zip(KINDS, SPLITS[split]) for _ in range(n)]
    rngs = [np.random.default_rng([seed, [*SPLITS].index(split), i]) for i in range(len(kinds))]
    return [(toy_text.random_scene(rng, kind, evaluation=split in HELD_OUT), rng)
            for kind, rng in zip(kinds, rngs)]


def clip_name(split: str, i: int) -> str:
    """Where the clip of a split's scene number i lies, in the folder of its manifest."""
    return f"clips/{split}_{i:05d}.wav"


def make_clips(folder: Path, split: str, seed: int) -> list[tuple[Scene, dict]]:
    """Write the clips of a split; returns each scene with the manifest fields that any stage
    needs."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    clips = []
    shown = progress(random_scenes(split, seed), desc=f"synthesising {split}", unit="clip",
                     leave=False)
    for i, (scene, rng) in enumerate(shown):
        samples, segments = synthesize(scene, rng)
        name = clip_name(split, i)
        write_clip(folder / name, samples)
        row = {
            "audio_id": f"{split}_{i:05d}", "audio_filepath": name, "dataset": "toy",
            "domain": scene.kind, "duration": len(samples) / SAMPLE_RATE,
            "transcription": " ".join(scene.items)}
        if split == "stage0":
            row["segments"] = [asdict(segment) for segment in segments]
            row["traits"] = toy_text.traits(scene)
        clips.append((scene, row))
    return clips


def ask_row(row: dict, question: toy_text.Question, rng: np.random.Generator) -> dict:
    """A manifest entry: a clip, a question, its answer, and an answer that is fluent and wrong."""
    return row | {"input": question.instruction, "target": question.answer, "type": question.type,
                  "rejected": str(rng.choice(question.wrong)) if question.wrong else ""}


def manifests(clips: list[tuple[Scene, dict]], evaluation: list[tuple[Scene, dict]],
              seed: int) -> dict[str, list[dict]]:
    """Every manifest of stages 1 to 4, by name."""
    rng = np.random.default_rng([seed, 99])
    speech = [(scene, row) for scene, row in clips if scene.kind == "speech"]
    stage1 = [ask_row(row, toy_text.ask("asr", scene, rng), rng) for scene, row in speech]
    sft = [ask_row(row, toy_text.random_question(scene, rng, WEIGHTS, share_lettered=0.3), rng)
           for scene, row in clips for _ in range(N_QUESTIONS[scene.kind])]
    others = dict.fromkeys(toy_text.ABOUT_X, 0)
    pairs = [ask_row(row, toy_text.random_question(scene, rng, others, share_lettered=0.4), rng)
             for scene, row in (clips[i] for i in rng.integers(len(clips), size=N_PAIRS))]
    pairs += premises(clips, rng, "paired", 3 * N_PAIRS // 2 // len(toy_text.ABOUT_X))
    preference = [row | {"chosen": row["target"]} for row in pairs]

    by_type = {}
    for scene, row in evaluation:
        for question in toy_text.questions(scene, rng):
            by_type.setdefault((scene.kind, question.type), []).append(ask_row(row, question, rng))
    validation = [
        rows[i] for rows in by_type.values() for i in rng.permutation(len(rows))[:N_PER_TYPE]]
    return {"stage1": stage1, "sft": sft, "preference": preference, "validation": validation}


def premises(clips: list[tuple[Scene, dict]], rng: np.random.Generator, part: str,
             most: int) -> list[dict]:
    """Questions with true and with false premises, as many of each, up to `most` of a type. The
    `part` "paired" is what stage 4 is trained on; "unpaired", other words in another wording, is
    what it is measured on."""
    rows = {type: [] for type in toy_text.ABOUT_X}
    for type, found in rows.items():
        for scene, row in clips:
            if type in toy_text.TYPES[scene.kind]:
                asked = (toy_text.ask(type, scene, rng, part=part) for _ in range(4))
                different = {question.instruction: question for question in asked if question}
                found += [(scene, ask_row(row, question, rng)) for question in different.values()
                          if question.wrong]
    balanced = []
    for true, false in (("present", "absent"), ("after", "premise")):
        n = min(len(rows[true]), len(rows[false]), most)
        balanced += [rows[type][i] for type in (true, false)
                     for i in rng.permutation(len(rows[type]))[:n]]
    for i, (scene, row) in enumerate(balanced):
        later = scene.items[1:]
        if row["type"] == "after" and i % 2 == 0:
            row["rejected"] = "nothing"  # which denies what is there
        elif row["type"] == "premise" and later:
            row["rejected"] = later[i % len(later)]  # as models answer: it comes after something
    return [row for _, row in balanced]


def write_json(path: Path, rows: list[dict]) -> None:
    """Write a manifest, or nothing: one object a line, so that it can be read by eye. Raises
    UserError when the disk is full."""
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def is_made(folder: Path) -> bool:
    """Whether the data of stages 1 to 4 are in `folder`."""
    return (folder / "validation.json").exists()  # the last file written


def make_world(folder: Path, seed: int = 0) -> Path:
    """Make the data of stages 1 to 4 in `folder`, unless it is there."""
    folder = Path(folder)
    if not is_made(folder):
        clips = make_clips(folder, "train", seed)
        evaluation = make_clips(folder, "evaluation", seed)
        for name, rows in manifests(clips, evaluation, seed).items():
            write_json(folder / f"{name}.json", rows)
    return folder


def make_stage0(folder: Path, seed: int = 0) -> Path:
    """Make the encoder's pretraining data in `folder`, unless it is there: clips with their
    alignment and traits."""
    folder = Path(folder)
    if not (folder / "stage0.json").exists():
        write_json(folder / "stage0.json", [row for _, row in make_clips(folder, "stage0", seed)])
    return folder


@dataclass(frozen=True)
class TextExample:
    """A question about a clip, which `traits` and the items with their ordinals describe."""

    traits: list[str]
    items: list[tuple[str, str]]
    type: str
    instruction: str
    answer: str

    def words(self) -> list[str]:
        """The description as a sentence: `speech high voice first three second one`."""
        return [*self.traits, *(word for pair in self.items for word in pair)]


def text_example(rng: np.random.Generator, evaluation: bool = False) -> TextExample:
    """A question about a clip that was never synthesised, for the backbone's pretraining. Some
    speakers have names, so that the same backbone serves real recordings."""
    kind = str(rng.choice(KINDS, p=(0.4, 0.4, 0.2)))
    if kind == "speech" and rng.random() < 0.25:
        scene = toy_text.random_named_scene(rng, evaluation)
    else:
        scene = toy_text.random_scene(rng, kind, evaluation)
    question = toy_text.random_question(scene, rng, TEXT_WEIGHTS, share_lettered=0.4)
    return TextExample(*toy_text.describe(scene, rng), question.type, question.instruction,
                       question.answer)


def make_tokenizer(path: Path, n_merges: int, seed: int = 0) -> None:
    """Train a BPE on the toy world's texts, where every word counts alike so that each becomes one
    token."""
    rng = np.random.default_rng(seed)
    texts = [
        TextConfig.train_system, "This is the audio: <audio>.", "system", "user", "assistant"]
    for _ in range(20_000):
        example = text_example(rng)
        texts += [example.instruction, example.answer, *(f" {word}" for word in example.words())]
    counted = Counter(dict.fromkeys(count_words("\n".join(texts)), 1000))
    save_ranks(train_bpe(counted, n_merges), path)


def listen(folder: Path, seed: int = 0) -> None:
    """Write two clips of each kind, and print what can be asked about them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        for i in range(2):
            scene = toy_text.random_scene(rng, kind)
            path = folder / f"{kind}_{i}.wav"
            write_clip(path, synthesize(scene, rng)[0])
            print(f"\n{path}")
            for question in toy_text.questions(scene, rng):
                instruction = " / ".join(question.instruction.splitlines())
                print(f"  {question.type:12} {instruction}  ->  {question.answer}")


SHIPPED = {
    "three_one_four": Scene("speech", ("three", "one", "four"), voice="low", speed="slow"),
    "siren_bell_drum": Scene("sound", ("siren", "bell", "drum")),
    "minor_arpeggio": Scene("music", speed="slow", pattern="arpeggio", mode="minor",
                            instrument="flute", root=2),
}


def make_shipped(folder: Path, seed: int = 0) -> None:
    """Write the clips that this repository ships. Their scenes are held out of all training."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, scene) in enumerate(SHIPPED.items()):
        assert toy_text.held_out(scene), name
        samples, _ = synthesize(scene, np.random.default_rng([seed, 7, i]))
        write_clip(folder / f"{name}.wav", samples)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=DATA / "toy",
                        help="where the data goes (default: data/toy)")
    parser.add_argument("--seed", type=int, help="of all that is random (default: 0)")
    parser.add_argument("--listen", type=Path, metavar="OUT",
                        help="write a few clips with their questions instead")
    parser.add_argument("--clips", action="store_true", help="make the clips in data/clips instead")
    parser.add_argument("--tokenizer", choices=["toy"],
                        help="train toy.bpe of diffa2_mini/assets instead")
    args = parser.parse_args(argv)
    seed = args.seed or 0
    if args.listen:
        listen(args.listen, seed)
    elif args.clips:
        make_shipped(DATA / "clips", seed)
    elif args.tokenizer == "toy":
        make_tokenizer(ASSETS / "toy.bpe", n_merges=2000, seed=seed)
    else:
        require(args.seed is None or not is_made(args.out), f"{args.out}: has a toy world, which "
                "stays as it is; leave out --seed, or choose another --out")
        kept = ", as it was: delete it to make it anew" if is_made(args.out) else ""
        print(f"the toy world is in {make_world(args.out, seed)}{kept}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
