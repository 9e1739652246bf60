"""What can be said of a toy clip: a description, questions with short answers, lettered choices,
wrong answers.

Everything follows from a `Scene`. A wrong answer is the right answer about a scene that differs in
one respect: fluent, and wrong about the audio. Scenes that are `held_out` are kept for evaluation:
no training clip, stage 0 included, shows one.
"""

import zlib
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from data.toy_sound import DIGITS, SOUNDS, Scene

# speakers of the Free Spoken Digit Dataset
NAMES = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
ORDINALS = ("first", "second", "third", "fourth")
CHOICES = {"voice": ("high", "low"), "speed": ("fast", "slow"), "pattern": ("arpeggio", "chords"),
           "mode": ("major", "minor"), "instrument": ("flute", "organ")}
MUSIC = ("speed", "pattern", "mode", "instrument")
MUSICS = list(product(*(CHOICES[name] for name in MUSIC)))

WORDINGS = {
    "asr": ("Please transcribe the audio to text.", "Transcribe the speech.",
            "Write down what is said.", "What is said?", "What does the speaker say?"),
    "count": ("How many {items} are there?", "How many {items} do you hear?"),
    "first": ("Which {item} comes first?", "What is the first {item}?"),
    "last": ("Which {item} comes last?", "What is the last {item}?"),
    "after": ("Which {item} comes after the {x}?", "What follows the {x}?",
              "What comes after the {x}?"),
    "present": ("Is there any {x}?", "Do you hear any {x}?", "Does the audio have any {x}?"),
    "sounds": ("Which sounds do you hear?", "List the sounds."),
    "who": ("Who speaks?", "Who is the speaker?"),
    "speed": ("Is the speech fast or slow?", "How fast is the speech?"),
    "tempo": ("Is the tempo fast or slow?", "What is the tempo of the music?"),
    "mode": ("Is the music major or minor?", "What is the mode of the music?"),
    "pattern": ("Is it an arpeggio or chords?", "Does the music play an arpeggio or chords?"),
    "instrument": ("Which instrument plays?", "Is it a flute or an organ?"),
    "kind": ("What kind of audio is this?", "Is this speech, sound or music?"),
    "fits": ("Which word fits the music?", "Which word describes the music?"),
    "caption": ("Describe the audio.", "Describe what you hear in one sentence."),
}
# The same questions about what is not there: an answer that names a sound, or says yes, accepts a
# false premise.
WORDINGS |= {"absent": WORDINGS["present"], "premise": WORDINGS["after"]}
TYPES = {
    "speech": ("asr", "count", "first", "last", "after", "who", "speed", "caption", "kind",
               "present", "absent", "premise"),
    "sound": ("sounds", "count", "first", "last", "after", "caption", "kind", "present", "absent",
              "premise"),
    "music": ("tempo", "mode", "pattern", "instrument", "caption", "kind"),
}
# mostly have at least two wrong answers of one word
LETTERED = ("count", "first", "last", "after", "kind")
LETTERS = "ABCD"
# What stage 4's pairs never ask about, in types of ABOUT_X; its test asks about nothing else, and
# in the last wording alone, which the pairs never have. Supervised data has all of it.
UNPAIRED = ("bell", "clicks", "zero", "five")
ABOUT_X = ("after", "present", "absent", "premise")
# what the clips in data/clips say
SHIPPED_ITEMS = (("three", "one", "four"), ("siren", "bell", "drum"))


@dataclass(frozen=True)
class Question:
    """A question about a clip. `type` is a key of WORDINGS, with `+abcd` when its choices have
    letters."""

    type: str
    instruction: str
    answer: str
    wrong: tuple[str, ...]  # fluent answers, each wrong about the audio in one respect


def held_out(scene: Scene) -> bool:
    """Whether a scene belongs to evaluation: every fifth sequence of digits or sounds, and each
    music in two of its keys."""
    if scene.kind == "music":
        return (scene.root + MUSICS.index(tuple(getattr(scene, name) for name in MUSIC))) % 6 == 0
    if scene.items in SHIPPED_ITEMS:
        return True
    words = scene.items if len(scene.items) > 1 else (*scene.items, scene.voice, scene.speed)
    key = " ".join(words)
    return zlib.crc32(key.encode()) % 5 == 0


