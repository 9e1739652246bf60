"""Verdicts on hand-made replies, each worked out from the released rule."""

from pathlib import Path

import pytest

from diffa2_mini.data import Example
from diffa2_mini.evaluate.benchmarks import BENCHMARKS, BenchmarkQuestion
from diffa2_mini.evaluate.scoring import (
    WordErrors,
    is_bare_letter,
    is_right,
    mend_letter,
    mmsu_letter,
    named_choice,
    normalise,
    score_by_words,
    score_mended,
    word_errors,
)

ANIMALS = ("a dog", "a cat", "a bird", "a cow")


def mmsu_is_right(reply, answer, choices):
    question = BenchmarkQuestion("id", None, "", answer, {}, BENCHMARKS["mmsu"], choices)
    return question.judge(reply)


@pytest.mark.parametrize(
    "reply, letter",
    [
        ("B", "B"),
        ("B. a cat", "B"),
        ("(B)", "B"),
        ("(B).", None),
        ("\n B\n", "B"),
        ("a cat", None),
        ("b", None),
        ("", None),
        (" ", None),
        ("x", None),
        ("None", None),
        ("E", None),
        ("The answer is B.", "B"),
        ("The answer is B", None),
        ("The answer is (B)", "B"),
        ("Answer: B", "A"),
        ("answer:\nB)", "B"),
        ("A and B", "A"),
        ("B and A", "B"),
        ("either A or B.", "B"),
        ("A dog barks", "A"),
        ("Cats purr", "C"),
        ("ABBA", "A"),
        ("XBA", "B"),
        ("\u0392", None),
        ("\uff22", None),
        ("猫B。", "B"),  # a Greek Beta, a full-width B
    ])
def test_the_letter_of_mmsu_is_the_first_character_or_the_last_but_one(reply, letter):
    assert mmsu_letter(reply) == letter
    assert mmsu_is_right(reply, "a cat", ANIMALS) is (letter == "B")


def test_a_letter_without_a_choice_is_wrong():
    assert mmsu_is_right("B", "no", ("yes", "no")) and not mmsu_is_right("C", "no", ("yes", "no"))
    assert not mmsu_is_right("A", "Yes", ("yes", "no"))  # texts are compared as they are
    assert mmsu_is_right("B", "yes", ("yes", "yes"))  # and by nothing else


CARS = ("a red car", "a blue car", "a bus", "no car")


@pytest.mark.parametrize(
    "reply, raw, mended",
    [
        ("a red car", True, True),
        ("A red car.", True, True),
        ("car, red, a", True, True),
        ("RED A CAR", True, True),
        ("A. a red car", True, True),
        ("(A) a red car", True, True),
        ("The answer is A. a red car", True, True),
        ("A", False, True),
        ("A.", False, True),
        ("(A)", False, True),
        (" A\n", False, True),
        ("A)", False, False),
        ("a", False, False),
        ("[A]", False, False),
        ("(A).", False, False),
        ("A..", False, False),
        ("B", False, False),
        ("B.", False, False),
        ("B. a red car", True, True),
        ("E", False, False),
        ("", False, False),
        ("...", False, False),
        ("red car", False, False),  # a word is missing
        ("a red car or a bus", False, False),
        ("a red car, not a blue car", False, False),
        ("a redcar", False, False),
        ("a red car, surely", True, True),  # words of no choice do not matter
    ])
def test_the_words_decide_and_a_bare_letter_stands_for_its_choice(reply, raw, mended):
    assert score_by_words(reply, "a red car", CARS) is raw
    assert score_mended(reply, "a red car", CARS) is mended


# the order is not looked at
@pytest.mark.parametrize(
    "answer, choices, reply, right",
    [
        ("no car", CARS, "there is no car", True),
        ("no car", CARS, "there is not a car", False),
        ("a car", ("a car", "a red car"), "a car", True),
        ("a car", ("a car", "a red car"), "a red car", False),
        ("a red car", ("a car", "a red car"), "a red car", True),
        ("a red car", ("a car", "a red car"), "a car", False),
        ("dog then cat", ("dog then cat", "cat then dog"), "cat then dog", True),
        ("ÉTÉ", ("ÉTÉ", "hiver"), "l'été", True),
        ("été", ("été", "hiver"), "ete", False),
        ("狗", ("狗", "猫"), "狗。", True),
        ("狗", ("狗", "猫"), "是狗", False),  # one word, as the rule sees it
        ("42", ("42", "43"), "It is 42.", True),
        ("4.2", ("4.2", "4.3"), "2, 4", True),
        ("dog", ("cat", "dog"), "A dog barks", True),
        ("cat", ("cat", "dog"), "A dog barks", False)])
def test_words_overlap_and_scripts_differ(answer, choices, reply, right):
    assert score_by_words(reply, answer, choices) is right
    assert score_mended(reply, answer, choices) is right  # none of these is only a letter


def test_a_dog_barks_is_not_option_a():
    """MMSU's rule takes it for one; the mended score does not."""
    choices = ("cat", "dog", "bird", "cow")
    assert mmsu_is_right("A dog barks", "cat", choices)
    assert not score_mended("A dog barks", "cat", choices)
    assert score_mended("A dog barks", "dog", choices)
    assert mend_letter("A dog barks", choices) == "A dog barks"


