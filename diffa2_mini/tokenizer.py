"""Text to token ids and back, and the prompt that the audio is spliced into.

A byte-level BPE starts from the 256 bytes and merges, again and again, the pair that training saw most often. tiktoken
runs it; it needs the rank of every merged byte string, and the pattern that first cuts the text into words. The prompt
is LLaDA's chat template with one sentence about the audio. Text from a user is always encoded as plain text: typing
`<|eot_id|>` gives letters, only the template inserts special tokens.
"""

import base64
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import regex
import tiktoken

from .config import require

# The order fixes their ids in the toy vocabulary. `<|mdm_mask|>` is the [MASK] of the papers.
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
WORD_PATTERN = r"[A-Z]\.| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s"  # `A.`, the letter of a choice, is one word
BEFORE_AUDIO = "This is the audio: "


@dataclass(frozen=True)
class Prompt:
    """Token ids of everything before the response, and where in them the audio embeddings go."""

    ids: list[int]
    audio_at: int


class Tokenizer:
    """A tiktoken encoding with LLaDA's special tokens.

    `ranks` maps byte strings to ranks, which here are the token ids too; the special tokens follow them.
    """

    def __init__(self, ranks: dict[bytes, int], pattern: str = WORD_PATTERN):
        self.special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding("diffa2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.eos_id, self.mask_id = self.special["<|endoftext|>"], self.special["<|mdm_mask|>"]
        self.eot_id = self.special["<|eot_id|>"]

    @classmethod
    def from_ranks(cls, path: str | Path) -> "Tokenizer":
        """Read a rank file: a line per token, base64 of its bytes and its rank."""
        require(Path(path).is_file(), f"{path}: expected a tokenizer's rank file, found none")
        lines = Path(path).read_text().splitlines()
        return cls({base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)})

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """The text of an answer: up to the first `<|eot_id|>` or EOS; masks are shown as ░."""
        pieces = []
        for token in ids:
            if token in (self.eot_id, self.eos_id):
                break
            pieces.append("░".encode() if token == self.mask_id else self.encoding.decode_single_token_bytes(token))
        return b"".join(pieces).decode("utf-8", errors="replace").strip()

    def prompt(self, system: str, instruction: str) -> Prompt:
        """The chat template up to the answer. The audio goes right after `This is the audio:`."""
        start, end = self.special["<|start_header_id|>"], self.special["<|end_header_id|>"]

        def turn(role, text):
            return [start, *self.encode(role), end, *self.encode("\n\n" + text)]

        before = [self.special["<|startoftext|>"], *turn("system", system), self.eot_id]
        audio_at = len(before) + len(turn("user", BEFORE_AUDIO)) - 1  # the last token is the space
        user = turn("user", f"{BEFORE_AUDIO}<audio>. {instruction}")
        return Prompt([*before, *user, self.eot_id, *turn("assistant", "")], audio_at)

    def response(self, answer: str, multiple: int) -> list[int]:
        """The answer, `<|eot_id|>`, and EOS (at least one) up to the next multiple of `multiple`."""
        ids = [*self.encode(answer), self.eot_id]
        return ids + [self.eos_id] * (multiple - len(ids) % multiple)


def train_bpe(words: Counter, n_merges: int) -> dict[bytes, int]:
    """Ranks of a byte-level BPE: 256 bytes, then up to `n_merges` merges of the most frequent pair.

    `words` counts the pieces that WORD_PATTERN cuts the training text into. Ties go to the smallest pair.
    """
    ranks = {bytes([b]): b for b in range(256)}
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(ranks) < 256 + n_merges:
        pairs = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i:i + 2] = [left + right]
                i += 1
    return ranks


def count_words(text: str) -> Counter:
    """How often each piece of WORD_PATTERN occurs in `text`."""
    return Counter(regex.findall(WORD_PATTERN, text))


def save_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """Write the rank file that `Tokenizer.from_ranks` reads."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    Path(path).write_text("".join(lines))
