"""Run the chapters. What they print and draw comes from here, and so cannot rot.

    python tutorials/build.py               # run every chapter and compare, look for dead links
    python tutorials/build.py 4 6           # these chapters
    python tutorials/build.py 4 --write     # write what its cells print, and its pictures
    python tutorials/build.py 4 --notebook  # run nothing: make a notebook of it, beside it

A chapter is Markdown, tutorials/NN_name.md. Its code stands in fences that start with ```python and
runs from top to bottom in one fresh process; what a cell prints follows it in a fence that starts
with ```text. An exercise has three cells, in this order:

    ```python tags=["starter"]     what the student begins with: the check must fail after it
    ```python tags=["check"]       asserts; what it prints after the solution follows it
    ```python tags=["solution"]    the check must pass after it

A number in an output may differ from the one in the text by 1 %, or by one and a half units of its
last printed digit where that is more; whole numbers must be the same. The fence may say otherwise:
```text tolerance=0.1 allows 10 %, of whole numbers too; ```text tolerance=any lets numbers be what
they like, for times. So a cell should compute from nothing that changes for other reasons, as a
README does.
"""

import sys
from pathlib import Path

REPOSITORY = None  # its address, https://github.com/OWNER/NAME, where it is published
FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import json
import os
import posixpath
import re
import subprocess
import tempfile
import textwrap
import time
from dataclasses import dataclass

from diffa2_mini.command.script import Parser
from diffa2_mini.errors import UserError, require