def test_only_a_letter_is_mended():
    assert [mend_letter(reply, ANIMALS) for reply in ("C", "C.", "(C)", " C ")] == ["a bird"] * 4
    # the last is Cyrillic
    for reply in ("c", "C)", "C:", "(C", "CC", "E", "E.", "", "C. a bird", "\u0421"):
        assert mend_letter(reply, ANIMALS) == reply
    assert [is_bare_letter(reply)
            for reply in ("C", "(C)", "E", "C)", "")] == [True, True, True, False, False]
    assert mend_letter("A", ("C", "D", "A")) == "A"  # keys of music: a text already
    assert score_mended("A", "A", ("C", "D", "A"))
    assert mend_letter("A", ("C ", "D ", "A ")) == "A"


def test_an_answer_without_a_word_must_be_said_as_it_is():
    assert score_mended("A", "?", ("?", "!")) and score_mended(" ?\n", "?", ("?", "!"))
    assert not any(score_mended(reply, "?", ("?", "!")) for reply in ("I hear nothing", "B", ""))


def test_a_reply_that_names_no_choice_is_malformed():
    assert all(named_choice(reply, ANIMALS)
               for reply in ("a dog", "B", "(B)", "It is a cow.", "a dog, or a cat"))
    assert not any(
        named_choice(reply, ANIMALS) for reply in ("", "dog", "E", "I cannot hear", "a", "?"))


# -------------------------------------------------------------------------------------- transcripts


@pytest.mark.parametrize("reference, hypothesis, errors", [
    ("one two three", "one two three", 0),
    ("one two three", "one three", 1),  # a deletion
    ("one two three", "one two two three", 1),  # an insertion
    ("one two three", "one four three", 1),  # a substitution
    ("one two three", "two three one", 2),  # not three substitutions
    ("one two three", "three two one", 2),
    ("one two three four", "two three five six", 3),
    ("one two three", "", 3),
    ("", "one two", 2),
    ("", "", 0),
    ("one", "two three four", 3),
    ("one  two", " one two ", 0),  # white space is none of it
    ("one two", "onetwo", 2),
])
def test_the_fewest_edits(reference, hypothesis, errors):
    there, back = word_errors(reference, hypothesis), word_errors(hypothesis, reference)
    assert (there.total, there.words) == (errors, len(reference.split()))
    assert (back.total, back.words) == (errors, len(hypothesis.split()))
    assert (there.deletions, there.insertions) == (back.insertions, back.deletions)
    assert there.words - there.deletions + there.insertions == len(hypothesis.split())


@pytest.mark.parametrize(
    "reference, hypothesis, s, d, i",
    [
        ("a b c", "a x c", 1, 0, 0),
        ("a b c", "a c", 0, 1, 0),
        ("a b c", "a b b c", 0, 0, 1),
        ("a b c", "", 0, 3, 0),
        ("", "a b", 0, 0, 2),
        ("a b", "b c", 0, 1, 1),  # not two substitutions: a word is right
        ("the cat sat on the mat", "a cat sat the mat today", 1, 1, 1),
        ("a", "b c", 1, 0, 1)])
def test_edits_by_kind(reference, hypothesis, s, d, i):
    assert word_errors(reference, hypothesis) == WordErrors(s, d, i, len(reference.split()))


@pytest.mark.parametrize("text, normal", [
    ("Hello, World!", "hello world"),
    ("don't \u2018don\u2019t\u2019", "dont dont"),
    ("well-known", "well known"),
    ("  a\tb\n", "a b"),
    ("...", ""),
    ("3.5 %", "3 5"),
    ("E\u0301TE\u0301", "\u00e9t\u00e9"),
    ("नमस्ते!", "नमस्ते"),
    ("snake_case", "snake case"),
    ("\u00bfQu\u00e9? \u2014 s\u00ed", "qu\u00e9 s\u00ed"),
    ("你好。", "你好"),
])
def test_normalisation(text, normal):
    assert normalise(text) == normal == normalise(normal)


# ---------------------------------------------------------------------------------------- manifests


def example(type, answer, domain="speech", path="clip.wav"):
    return Example(Path(path), "?", answer, "", type, domain)


@pytest.mark.parametrize(
    "type, target, text, right",
    [
        ("first", "nine", "nine", True),
        ("first", "nine", "nine nine", False),
        ("first", "nine", "Nine", False),
        ("first", "nine", "", False),
        ("caption", "B. siren", "B. beep", False),
        ("first+abcd", "B. siren", "B. siren", True),
        ("first+abcd", "B. siren", "B", True),
        ("first+abcd", "B. siren", "B. beep", True),
        ("first+abcd", "B. siren", "A. siren", False),
        ("first+abcd", "B. siren", "siren", False),
        ("first+abcd", "B. siren", "", False),
        ("first", "three one four ", "three one four", True),
        ("first", "nine", "nine\n", True),
        ("first", "three one", "threeone", False),  # white space within a text counts
        ("first+abcd", " B. siren", "B", True),
        ("first+abcd", "\nB. siren", "A", False)])
def test_an_open_answer_counts_as_a_whole_and_a_lettered_one_by_its_letter(
        type, target, text, right):
    assert is_right(example(type, target), text) is right
