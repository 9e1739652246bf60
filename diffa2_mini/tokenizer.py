"""Text to token ids and back, and the prompt around the audio (arXiv 2601.23161, section 3.2).

A byte-level BPE (arXiv 1508.07909) starts from the 256 bytes and merges, again and again, the pair
of neighbours that was most frequent in its training text. Merging stays within words, into which
patterns split the text first. tiktoken does the merging; all it needs is the rank of each token.

The prompt is LLaDA's chat template. A user's text is always encoded as plain text: a typed
`<|eot_id|>` becomes letters, and only the template inserts special tokens.

What differs: the release's training masks the assistant's header too, here part of the prompt; and
each response has an EOS of its own. `published/tokenizer_json.py` reads LLaDA's tokenizer.
"""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import regex
import tiktoken

from .errors import UserError, read_text, require

# In this order they follow the ranks of a rank file. `<|mdm_mask|>` is the [MASK] of the papers.
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eot_id|>")
# How a rank file's text is split. `A.`, the letter of a choice, is one word.
WORD_PATTERN = r"[A-Z]\.| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s"
SPLIT_TIMEOUT = 2  # seconds for a pattern to split a text: some would take years
BEFORE_AUDIO = "This is the audio: "
Split = Callable[[str], Sequence[str]]  # a function of a module or a partial one: it can be pickled


@lru_cache(maxsize=1024)  # many examples ask the same
def split_text(pattern: regex.Pattern, text: str, matches_alone: bool = False) -> tuple[str, ...]:
    """The matches of a pattern and what is between them, or the matches alone."""
    pieces, at = [], 0
    for match in pattern.finditer(text, timeout=SPLIT_TIMEOUT):
        pieces += [text[at:match.start()], match.group()]
        at = match.end()
    return tuple(filter(None, pieces[1::2] if matches_alone else [*pieces, text[at:]]))


def splitter(pattern: str, matches_alone: bool = False) -> Split:
    return partial(split_text, regex.compile(pattern), matches_alone=matches_alone)


@dataclass(frozen=True)
class Prompt:
    """Token ids [L] of everything before the response, and where the audio embeddings go."""

    ids: list[int]
    audio_at: int  # they go before this one


class Tokenizer:
    """A byte-level BPE with LLaDA's special tokens.

    Args:
        ranks: of the tokens, which are byte strings, in the order of merging.
        ids: of the tokens, and of others that merging never gives. Default: the ranks.
        special: ids of SPECIAL_TOKENS, at least. Default: they follow the ranks.
        words: ids of added tokens, which are found as they are before a text is split.
        splits: how a text is split into words, one after another. Default: at WORD_PATTERN.
    """

    def __init__(self, ranks: dict[bytes, int], ids: dict[bytes, int] | None = None,
                 special: dict[str, int] | None = None, words: dict[str, int] | None = None,
                 splits: list[Split] | None = None):
        ids, self.words = ranks if ids is None else ids, words or {}
        self.ids = [ids[token] for token in ranks]  # by rank
        self.special = special or {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.eos_id, self.mask_id = self.special["<|endoftext|>"], self.special["<|mdm_mask|>"]
        self.eot_id = self.special["<|eot_id|>"]
        self.merges = tiktoken.Encoding("diffa2", pat_str="(?s:.+)", mergeable_ranks=ranks,
                                        special_tokens={})
        longest_first = sorted(map(regex.escape, self.words), key=len, reverse=True)
        self.find_words = splitter("|".join(longest_first) or "(?!)")  # (?!) matches nowhere
        self.splits = [splitter(WORD_PATTERN)] if splits is None else splits
        self.tokens = {i: token for token, i in ids.items()}
        self.tokens |= {i: token.encode() for token, i in (self.special | self.words).items()}

    @classmethod
    def from_ranks(cls, path: str | Path) -> "Tokenizer":
        """Read a rank file: a line per token, base64 of its bytes and its rank."""
        try:
            rows = [line.split() for line in read_text(path, "a rank file").splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        except ValueError as error:
            raise UserError(f"{path}: expected base64 and rank in a line, got {error}") from None
        is_complete = all(bytes([b]) in ranks for b in range(256))
        require(is_complete and [*ranks.values()] == [*range(len(rows))],
                f"{path}: expected the 256 bytes and what is merged of them, ranked from 0")
        return cls(ranks)

    @property
    def vocab_size(self) -> int:
        return max(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never special tokens. UserError if splitting it takes too long."""
        ids = []
        try:
            for piece in self.find_words(text):
                if piece in self.words:
                    ids.append(self.words[piece])
                    continue
                words = [piece]
                for split in self.splits:
                    words = [part for word in words for part in split(word)]
                for word in words:
                    ids += [self.ids[rank] for rank in self.merges.encode_ordinary(word)]
        except TimeoutError:
            raise UserError("expected a tokenizer that splits text in time, got a pattern that "
                            f"takes over {SPLIT_TIMEOUT} s") from None
        return ids

    def spell(self, ids: list[int]) -> str:
        """The text of all tokens; a mask is shown as ░, an id without a token as �."""
        pieces = ["░".encode() if i == self.mask_id else self.tokens.get(i, b"\xff") for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode(self, ids: list[int]) -> str:
        """The text of an answer: up to the first `<|eot_id|>` or EOS."""
        ends = [at for at, token in enumerate(ids) if token in (self.eot_id, self.eos_id)]
        return self.spell(ids[:ends[0]] if ends else ids).strip()

    def prompt(self, system: str, instruction: str) -> Prompt:
        """The chat template up to the answer: `This is the audio:`, then the audio's embeddings
        (at `audio_at`), then ` <audio>.` and the instruction. `<audio>` is ordinary text and
        stays: the release puts the embeddings before it, not in its place."""
        start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]

        def turn(role, text):
            return [start, *self.encode(role), end, *self.encode("\n\n" + text)]

        before = [self.special["<|startoftext|>"], *turn("system", system), self.eot_id]
        audio_at = len(before) + len(turn("user", BEFORE_AUDIO)) - 1  # the last token is the space
        user = turn("user", f"{BEFORE_AUDIO}<audio>. {instruction}")
        return Prompt([*before, *user, self.eot_id, *turn("assistant", "")], audio_at)

    def response(self, answer: str, multiple: int) -> list[int]:
        """The answer, `<|eot_id|>`, and EOS up to the next multiple of `multiple`, at least one."""
        ids = [*self.encode(answer), self.eot_id]
        return ids + [self.eos_id] * (multiple - len(ids) % multiple)
