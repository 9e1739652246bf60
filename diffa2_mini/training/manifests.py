"""The data of a run: which manifests, their examples, and which of these are too long."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..config import SIZES, Config, StageConfig
from ..data import Example, load_examples, may_exceed
from ..errors import require
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class DataConfig:
    """What the user says about data. `path` is a manifest, or a folder of them."""

    path: Path
    validation: Path | None  # a manifest; None: validation.json beside the data, if it is there
    tests: list[Path]
    skip_broken: bool
    validates: bool = True


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
    """All that stages `numbers` of a size need, of which the `unfinished` are to be trained. Raises
    UserError."""
    config, stages = SIZES[size]
    require(data.path.exists(),
            f"--data {data.path}: expected a manifest or a folder of manifests, found nothing")
    manifests = {number: data.path / f"{stages[number].data}.json" if data.path.is_dir()
                 else data.path for number in numbers}
    examples = load_stages({number: manifests[number] for number in unfinished}, stages, config,
                           data.skip_broken, tokenizer)
    validation = load_validation(data, stages[2], config) if data.validates else []
    tests = {path: load_examples(path, stages[2], config, data.skip_broken, print)
             for path in data.tests}
    return RunData(manifests, examples, validation, tests)


def load_stages(manifests: dict[int, Path], stages: dict[int, StageConfig], config: Config,
                skip_broken: bool, tokenizer: Tokenizer) -> dict[int, list[Example]]:
    """The examples of stages by number. A manifest that two stages read alike is read once."""
    loaded, examples = {}, {}
    for number, path in manifests.items():
        stage = stages[number]
        key = (path, stage.data, stage.preference)
        if key not in loaded:
            loaded[key] = load_examples(path, stage, config, skip_broken, print, tokenizer)
        examples[number] = loaded[key]
    return examples


def load_validation(data: DataConfig, stage: StageConfig, config: Config) -> list[Example]:
    """The examples to validate on. If there is no such manifest, none, and a line that says so."""
    folder = data.path if data.path.is_dir() else data.path.parent
    path = data.validation or folder / "validation.json"
    if not data.validation and not path.exists():
        print(f"no {path}: nothing will be measured")
        return []
    return load_examples(path, stage, config, data.skip_broken, print)


def what_is_cut(data: list[Example], stage: StageConfig, config: Config, tokenizer: Tokenizer
                ) -> str:
    """Which examples cannot be learnt whole, in one line; empty if all can."""
    limit, seconds, length = stage.max_tokens, config.audio.max_seconds, config.decode.gen_length
    long_texts, long_clips, long_answers = [], [], []
    count, system = cache(lambda text: len(tokenizer.encode(text))), config.text.train_system
    for example in data:
        name = example.path.name
        answers = [example.answer] + [example.rejected] * stage.preference
        if may_exceed(limit, system, example.instruction, *answers):
            n_prompt = len(tokenizer.prompt(system, example.instruction).ids)
            if n_prompt + max(map(count, answers)) + 1 > limit:  # 1 for `<|eot_id|>`
                long_texts.append(name)
        if example.seconds > seconds:
            long_clips.append(name)
        if count(example.answer) > length:
            long_answers.append(name)
    found = {f"with text beyond {limit:,} tokens, which is cut": long_texts,
             f"with a clip beyond the {seconds} s that the model takes": long_clips,
             f"with an answer beyond the {length:,} tokens that it writes": long_answers}
    return "; ".join(f"{len(names):,} {what} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
                     for what, names in found.items() if names)