def random_scene(rng: np.random.Generator, kind: str, evaluation: bool = False) -> Scene:
    """A scene of training, or of evaluation."""
    while True:
        pick = {name: str(rng.choice(options)) for name, options in CHOICES.items()}
        if kind == "speech":
            items = tuple(str(d) for d in rng.choice(DIGITS, size=rng.integers(1, 5)))
            scene = Scene(kind, items, voice=pick["voice"], speed=pick["speed"])
        elif kind == "sound":
            size = rng.integers(1, 4)
            items = tuple(str(s) for s in rng.choice(SOUNDS, size=size, replace=False))
            scene = Scene(kind, items)
        else:
            scene = Scene(kind, root=int(rng.integers(12)), **{name: pick[name] for name in MUSIC})
        if held_out(scene) == evaluation:
            return scene


def random_named_scene(rng: np.random.Generator, evaluation: bool = False) -> Scene:
    """A scene of speech whose speaker has a name, as real recordings have; its speed is not
    known."""
    scene = random_scene(rng, "speech", evaluation)
    return replace(scene, voice=str(rng.choice(NAMES)), speed="")


def speaker(scene: Scene) -> str:
    """Who speaks: a name, or `a high voice`."""
    return scene.voice if scene.voice in NAMES else f"a {scene.voice} voice"


def describe(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[tuple[str, str]]]:
    """What stands in the audio's place in stage 0: the traits that are heard, and each item with
    its ordinal. Read one after the other they are a sentence: `speech fast high voice first three
    second one`."""
    if scene.kind == "music":
        traits = [scene.speed, scene.mode, scene.pattern, scene.instrument]
    elif scene.kind == "speech":
        words = (scene.speed, *speaker(scene).removeprefix("a ").split())
        traits = [word for word in words if word]
    else:
        traits = []
    return [scene.kind, *rng.permutation(traits).tolist()], list(zip(ORDINALS, scene.items))


def traits(scene: Scene) -> dict[str, str]:
    """Properties of the whole clip, for the encoder's pretraining."""
    names = {"speech": ("voice", "speed"), "sound": (), "music": MUSIC}[scene.kind]
    # without it, modes stay unheard
    key = {"music key": f"{scene.root} {scene.mode}"} if scene.kind == "music" else {}
    return {"kind": scene.kind} | {f"{scene.kind} {name}": getattr(scene, name)
                                   for name in names} | key


def caption(scene: Scene) -> str:
    """One sentence with every fact of the scene."""
    if scene.kind == "music":
        article = "a " if scene.pattern == "arpeggio" else ""
        return f"{article}{scene.speed} {scene.mode} {scene.pattern} on the {scene.instrument}"
    if scene.kind == "sound":
        return ", then ".join(scene.items)
    who = speaker(scene)
    if scene.speed:
        who = who.replace("a ", f"a {scene.speed} ", 1)
    return f"{who} says {' '.join(scene.items)}"


def answer(type: str, scene: Scene, x: str = "") -> str | None:
    """The right answer to a question of `type`; None where the question makes no sense. `x` is the
    item that the types of ABOUT_X name."""
    if type in ("asr", "sounds"):
        return " ".join(scene.items)
    if type == "count":
        return str(len(scene.items))
    if type in ("first", "last"):
        return scene.items[0 if type == "first" else -1]
    if type in ("present", "absent"):
        return "yes" if x in scene.items else "no"
    if type in ("after", "premise"):
        if x not in scene.items:
            return "nothing"
        at = scene.items.index(x) + 1
        return scene.items[at] if at < len(scene.items) else None
    if type == "who":
        return speaker(scene)
    if type in ("speed", "tempo"):
        return scene.speed or None
    if type == "caption":
        return caption(scene)
    return scene.kind if type == "kind" else getattr(scene, type)


def items_to_name(type: str, scene: Scene, part: str) -> list[str]:
    """What a question of ABOUT_X may name: what is there, of `after` once and with something behind
    it, or what is not there. Of the `part` paired nothing of UNPAIRED, of unpaired nothing else."""
    if type in ("absent", "premise"):
        every = DIGITS if scene.kind == "speech" else SOUNDS
        words = [word for word in every if word not in scene.items]
    elif type == "after":
        words = [word for word in scene.items[:-1] if scene.items.count(word) == 1]
    else:
        words = scene.items
    return [word for word in words if part == "all" or (word in UNPAIRED) == (part == "unpaired")]


def one_of(options: list[str], rng: np.random.Generator) -> str:
    """What `rng.choice` draws, which would first make an array of the options."""
    return options[rng.integers(len(options))]


