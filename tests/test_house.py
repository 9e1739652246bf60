"""The house keeps its shape: data flowing one way, no packages but those promised."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["ranges", "script", "config", "noise",
         "device", "parallel", "audio", "tokenizer", "whisper", "adapters", "llada", "lora", "diffusion", "vrpo", "model",
         "decode", "data", "loader", "faults", "checkpoint", "ears", "objective", "weights", "command", "scoring", "benchmarks",
         "answers", "reporting", "evaluate"]  # a file imports only what stands before it
MACHINERY = {"ears", "objective", "command", "answers", "evaluate"}  # may import fast/
BESIDE = ["options", "plan", "show", "page", "pretrain_tokenizer", "pretrain_encoder", "pretrain", "autoregressive", "bench", "bench_size"]
FILES = [path for path in ROOT.rglob("*.py") if not {".venv", "build"} & set(path.relative_to(ROOT).parts)]
PACKAGES = {"torch", "numpy", "tiktoken", "regex", "safetensors", "soundfile", "tqdm", "matplotlib", "pytest", "selenium"}
OURS = {"diffa2_mini", "data", "tutorials", "train", "sample", "golden_inputs", "check_published", "hostile_cases", "common",
        "test_published", "test_data", "test_generate", "test_faults", "test_interrupted",
        "test_weights", "mini", "mac"}


def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports; of its own package the names of the rooms, with a dot before."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {f".{node.module}"} if node.module else {f".{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_every_file_of_the_package_has_its_place():
    names = {path.stem for path in (ROOT / "diffa2_mini").glob("*.py")}
    assert names == {*ROOMS, *BESIDE, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_stands_before_it(room):
    before = {f".{name}" for name in ROOMS[:ROOMS.index(room)]}
    names = {name for name in imported(ROOT / "diffa2_mini" / f"{room}.py") if name.startswith(".")}
    fast = {name for name in names if name.startswith(".fast.")}
    assert names - fast <= before and (not fast or room in MACHINERY)


def test_nothing_is_needed_at_run_time_but_what_is_promised():
    import sys
    by_hand = {"make_golden.py", "check_published.py"}  # these need the extra `reference`
    names = set().union(*(imported(path) for path in FILES if path.name not in by_hand))
    assert {n for n in names if not n.startswith(".")} - set(sys.stdlib_module_names) - OURS <= PACKAGES


def test_the_readme_names_every_file_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"{name}.py" in text for name in ROOMS + BESIDE)


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"(pip install -r requirements.txt) && python -m pytest -q", readme)
    assert "pip install -q -r requirements.txt && python -m pytest -q" in (ROOT / ".ci" / "run").read_text() and command
