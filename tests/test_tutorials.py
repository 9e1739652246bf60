"""The chapters run, print what their text says, and link to what is there; and the script that sees
to it would notice."""

import html
import json
import re
import sys

import pytest

from diffa2_mini.errors import UserError
from tutorials import build

CHAPTER = """# 0 · A chapter

[a link](build.py) and [a heading](#its-heading)

```python
print(1 + 1, "is about", 2.001)
```

```text
2 is about 2.000
```

## Its heading

```python tags=["starter"]
def double(x):
    raise NotImplementedError
```

```python tags=["check"]
assert double(2) == 4, "twice two is four"
print("right")
```

```text
right
```

```python tags=["solution"]
def double(x):
    return 2 * x
```
"""


MAKES_A_PICTURE = """
```python
import os
open(os.environ["TUTORIAL_PICTURES"] + "/made.svg", "w").close()
```

![a picture](pictures/made.svg)
"""


@pytest.fixture
def chapter(tmp_path):
    (tmp_path / "build.py").touch()
    path = tmp_path / "00_chapter.md"
    path.write_text(CHAPTER)
    return path


def test_a_chapter_that_does_what_it_says_passes_and_is_written_as_it_is(chapter):
    build.check(chapter)
    assert build.with_outputs(CHAPTER, build.run(chapter)) == CHAPTER.replace("2.000", "2.001")


@pytest.mark.parametrize("changed, complaint", [
    (CHAPTER.replace("2 is about", "3 is about"), "got\n2 is about"),
    (CHAPTER.replace("2.000", "2.1"), "got\n2 is about"),
    (CHAPTER.replace("is about 2.000", "was about 2.000"), "got\n2 is about"),
    (CHAPTER.replace("return 2 * x", "return 3 * x"), "twice two is four"),
    (CHAPTER.replace("    raise NotImplementedError",
                     "    return 4"), "passes before the exercise is done"),
    (CHAPTER.replace("```text\nright\n```\n\n", ""), "got\nright"),
    (CHAPTER.replace('tags=["starter"]', 'tags=["check"]', 1), "in this order"),
    (CHAPTER.replace("(build.py)", "(gone.py)"), "gone.py"),
    (CHAPTER.replace("#its-heading", "#no-heading"), "#no-heading"),
    (CHAPTER + "\n![a picture](pictures/gone.svg)\n", "pictures/gone.svg"),
    (CHAPTER.replace("print(1 + 1", "print(1 / 0"), "ZeroDivisionError"),
])
def test_what_is_not_so_is_noticed(chapter, changed, complaint):
    chapter.write_text(changed)
    with pytest.raises(UserError, match=re.escape(complaint)):
        build.check(chapter)


def test_a_check_writes_nothing(chapter):
    chapter.write_text(CHAPTER + MAKES_A_PICTURE)
    (chapter.parent / "pictures").mkdir()
    (chapter.parent / "pictures" / "made.svg").write_text("as it was")
    before = {path: path.read_bytes() for path in chapter.parent.rglob("*") if path.is_file()}
    build.check(chapter)
    assert {path: path.read_bytes()
            for path in chapter.parent.rglob("*")
            if path.is_file()} == before
    build.run(chapter, chapter.parent / "pictures")
    assert (chapter.parent / "pictures" / "made.svg").read_text() == ""


def test_the_command_checks_and_writes_only_when_told(chapter, monkeypatch, capsys):
    monkeypatch.setattr(build, "FOLDER", chapter.parent)
    wrong = CHAPTER.replace("2.000", "2.1")
    chapter.write_text(wrong)
    with pytest.raises(UserError, match="got 1 that do not: 00_chapter.md"):
        build.main(["0"])
    assert "python tutorials/build.py 0 --write" in capsys.readouterr().out
    assert chapter.read_text() == wrong
    build.main(["0", "--write"])
    assert chapter.read_text() == CHAPTER.replace("2.000", "2.001")
    build.main([])
    with pytest.raises(UserError, match=r"expected numbers of chapters, got \[7\]"):
        build.main(["7"])


