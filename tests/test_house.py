"""The house keeps its shape: imports point one way, and no packages but those promised."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffa2_mini"
TOP = ["errors", "ranges", "config", "noise", "audio", "whisper", "adapters", "tokenizer", "llada",
       "lora", "model", "diffusion", "vrpo", "decode", "data", "weights"]  # the order of reading
FOLDERS = ["command", "fast", "training", "evaluate", "pretraining", "view", "bench"]
KNOTS = {("weights", "training.checkpoint"), ("weights", "training.files"),
         ("weights", "command.script"), ("command.flags", "fast"),
         ("command.flags", "training")}
FILES = [path for path in ROOT.rglob("*.py")
         if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]
PACKAGES = {"torch", "numpy", "tiktoken", "regex", "safetensors", "soundfile", "tqdm", "matplotlib",
            "pytest", "selenium"}


def imported(path: Path) -> set[str]:
    """What a file imports: top-level names of packages; of its own, dotted names below the package
    with a dot before."""
    found, home = set(), path.relative_to(PACKAGE).parts[:-1] if PACKAGE in path.parents else ()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    wrong = [other for other in own_imports(PACKAGE / f"{name}.py")
             if other not in TOP[:TOP.index(name)] and (name, other) not in KNOTS]
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_concepts_and_folders_below_it(folder):
    for path in sorted((PACKAGE / folder).glob("*.py")):
        mine = f"{folder}.{path.stem}"
        for other in own_imports(path):
            there = other.split(".")[0]
            below = there in TOP or there in FOLDERS[:FOLDERS.index(folder) + 1]
            assert below or {(mine, other), (mine, there)} & KNOTS, f"{mine} imports {other}"


def test_nothing_is_needed_at_run_time_but_what_is_promised():
    by_hand = {"make_golden.py", "check_published.py"}  # these need the extra `reference`
    names = set().union(*(imported(path) for path in FILES if path.name not in by_hand))
    ours = {path.stem for path in FILES} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    outside = {name for name in names if not name.startswith(".")}
    assert outside - set(sys.stdlib_module_names) - ours <= PACKAGES


def test_the_readme_names_each_file_at_the_packages_top():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [name for name in TOP if f"{name}.py" not in text]


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"(pip install -r requirements.txt) && python -m pytest -q", readme)
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -q -r requirements.txt && python -m pytest -q" in run and command
