"""Whether a reply is right, by each benchmark's released rule; what is wrong with a transcript.

The rules are kept as they are, with what they get wrong. MMSU's reads "A dog barks" as option A.
MMAU's, which MMAR shares, compares words alone: a bare letter, always the right one, scores 2 of
its 1,000 questions. Hence a second score, for which a bare letter stands for its choice's text.
"""

import re
import unicodedata
from functools import cache
from string import ascii_uppercase
from typing import NamedTuple

from ..data import Example

NORMALISATION = ("lower case; apostrophes are taken out (don't = dont); all other punctuation and "
                 "symbols separate words (well-known = well known)")


def is_right(example: Example, answer: str) -> bool:
    """Of a manifest: whether the answer is the target, or of a lettered question its letter."""
    reply, target = answer.strip(), example.answer.strip()
    return reply[:1] == target[:1] if example.type.endswith("+abcd") else reply == target


def mmsu_letter(reply: str) -> str | None:
    """MMSU's rule: the first character if it is one of ABCD, else the last but one if it is."""
    text = reply.strip().replace("\n", "")
    return next((letter for letter in (text[:1], text[-2:-1]) if letter in {*"ABCD"}), None)


def words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def score_by_words(reply: str, answer: str, choices: tuple[str, ...]) -> bool:
    """MMAU's and MMAR's rule: all words of the answer are said, and none of wrong choices alone."""
    said, right = words(reply), words(answer)
    wrong = set().union(*map(words, choices)) - right
    return bool(said) and right <= said and not said & wrong


def is_bare_letter(reply: str) -> bool:
    """Whether a reply is only `A`, `A.` or `(A)`."""
    return re.fullmatch(r"[A-Z]\.?|\([A-Z]\)", reply.strip()) is not None


def mend_letter(reply: str, choices: tuple[str, ...]) -> str:
    """The reply, or the choice's text where the reply is only its letter."""
    text = reply.strip()
    if text in map(str.strip, choices) or not is_bare_letter(text):  # keys of music are letters too
        return reply
    return dict(zip(ascii_uppercase, choices)).get(text.strip("()."), reply)


def score_mended(reply: str, answer: str, choices: tuple[str, ...]) -> bool:
    """The word rule, after a bare letter has become its choice's text. An answer without a word,
    which the rule finds in any reply, must be said as it is."""
    reply = mend_letter(reply, choices)
    if not words(answer):
        return reply.strip() == answer.strip()
    return score_by_words(reply, answer, choices)


def named_choice(reply: str, choices: tuple[str, ...]) -> str | None:
    """The first choice whose letter the reply is, or all of whose words it has."""
    said = words(mend_letter(reply, choices))
    return next((choice for choice in choices if words(choice) and words(choice) <= said), None)


def normalise(text: str) -> str:
    """A transcript as it is compared: NORMALISATION, in Unicode's composed form."""
    text = re.sub("['\u2018\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).lower())
    letters = [" " if unicodedata.category(c)[0] in "PSZC" else c for c in text]
    return " ".join("".join(letters).split())


class WordErrors(NamedTuple):
    """What a transcript does to its reference, in words, and how many of these that has."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@cache  # a progress bar asks again and again
def word_errors(reference: str, hypothesis: str) -> WordErrors:
    """The fewest edits that make the hypothesis of the reference, counted in words; of those the
    ones with the fewest substitutions, which leave the most words right."""
    truth, guess = reference.split(), hypothesis.split()
    edit = len(truth) + 1  # the cost of an edit; a substitution costs 1 more, all of them no edit
    row = [j * edit for j in range(len(guess) + 1)]  # from no word to the first j of the guess
    for i, word in enumerate(truth, start=1):
        above, row = row, [i * edit]
        for j, other in enumerate(guess):
            substitution = edit + 1 if word != other else 0
            row.append(min(above[j] + substitution, above[j + 1] + edit, row[j] + edit))
    n_edits, substitutions = divmod(row[-1], edit)
    deletions = (n_edits - substitutions + len(truth) - len(guess)) // 2
    return WordErrors(substitutions, deletions, n_edits - substitutions - deletions, len(truth))