def cells_by_type(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_a_notebook_has_the_chapters_cells_and_outputs_and_folds_solutions(chapter, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", chapter.parent)
    build.main(["0", "--notebook"])
    assert chapter.read_text() == CHAPTER
    made = json.loads(chapter.with_suffix(".ipynb").read_text(encoding="utf-8"))
    assert made["nbformat"] == 4
    first, starter, check, solution = cells_by_type(made, "code")
    assert first["source"] == 'print(1 + 1, "is about", 2.001)' and not first["metadata"]
    assert first["outputs"][0]["text"] == "2 is about 2.000\n"
    assert starter["metadata"] == {"tags": ["starter"]} and not starter["outputs"]
    assert check["metadata"]["tags"] == ["check", "raises-exception"]
    assert solution["metadata"]["jupyter"] == {"source_hidden": True}
    text = "\n".join(cell["source"] for cell in cells_by_type(made, "markdown"))
    assert "a link" in text and "2 is about" not in text


@pytest.mark.parametrize("path", build.chapters(), ids=lambda path: path.stem)
def test_a_chapters_notebook_loses_nothing(path):
    text = path.read_text(encoding="utf-8")
    made = build.notebook(text)
    code = [cell["source"].removeprefix("# @title Solution\n") + "\n"
            for cell in cells_by_type(made, "code")]
    assert code == [cell.code for cell in build.cells_of(text)]
    shown = "".join(cell["source"] for cell in cells_by_type(made, "markdown"))
    assert "".join(shown.split()) == "".join(build.CELL.sub("", text).split())


def test_no_link_to_a_hosted_notebook_where_the_repository_has_no_address(chapter, monkeypatch):
    monkeypatch.setattr(build, "REPOSITORY", None)
    build.write(chapter)
    assert chapter.read_text() == CHAPTER.replace("2.000", "2.001")
    assert not (chapter.parent / "notebooks").exists()


def test_a_link_opens_a_hosted_notebook_where_the_repository_has_an_address(chapter, monkeypatch):
    monkeypatch.setattr(build, "REPOSITORY", "https://github.com/me/mine")
    chapter.write_text(CHAPTER + "\n![a picture](build.py)\n")
    with pytest.raises(UserError, match="expected a link to a hosted notebook"):
        build.check(chapter)
    build.write(chapter)
    build.write(chapter)  # and only one link
    title, link, *_ = chapter.read_text().splitlines()
    assert title == "# 0 · A chapter" and chapter.read_text().count("colab") == 1
    page = "https://colab.research.google.com/github/me/mine/blob/main/tutorials/notebooks/"
    assert link == f"[{build.OPEN}]({page}00_chapter.ipynb)"
    build.check(chapter)
    made = json.loads((chapter.parent / "notebooks" / "00_chapter.ipynb").read_text())
    assert "git clone -q --depth 1 https://github.com/me/mine" in made["cells"][1]["source"]
    text = made["cells"][0]["source"]
    assert "[a link](https://github.com/me/mine/blob/main/tutorials/build.py)" in text
    assert "(#its-heading)" in text and "colab" not in text
    monkeypatch.setattr(build, "REPOSITORY", None)
    with pytest.raises(UserError, match="and only there"):
        build.check(chapter)


def test_pictures_go_where_build_says_or_below_the_cell_and_never_to_a_tracked_file(
        tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="chapters draw with matplotlib")
    from tutorials import common

    def draw():
        with common.picture("made") as axes:
            axes.plot([0, 1])

    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setenv("TUTORIAL_PICTURES", str(tmp_path / "told"))
    draw()
    assert [path.name for path in tmp_path.rglob("*.svg")] == ["made.svg"]
    monkeypatch.delenv("TUTORIAL_PICTURES")
    draw()
    assert f"picture: {tmp_path / 'runs' / 'pictures' / 'made.svg'}\n" == capsys.readouterr().out
    assert "/runs/" in (ROOT / ".gitignore").read_text().splitlines()
    displayed = []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("builtins.display", displayed.append, raising=False)
    draw()
    assert "<svg" in displayed[0]._repr_svg_() and len([*tmp_path.rglob("*.svg")]) == 2


def test_a_picture_that_only_the_run_would_make_is_missing(chapter):
    chapter.write_text(CHAPTER + MAKES_A_PICTURE)
    with pytest.raises(UserError, match="pictures/made.svg"):
        build.check(chapter)
    assert not (chapter.parent / "pictures").exists()


def test_a_chapter_that_does_not_end_is_stopped_and_said_in_one_line(chapter, monkeypatch):
    monkeypatch.setattr(build, "SECONDS", 0.5)
    chapter.write_text("```python\nwhile True:\n    pass\n```\n")
    with pytest.raises(
            UserError,
            match="^00_chapter.md: expected to run to its end within 0.5 seconds, got no end$"):
        build.check(chapter)


@pytest.mark.parametrize(
    "said, printed, fence, same", [("loss 0.10", "loss 0.11", "", True),
                                   ("loss 1.00", "loss 1.02", "", False),
                                   ("loss 1.00", "loss 1.02", " tolerance=0.1", True),
                                   ("loss 100.0", "loss 101.0", "", True),
                                   ("loss 100.0", "loss 101.1", "", False),
                                   ("loss 100", "loss 99", " tolerance=0.1", True),
                                   ("took 3 s", "took 9 s", "", False),
                                   ("took 3 s", "took 9 s", " tolerance=any", True),
                                   ("1e-7", "1.5e-7", "", False),
                                   ("2,810 clips", "2,811 clips", "", False),
                                   ("-0.5", "0.5", "", False), ("a b", "a  b", "", True),
                                   ("a b", "a c", "", False)])
def test_numbers_agree_within_the_tolerance_that_is_stated(said, printed, fence, same):
    assert build.agree(said, printed, fence) == same


def test_every_chapter_has_what_a_chapter_needs():
    for path in build.chapters():
        text = path.read_text(encoding="utf-8")
        tags = [cell.tag for cell in build.cells_of(text) if cell.tag]
        assert tags == ["starter", "check", "solution"] * (len(tags) // 3), path.name
        assert 3 <= len(tags) <= 9, path.name
        assert "![" in text and "**You will be able to**" in text and "**Time:**" in text, path.name
        summary = re.search(r"^## Summary\n(.*?)^## Read on", text, re.MULTILINE | re.DOTALL)[1]
        assert len(re.findall(r"^(?:- |\d\. )", summary, re.MULTILINE)) == 5, path.name
        assert path == build.chapters()[-1] or re.search(
            rf"^Next: \[{int(path.name[:2]) + 1} · ", text, re.MULTILINE), path.name
        assert text.count("<details>") == text.count("</details>") == len(tags) // 3, path.name


ROOT = build.FOLDER.parent
TEXTS = [ROOT / "README.md", ROOT / "data" / "README.md",
         *(build.FOLDER / name for name in ("LOG.md", "hosted.md")),
         *sorted(build.FOLDER.glob("reference/*.md")), *build.chapters()]
FILE = re.compile(r"\b(?:diffa2_mini|data|tests|tutorials)/[\w/]+\.(?:py|md|bpe|safetensors)")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_text_links_to_or_names_is_there(path):
    assert not build.dead_links(path)
    text = path.read_text(encoding="utf-8")
    assert not [name for name in FILE.findall(text) if not (ROOT / name).exists()]


def test_the_readme_is_short_and_its_results_stand_in_the_pages_it_links_to():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1000
    results = re.findall(r"^- \*\*(.*)\(\[\w+\]\((.*?\.md).*$", text, re.MULTILINE)
    assert len(results) == 5
    for result, page in results:
        there = (ROOT / page).read_text(encoding="utf-8")
        numbers = re.findall(r"\d[\d,.]*\d", result)  # those of the claims are counted, see there
        assert page.endswith("claims.md") or not [each for each in numbers if each not in there]


def test_the_readme_and_chapter_0_link_to_every_chapter_and_to_the_notation():
    first = build.chapters()[0]
    for text, folder in ((ROOT / "README.md", "tutorials/"), (first, "")):
        links = {one for one, _ in build.LINK.findall(text.read_text(encoding="utf-8"))}
        wanted = {f"{folder}{path.name}" for path in build.chapters()}
        wanted |= {f"{folder}reference/notation.md"}
        assert wanted - links <= {first.name}, text.name


def test_chapter_0_says_how_to_install():
    text = build.chapters()[0].read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    assert f"git clone {build.REPOSITORY or 'ADDRESS'} " in text
    assert f"Python {python} or newer" in text
    assert "pip install torch --index-url https://download.pytorch.org/whl/cpu" in text


def prose(text):
    """A chapter without its code."""
    return re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_the_chapters_say_how_long_they_take_and_fit_in_8_minutes():
    texts = [path.read_text(encoding="utf-8") for path in build.chapters()]
    found = [
        re.search(r"\*\*Time:\*\* about \d+ minutes to read, (\d+) seconds to run", text)
        for text in texts]
    assert all(found), [
        path.name for path, said in zip(build.chapters(), found) if not said]
    assert sum(int(said[1]) for said in found) <= build.ALL_SECONDS


@pytest.mark.parametrize("path", build.chapters(), ids=lambda path: path.stem)
def test_github_shows_the_mathematics_as_it_is_meant(path):
    text = prose(path.read_text(encoding="utf-8"))
    math = [
        block or line for block, line in re.findall(r"\$\$(.+?)\$\$|\$([^$]+)\$", text, re.DOTALL)]
    assert text.count("$") % 2 == 0
    lost = [found for part in math for found in re.findall(r"\\[^A-Za-z]", part)]
    assert not lost, f"GitHub takes the backslash off {lost} in mathematics"
    for block in re.finditer(r"\$\$.+?\$\$", text, re.DOTALL):
        around = text[:block.start()][-2:], text[block.end():][:2]
        assert around == ("\n\n", "\n\n"), f"no blank line before and after {block[0]}"


def formulas(text):
    return re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_formula_survives_githubs_markdown(path):
    cmarkgfm = pytest.importorskip("cmarkgfm", reason="cmarkgfm renders Markdown as GitHub does")
    text = path.read_text(encoding="utf-8")
    page = cmarkgfm.github_flavored_markdown_to_html(text)
    page = re.sub(r"<pre.*?</pre>|<code>.*?</code>", "", page, flags=re.DOTALL)
    shown = formulas(html.unescape(re.sub(r"<[^>]+>", "", page)))
    for meant, found in zip(formulas(prose(text)), shown):
        assert meant == found, "where _ begins emphasis, a space after it cures that"
    assert len(shown) == len(formulas(prose(text)))


ARXIV = re.compile(r"(?:arXiv |arxiv.org/abs/)(\d{4}\.\d{5})")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_mention_of_a_paper_is_a_link_to_it(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for number in {*ARXIV.findall(text)}:
        link = re.search(rf"\[[^\]]*\]\(https://arxiv\.org/abs/{number}\)", text)
        assert link and link.start() <= text.index(number) < link.end(), number


@pytest.mark.parametrize("path", [*build.chapters(), build.FOLDER / "hosted.md"],
                         ids=lambda path: path.stem)
def test_lines_of_code_are_at_most_90_columns(path):
    fences = re.findall(r"^```([^\n]*)\n(.*?)^```$", path.read_text(encoding="utf-8"),
                        re.MULTILINE | re.DOTALL)
    assert not [line for kind, code in fences if not kind.startswith("text")
                for line in code.splitlines() if len(line) > 90]


took = {}  # seconds of a core, of each chapter: other work on the machine does not change them


def seconds_of_children():
    resource = pytest.importorskip("resource")  # there is none on Windows
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.tutorials
@pytest.mark.parametrize("path", build.chapters(), ids=lambda path: path.stem)
def test_the_chapter_runs_and_prints_what_its_text_says(path):
    pytest.importorskip("matplotlib", reason="chapters draw with matplotlib")
    start = seconds_of_children()
    build.check(path)
    took[path] = seconds_of_children() - start


@pytest.mark.tutorials
def test_all_chapters_together_take_less_than_8_minutes():
    if len(took) < len(build.chapters()):
        pytest.skip("not all chapters were run to their end")
    print(*(f"{path.stem} {seconds:.0f} s" for path, seconds in took.items()), sep=", ")
    assert sum(took.values()) < build.ALL_SECONDS
