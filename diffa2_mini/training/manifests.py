"""The data of a run: which manifests, their examples, and which of these are too long."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..config import SIZES, AudioConfig, Config, StageConfig
from ..data import Example, load_clip, load_examples
from ..errors import UserError, require
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    """What the user says about data."""

    path: Path  # a manifest, or a folder of them
    validation: Path | None  # None: validation.json beside the data, if it is there
    tests: list[Path]
    skip_broken: bool
    validates: bool


@dataclass
class RunData:
    """The manifests of stages by number, the examples of those that are to be trained, examples to
    validate on, and examples to test on by manifest."""

    manifests: dict[int, Path]
    examples: dict[int, list[Example]]
    validation: list[Example]
    tests: dict[Path, list[Example]]


def load_data(data: DataConfig, size: str, numbers: list[int], unfinished: list[int],
              tokenizer: Tokenizer) -> RunData:
    """All that the stages `numbers` of a size need, of which the `unfinished` are to be trained. A
    manifest that two read alike is read once. Raises UserError."""
    (config, stages), path = SIZES[size], data.path
    folder = path if path.is_dir() else path.parent
    manifests = {number: path / f"{stages[number].data}.json" if path.is_dir() else path
                 for number in numbers}
    loaded = {}  # by the name of a stage's data
    for number in unfinished:
        stage = stages[number]
        if stage.data not in loaded:
            loaded[stage.data] = load_examples(manifests[number], stage, config, data.skip_broken,
                                               tokenizer)
    examples = {number: loaded[stages[number].data] for number in unfinished}

    def load_held_out(path: Path) -> list[Example]:
        examples = load_examples(path, stages[2], config, data.skip_broken)
        return whole(path, examples, config.audio) if data.skip_broken else examples

    validation, held_out = [], data.validation or folder / "validation.json"
    if data.validates:
        if data.validation or held_out.exists():
            validation = load_held_out(held_out)
        else:
            print(f"no {held_out}: nothing will be measured")
    return RunData(manifests, examples, validation,
                   {path: load_held_out(path) for path in data.tests})


def whole(manifest: Path, examples: list[Example], config: AudioConfig) -> list[Example]:
    """Those whose clips can be read to the end; the other clips are named in a line each. Raises
    UserError if there are none."""
    broken = set()
    for path in dict.fromkeys(example.path for example in examples):
        try:
            load_clip(path, config, lambda line: None)  # one that ends early will do
        except UserError as error:
            print(f"left out: {error}")
            broken.add(path)
    kept = [example for example in examples if example.path not in broken]
    require(kept, f"{manifest}: not one of its clips can be read")
    return kept


def what_is_cut(data: list[Example], stage: StageConfig, config: Config, tokenizer: Tokenizer
                ) -> str:
    """Which examples cannot be learnt whole, in one line; empty if all can."""
    limit, seconds, length = stage.max_tokens, config.audio.max_seconds, config.decode.gen_length
    count = cache(lambda text: len(tokenizer.encode(text)))
    count_prompt = cache(lambda text: len(tokenizer.prompt(config.text.train_system, text).ids))

    def is_cut(example: Example) -> bool:
        answers = [example.answer] + [example.rejected] * stage.preference
        n_tokens = count_prompt(example.instruction) + max(map(count, answers))
        return n_tokens + 1 > limit  # 1 for `<|eot_id|>`

    tests = {f"with text beyond {limit:,} tokens, which is cut": is_cut,
             f"with a clip beyond the {seconds} s that the model takes":
                 lambda each: each.seconds > seconds,
             f"with an answer beyond the {length:,} tokens that it writes":
                 lambda each: count(each.answer) > length}
    named = {what: [each.path.name for each in filter(test, data)] for what, test in tests.items()}
    return "; ".join(f"{len(names):,} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                     for what, names in named.items() if names)
