"""The house keeps its shape, where ruff cannot see to it: imports point one way, the core stays
small, functions stay short, and each module has its tests."""

import ast
import re
import sys
from pathlib import Path

import pytest
from mini import FILES, ROOT

PACKAGE = ROOT / "diffa2_mini"
TOP = ["errors", "ranges", "config", "noise", "audio", "whisper", "adapters", "tokenizer", "llada",
       "lora", "quantize", "model", "diffusion", "vrpo", "decode", "data", "weights",
       "listen"]  # the order of reading
FOLDERS = ["fast", "published", "command", "training", "evaluate", "view", "bench"]
# at most, and what came to them: quantising, real recordings, caches that are used again, a
# microphone, decoding in fewer steps and its table, pairs ranked by more samples, pairs that are
# masked wholly, recorded blocks in 8 bits and compiled, a table of what a GPU does with each kind,
# what is wrong with samples in memory, with printing, with held-out clips and with flags that
# change nothing; pytest -s prints them
TOP_LINES = 2_300 + 185 + 9 + 11 + 8
ALL_LINES = 6_300 + 446 + 56 + 190 + 11 + 15 + 34 + 72 + 51
FUNCTION_LINES, LOOP_LINES = 40, 70  # at most; the second in train.py
TESTED_BY = {  # a folder or module without a test file of its name: the file that tests it
    "bench": "bench", "command/flags": "sample", "data/corpus": "librispeech",
    "data/pretraining/recall": "backbone", "data/pretraining/stage0": "train",
    "data/toy_scene": "toy_sound",
    "data/toy_speech": "toy_sound", "data/toy_text": "toy", "errors": "script",
    "evaluate/__main__": "evaluate", "fast/compiling": "device", "fast/measure": "bench",
    "fast/state": "model", "published": "published", "training/folder": "files",
    "training/manifests": "manifest", "training/random_weights": "loading",
    "training/run": "train",
    "training/model_source": "listen", "view/curves": "files"}
PACKAGES = {"torch", "numpy", "tiktoken", "regex", "safetensors", "soundfile", "tqdm", "matplotlib",
            "pytest", "selenium", "sounddevice"}


def imported(path: Path) -> set[str]:
    """What a file imports: top-level names of packages; of its own, dotted names below the package
    with a dot before. What it imports only where it runs as a command is passed over."""
    found, home = set(), path.relative_to(PACKAGE).parts[:-1] if PACKAGE in path.parents else ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body
                 if not ast.unparse(node).startswith("if __name__ == '__main__':")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*home[:len(home) + 1 - node.level], *(node.module or "").split(".")]
            base = [part for part in base if part]
            is_module = PACKAGE.joinpath(*base).with_suffix(".py").is_file()
            found |= {"." + ".".join(base)} if is_module else {
                "." + ".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def own_imports(path: Path) -> list[str]:
    return sorted(name[1:] for name in imported(path) if name.startswith("."))


def test_every_file_and_folder_of_the_package_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*TOP, "__init__"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == {*FOLDERS}


@pytest.mark.parametrize("name", TOP)
def test_a_concept_imports_concepts_that_stand_before_it_and_no_folder(name):
    allowed = TOP[:TOP.index(name)]
    if name == "listen":  # which puts everything together
        allowed += [*FOLDERS[:2], "training"]
    assert not {own.split(".")[0] for own in own_imports(PACKAGE / f"{name}.py")} - {*allowed}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_concepts_and_folders_below_it(folder):
    for path in sorted((PACKAGE / folder).glob("*.py")):
        mine = f"{folder}.{path.stem}"
        for other in own_imports(path):
            there = other.split(".")[0]
            assert there in TOP + FOLDERS[:FOLDERS.index(folder) + 1], f"{mine} imports {other}"


def test_the_package_imports_nothing_that_a_clone_alone_has():
    for path in PACKAGE.rglob("*.py"):
        assert not imported(path) & {"data", "train", "sample", "tests", "tutorials"}, path


def test_what_makes_data_imports_the_package_alone():
    for path in (ROOT / "data").rglob("*.py"):
        assert not imported(path) & {"train", "sample", "tests", "tutorials"}, path


def test_nothing_is_needed_at_run_time_but_what_is_promised():
    by_hand = {"make_golden.py", "check_published.py"}  # these need the extra `reference`
    names = set().union(*(imported(path) for path in FILES if path.name not in by_hand))
    ours = {path.stem for path in FILES} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    outside = {name for name in names if not name.startswith(".")}
    assert outside - set(sys.stdlib_module_names) - ours <= PACKAGES


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_core_and_the_package_stay_small():
    top, all_of_it = (sum(map(lines, PACKAGE.glob(name))) for name in ("*.py", "**/*.py"))
    print(f"{top:,} lines at the package's top, {all_of_it:,} in the package")
    assert top <= TOP_LINES and all_of_it <= ALL_LINES


def test_functions_are_short():
    long = set()
    for path in FILES:
        where = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).as_posix()
        most = LOOP_LINES if where == "train.py" else FUNCTION_LINES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not where.startswith("tests/"):
                if node.end_lineno - node.lineno + 1 > most:
                    long.add(f"{where} {node.name}")
    assert not long


def test_each_module_has_its_tests():
    tests = {path.stem.removeprefix("test_") for path in ROOT.glob("tests/test_*.py")}
    assert {*TESTED_BY.values()} <= tests
    homes = {PACKAGE: PACKAGE, ROOT / "data": ROOT}  # folders, and what names are relative to
    assert all(any((home / name).is_dir() or (home / f"{name}.py").is_file()
                   for home in homes.values()) for name in TESTED_BY)
    for folder, home in homes.items():
        for path in folder.rglob("*.py"):
            name = path.relative_to(home).with_suffix("").as_posix()
            if path.stem != "__init__" and not {name, path.parent.name} & {*TESTED_BY}:
                names = {path.stem, f"{path.parent.name}_{path.stem}"}
                assert names & tests, f"{name} has no test file"


def test_the_readme_names_each_file_at_the_packages_top():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in TOP if f"{name}.py" not in text]


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"(pip install -r requirements.txt) && python -m pytest -q", readme)
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -r requirements.txt && python -m pytest -q" in run and command
