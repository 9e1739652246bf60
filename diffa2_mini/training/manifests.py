"""The data of a run: which manifests, and their examples."""

from dataclasses import dataclass
from pathlib import Path

from ..config import SIZES, Config, StageConfig
from ..data import Example, load_examples
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
