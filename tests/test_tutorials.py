"""The chapters run, print what their text says, and link to what is there; and the script that sees to it would notice."""

import re

import pytest

from diffa2_mini.config import UserError
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
    (CHAPTER.replace("    raise NotImplementedError", "    return 4"), "passes before the exercise is done"),
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


@pytest.mark.parametrize("said, printed, fence, same", [
    ("loss 1.00", "loss 1.004", "", True), ("loss 1.00", "loss 1.04", "", False), ("loss 1.00", "loss 1.04", " tolerance=0.1", True),
    ("took 3 s", "took 9 s", "", False), ("took 3 s", "took 9 s", " tolerance=any", True), ("1e-7", "1.5e-7", "", False),
    ("2,810 clips", "2,811 clips", "", False), ("-0.5", "0.5", "", False), ("a b", "a  b", "", True), ("a b", "a c", "", False)])
def test_numbers_agree_within_the_tolerance_that_is_stated(said, printed, fence, same):
    assert build.agree(said, printed, fence) == same


def test_every_chapter_has_what_a_chapter_needs():
    for path in build.chapters():
        text = path.read_text(encoding="utf-8")
        tags = [cell.tag for cell in build.cells_of(text) if cell.tag]
        assert tags == ["starter", "check", "solution"] * 3, path.name
        assert "![" in text and "**You will be able to**" in text and "**Time:**" in text, path.name
        summary = re.search(r"^## Summary\n(.*?)^## Read on", text, re.MULTILINE | re.DOTALL)[1]
        assert len(re.findall(r"^(?:- |\d\. )", summary, re.MULTILINE)) == 5, path.name
        assert path.name.startswith("13") or re.search(rf"^Next: \[{int(path.name[:2]) + 1} · ", text, re.MULTILINE), path.name
        assert text.count("<details>") == text.count("</details>") == 3, path.name


@pytest.mark.tutorials
@pytest.mark.parametrize("path", build.chapters(), ids=lambda path: path.stem)
def test_the_chapter_runs_and_prints_what_its_text_says(path):
    pytest.importorskip("matplotlib", reason="chapters draw with matplotlib")
    build.check(path)