def mutate(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with at most one respect changed: an item replaced, dropped or added, two swapped,
    or another trait."""
    if scene.kind == "music":
        respects = list(MUSIC)
    else:
        respects = ["replace", "replace", "swap", "drop", "add"]
        respects += ["voice"] * (scene.voice != "") + ["speed"] * (scene.speed != "")
    respect, items = one_of(respects, rng), list(scene.items)
    if respect in ("voice", "speed", "pattern", "mode", "instrument"):
        options = NAMES if respect == "voice" and scene.voice in NAMES else CHOICES[respect]
        others = [option for option in options if option != getattr(scene, respect)]
        return replace(scene, **{respect: one_of(others, rng)})
    words = DIGITS if scene.kind == "speech" else SOUNDS
    new = one_of([word for word in words if word not in items], rng)
    i = int(rng.integers(len(items)))
    if respect == "replace":
        items[i] = new
    elif respect == "swap":
        j = int(rng.integers(len(items)))
        items[i], items[j] = items[j], items[i]
    elif respect == "drop" and len(items) > 1:
        items.pop(i)
    elif respect == "add" and len(items) < (4 if scene.kind == "speech" else 3):
        items.insert(i, new)
    return replace(scene, items=tuple(items))


def wrong_answers(type: str, scene: Scene, x: str, rng: np.random.Generator) -> list[str]:
    """Fluent answers, each wrong about the audio in one respect. Where a premise is false, they are
    what would be right if it were true."""
    if type in ("kind", "count"):
        return list(TYPES if type == "kind" else "1234")
    if type in ("present", "absent"):
        return ["yes", "no"]
    if type == "premise":
        return rng.permutation(scene.items).tolist()
    return [answer(type, mutate(scene, rng), x) for _ in range(12)]


def ask(type: str, scene: Scene, rng: np.random.Generator, wording: int | None = None,
        part: str = "all") -> Question | None:
    """A question of `type`, in a random wording or a given one; None where it makes no sense. Of
    ABOUT_X, the `part` "paired" is for stage 4's pairs, "unpaired" for its test."""
    x, wordings = "", WORDINGS[type]
    if type in ABOUT_X:
        named = items_to_name(type, scene, part)
        if not named:
            return None
        x = str(rng.choice(named))
        wordings = {"all": wordings, "paired": wordings[:-1], "unpaired": wordings[-1:]}[part]
    right = answer(type, scene, x)
    wrong = [other for other in dict.fromkeys(wrong_answers(type, scene, x, rng))
             if other not in (None, right)]
    if right is None:
        return None
    item = "digit" if scene.kind == "speech" else "sound"
    chosen = wordings[rng.integers(len(wordings)) if wording is None else wording]
    return Question(type, chosen.format(item=item, items=item + "s", x=x), right, tuple(wrong))


def which_word_fits(scene: Scene, rng: np.random.Generator) -> Question:
    """One trait of the music is right, the others are turned into their opposites."""
    traits = {name: getattr(scene, name) for name in MUSIC}
    right = str(rng.choice(list(traits)))
    wrong = tuple(option for name in traits if name != right for option in CHOICES[name]
                  if option != traits[name])
    return Question("fits", str(rng.choice(WORDINGS["fits"])), traits[right], wrong)


def lettered(question: Question, rng: np.random.Generator) -> Question:
    """The same question with three or four lettered choices in random order; the answer is `B.
    siren`."""
    wrong = rng.permutation(question.wrong)[:int(rng.integers(2, 4))].tolist()
    options = rng.permutation([question.answer, *wrong]).tolist()
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]
    right = lines.pop(options.index(question.answer))
    every = "\n".join(sorted([right, *lines]))
    return Question(question.type + "+abcd", f"{question.instruction}\n{every}", right,
                    tuple(lines))


def random_question(scene: Scene, rng: np.random.Generator, weights: dict[str, float],
                    share_lettered: float, part: str = "all") -> Question:
    """A question of a random type, lettered or not. `weights` say how often a type is asked; others
    count 1. `part` is that of `ask`."""
    with_letters = rng.random() < share_lettered
    types = [type for type in TYPES[scene.kind] if not with_letters or type in LETTERED]
    if with_letters and scene.kind == "music" and rng.random() < 0.7:
        return lettered(which_word_fits(scene, rng), rng)
    shares = np.array([weights.get(type, 1) for type in types], dtype=float)
    while True:
        question = ask(str(rng.choice(types, p=shares / shares.sum())), scene, rng, part=part)
        if question and len(question.wrong) > with_letters:
            return lettered(question, rng) if with_letters else question


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question of each type that fits the scene, and its lettered form where it has one."""
    plain = [question for type in TYPES[scene.kind] if (question := ask(type, scene, rng))]
    choices = [
        question for question in plain if question.type in LETTERED and len(question.wrong) > 1]
    if scene.kind == "music":
        choices.append(which_word_fits(scene, rng))
    return plain + [lettered(question, rng) for question in choices]
