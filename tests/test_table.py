"""Rows of text in columns, and long lists cut short."""

from diffa2_mini.command.table import columns, listed


def test_columns():
    assert columns([("a", "bb"), ("ccc", "d")]) == "  a    bb\n  ccc   d"


def test_long_lists_are_cut_in_the_text_alone():
    lines = listed("words", [f"w{i}" for i in range(13)])
    assert lines[0] == "words: 13" and len(lines) == 12 and lines[-1] == "  and 3 more"
