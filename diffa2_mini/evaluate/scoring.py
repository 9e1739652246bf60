"""Whether one reply is right, as each benchmark released the rule; and what is wrong with one
transcript.

The rules are kept as they are, with what they get wrong. MMSU's reads "A dog barks" as option A.
MMAU's, which MMAR shares, compares words alone, so that a bare letter says nothing: it scores 2 of
MMAU's 1,000 questions when it is always right. Hence a second score: a reply that is only a letter
stands for its choice's text, and then the words decide.
"""

import re
import unicodedata
from functools import cache
from operator import add
from string import ascii_uppercase
from typing import NamedTuple

from ..data import Example

NORMALISATION = ("lower case; apostrophes are taken out (don't = dont); all other punctuation and "
                 "symbols separate words (well-known = well known)")


def same_text(text: str, other: str) -> bool:
    """Whether two texts are the same to a reader: white space around them does not count."""
    return text.strip() == other.strip()


def is_right(example: Example, answer: str) -> bool:
    """Of a manifest: whether the answer is the target, or of a lettered question its letter."""
    if example.type.endswith("+abcd"):
        return answer.strip()[:1] == example.answer.strip()[:1]
    return same_text(answer, example.answer)


def choice_at(letter: str | None, choices: tuple[str, ...]) -> str | None:
    """The choice that is shown behind a letter, if there is one."""
    return dict(zip(ascii_uppercase, choices)).get(letter)


def mmsu_letter(reply: str) -> str | None:
    """MMSU's rule: the first character if it is one of ABCD, else the last but one if it is."""
    text = reply.strip().replace("\n", "")
    for character in (text[:1], text[-2:-1]):
        if character and character in "ABCD":
            return character
    return None


def words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))


def score_by_words(reply: str, answer: str, choices: tuple[str, ...]) -> bool:
    """MMAU's and MMAR's rule: the reply has every word of the answer, and none that occurs in wrong
    choices alone."""
    said, right = words(reply), words(answer)
    wrong = set().union(*map(words, choices)) - right
    return bool(said) and right <= said and not said & wrong


def is_bare_letter(reply: str) -> bool:
    """Whether a reply is only `A`, `A.` or `(A)`."""
    return re.fullmatch(r"[A-Z]\.?|\([A-Z]\)", reply.strip()) is not None


def mend_letter(reply: str, choices: tuple[str, ...]) -> str:
    """The reply, or the choice's text where the reply is only its letter. Where the choices are
    letters themselves, as keys of music are, it is a text already."""
    if any(same_text(reply, choice) for choice in choices) or not is_bare_letter(reply):
        return reply
    return dict(zip(ascii_uppercase, choices)).get(reply.strip().strip("()."), reply)


def score_mended(reply: str, answer: str, choices: tuple[str, ...]) -> bool:
    """The word rule, after a bare letter has become its choice's text. An answer without a word, to
    which the rule would take anything for right, must be said as it is."""
    reply = mend_letter(reply, choices)
    return score_by_words(reply, answer, choices) if words(answer) else same_text(reply, answer)


def names_a_choice(reply: str, choices: tuple[str, ...]) -> bool:
    """Whether a reply is the letter of some choice, or has all words of one."""
    said = words(mend_letter(reply, choices))
    return any(words(choice) and words(choice) <= said for choice in choices)


def normalise(text: str) -> str:
    """A transcript as it is compared: NORMALISATION, in Unicode's composed form."""
    text = re.sub("['\u2018\u2019\u02bc]", "", unicodedata.normalize("NFKC", text).lower())
    letters = [" " if unicodedata.category(c)[0] in "PSZC" else c for c in text]
    return " ".join("".join(letters).split())


class WordErrors(NamedTuple):
    """How many words of a transcript's reference, which has `words`, are replaced and left out, and
    how many are put in."""

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
    # (edits, S, D, I) from no word to the first 0 ... n of the guess
    row = [(j, 0, 0, j) for j in range(len(guess) + 1)]
    for i, word in enumerate(truth, start=1):
        previous, row = row, [(i, 0, i, 0)]
        for j, other in enumerate(guess, start=1):
            missed = int(word != other)
            steps = [(previous[j - 1], (missed, missed, 0, 0)), (previous[j], (1, 0, 1, 0)),
                     (row[j - 1], (1, 0, 0, 1))]
            row.append(min(tuple(map(add, *step)) for step in steps))
    return WordErrors(*row[-1][1:], len(truth))