CELL = re.compile(
    r'^```python(?: tags=\["(?P<tag>\w+)"\])?\n(?P<code>.*?)^```\n'
    r'(?:\n```text(?P<fence>[^\n]*)\n(?P<output>.*?)^```\n)?', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
OPEN = "Open this chapter in a hosted notebook"
FETCH = """import os
if not os.path.exists("common.py"):
    !git clone -q --depth 1 {} repository
    !pip install -q -r repository/requirements.txt
    %cd -q repository/tutorials
"""
MARK = "<<< cell {} >>>"
SECONDS = 900  # that a chapter may take before it is stopped
ALL_SECONDS = 480  # of a core, that all of them may take together


@dataclass
class Cell:
    code: str
    tag: str  # starter, check, solution or nothing
    fence: str
    output: str
    start: int  # of the cell in the chapter's text
    stop: int


def cells_of(text: str) -> list[Cell]:
    """The code cells of a chapter, with what they are said to print."""
    return [
        Cell(m["code"], m["tag"] or "", m["fence"] or "", m["output"] or "", *m.span())
        for m in CELL.finditer(text)]


def script(cells: list[Cell]) -> str:
    """A program that runs the cells in order and marks where each one's output begins. A check runs
    twice: after its starter, where it must fail, and after its solution."""
    tags = [cell.tag for cell in cells if cell.tag]
    require(tags == ["starter", "check", "solution"] * (len(tags) // 3),
            f"expected starter, check, solution in this order, got {tags}")
    parts = []
    for i, cell in enumerate(cells):
        if cell.tag == "check":
            continue
        if cell.tag == "starter":
            tried = textwrap.indent(cell.code + cells[i + 1].code, "    ")
            parts.append(
                f"print({MARK.format(i)!r})\ntry:\n{tried}\nexcept Exception:\n    pass\nelse:\n"
                "    raise SystemExit("
                "'the check of an exercise passes before the exercise is done')\n")
        else:
            parts.append(f"print({MARK.format(i)!r})\n{cell.code}")
        if cell.tag == "solution":
            parts.append(f"print({MARK.format(i - 1)!r})\n{cells[i - 1].code}")
    return "\n".join(parts)


def run(path: Path, pictures: Path | None = None) -> list[str]:
    """What each cell of a chapter prints, in a fresh process. Its pictures go to the folder
    `pictures`, or are thrown away. Raises UserError if the chapter does not run to its end."""
    cells = cells_of(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / f"{path.stem}.py"
        program.write_text("import sys\nsys.path.insert(0, '.')\n" + script(cells),
                           encoding="utf-8")
        try:
            done = subprocess.run([sys.executable, "-X", "utf8", str(program)], cwd=path.parent,
                                  capture_output=True, encoding="utf-8", timeout=SECONDS,
                                  env={**os.environ, "TUTORIAL_PICTURES": str(pictures or folder)})
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{path.name}: expected to run to its end within {SECONDS} seconds, got no end"
            ) from None
    require(
        done.returncode == 0,
        f"{path.name}: expected to run to its end, got:\n{done.stdout[-500:]}{done.stderr[-3000:]}")
    outputs = [""] * len(cells)
    pieces = re.split(r"^<<< cell (\d+) >>>\n", done.stdout, flags=re.MULTILINE)
    for number, output in zip(pieces[1::2], pieces[2::2]):
        outputs[int(number)] = "" if cells[int(number)].tag == "starter" else output
    return outputs


def with_outputs(text: str, outputs: list[str]) -> str:
    """The chapter's text with these outputs after its cells."""
    for cell, output in reversed([*zip(cells_of(text), outputs)]):
        tag = f' tags=["{cell.tag}"]' if cell.tag else ""
        printed = f"\n```text{cell.fence}\n{output}```\n" if output else ""
        text = f"{text[:cell.start]}```python{tag}\n{cell.code}```\n{printed}{text[cell.stop:]}"
    return text


def with_link(text: str, name: str, repository: str | None) -> str:
    """The chapter's text with a link below its title that opens its notebook in Colab, where
    the repository's address is known, and without one where it is not."""
    title, rest = re.sub(rf"^\[{OPEN}\].*\n\n", "", text, flags=re.MULTILINE).split("\n", 1)
    if not repository:
        return f"{title}\n{rest}"
    there = repository.replace("https://github.com", "https://colab.research.google.com/github")
    return f"{title}\n[{OPEN}]({there}/blob/main/tutorials/notebooks/{name}.ipynb)\n\n{rest}"


def notebook(text: str) -> dict:
    """The chapter as a Jupyter notebook, with its outputs. Solutions are folded, and after a
    check that fails "run all" goes on."""
    def prose(piece: str) -> list[dict]:
        piece = {"cell_type": "markdown", "metadata": {}, "source": piece.strip()}
        return [piece] if piece["source"] else []

    made, at = [], 0
    for cell in cells_of(text):
        made += prose(text[at:cell.start])
        made.append(code_cell(cell.code, cell.tag, cell.output))
        at = cell.stop
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 4, "cells": made + prose(text[at:]),
            "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}}


def code_cell(code: str, tag: str = "", output: str = "") -> dict:
    """A cell of a notebook, from a cell of a chapter."""
    metadata = {"tags": [tag]} if tag else {}
    if tag == "check":
        metadata["tags"].append("raises-exception")
    if tag == "solution":  # folded by Jupyter, and by Colab, which shows the title
        metadata.update(jupyter={"source_hidden": True}, cellView="form")
        code = f"# @title Solution\n{code}"
    printed = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
    return {"cell_type": "code", "metadata": metadata, "execution_count": None,
            "outputs": printed, "source": code.rstrip("\n")}


def hosted_notebook(text: str, repository: str) -> dict:
    """The chapter as a notebook that runs elsewhere: it fetches the repository first, and its
    links and pictures lead there."""
    def absolute(link: re.Match) -> str:
        target = link[1] or link[2]
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        path = posixpath.normpath(f"tutorials/{target}")
        form = "raw" if path.endswith((".svg", ".png")) else "blob"
        before, _, after = link[0].rpartition(target)
        return f"{before}{repository}/{form}/main/{path}{after}"

    made = notebook(with_link(text, "", None))
    for cell in made["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = LINK.sub(absolute, cell["source"])
    made["cells"].insert(1, code_cell(FETCH.format(repository)))
    return made


def agree(said: str, printed: str, fence: str) -> bool:
    """Is an output what the text says, but for numbers within the tolerance?"""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", printed).split():
        return False
    stated = re.search(r"tolerance=(\S+)", fence)
    if stated and stated[1] == "any":
        return True
    relative = float(stated[1]) if stated else None
    return all(near(ours, theirs, relative)
               for ours, theirs in zip(NUMBER.findall(said), NUMBER.findall(printed)))


def near(ours: str, theirs: str, relative: float | None) -> bool:
    """Are two numbers, as they are written, the same within the tolerance?"""
    a, b = (float(number.replace(",", "").rstrip(".")) for number in (ours, theirs))
    has_exponent = "e" in ours + theirs
    whole = "." not in ours + theirs and not has_exponent
    if relative is None:
        relative = 0.0 if whole else 0.01
    units = 0.0
    if not whole and not has_exponent:
        n_digits = max(len(number.partition(".")[2]) for number in (ours, theirs))
        units = 1.5 * 10.0**-n_digits
    return abs(a - b) <= max(relative * max(abs(a), abs(b)), units)


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to a text's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL),
                          re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> list[str]:
    """Relative links and pictures of a text that lead nowhere."""
    text, dead = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL), []
    for target in (one or other for one, other in LINK.findall(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        if not there.exists() or anchor and there.suffix == ".md" and anchor not in slugs(
                there.read_text(encoding="utf-8")):
            dead.append(target)
    return dead


def check(path: Path) -> None:
    """Raise UserError if the chapter has dead links, or prints anything but what its text says.
    Writes nothing."""
    dead = dead_links(path)  # first: a picture that only a run would make is missing
    require(not dead, f"{path.name}: expected links that lead somewhere, got {', '.join(dead)}")
    text = path.read_text(encoding="utf-8")
    require(with_link(text, path.stem, REPOSITORY) == text,
            f"{path.name}: expected a link to a hosted notebook where the repository has an "
            f"address, and only there; REPOSITORY in build.py is {REPOSITORY}")
    for cell, printed in zip(cells_of(text), run(path)):
        require(agree(cell.output, printed, cell.fence),
                f"{path.name}: expected\n{cell.output}\ngot\n{printed}\nfrom\n{cell.code}\n"
                f"to write what it prints: python tutorials/build.py {int(path.name[:2])} --write")


def write(path: Path) -> None:
    """Write what the chapter's cells print into it, and its pictures; where the repository has an
    address, the link to its hosted notebook, and that notebook too."""
    outputs = run(path, path.parent / "pictures")
    text = with_outputs(path.read_text(encoding="utf-8"), outputs)
    path.write_text(with_link(text, path.stem, REPOSITORY), encoding="utf-8")
    if REPOSITORY:
        (path.parent / "notebooks").mkdir(exist_ok=True)
        save(hosted_notebook(text, REPOSITORY), path.parent / "notebooks" / f"{path.stem}.ipynb")


def save(made: dict, path: Path) -> None:
    """Write a notebook, as JSON."""
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def chapters(numbers: list[int] | None = None) -> list[Path]:
    """The chapters with these numbers, or all, in order."""
    paths = sorted(FOLDER.glob("[0-9][0-9]_*.md"))
    there = {int(path.name[:2]) for path in paths}
    require(there >= {*(numbers or ())}, f"expected numbers of chapters, got {numbers}")
    return [path for path in paths if not numbers or int(path.name[:2]) in numbers]


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of chapters (default: all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="write instead of comparing")
    how.add_argument("--notebook", action="store_true", help="make a notebook, and run nothing")
    args = parser.parse_args(argv)
    if args.notebook:
        for path in chapters(args.numbers) + [FOLDER / "hosted.md"] * (not args.numbers):
            save(notebook(path.read_text(encoding="utf-8")), path.with_suffix(".ipynb"))
            print(path.with_suffix(".ipynb"))
        return
    work = write if args.write else check
    wrong, began = [], time.perf_counter()
    for path in chapters(args.numbers):
        start = time.perf_counter()
        try:
            work(path)
            print(f"{path.name}: done in {time.perf_counter() - start:.0f} s")
        except UserError as error:
            wrong.append(path.name)
            print(error)
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s in all; all chapters together may take {ALL_SECONDS}")
    require(not wrong, f"expected every chapter to run as it says, got {len(wrong)} that do not: "
            f"{', '.join(wrong)}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
