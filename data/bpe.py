"""Train a byte-level BPE on a text, in the place of LLaDA's tokenizer.json, which comes as a
download.

Not part of DIFFA-2. The vocabularies of the toy and the small size are made so (data/toy.py).
"""

import base64
from collections import Counter
from pathlib import Path

import regex

from diffa2_mini.tokenizer import WORD_PATTERN
from diffa2_mini.training.files import write_whole


def train_bpe(words: Counter, n_merges: int) -> dict[bytes, int]:
    """Ranks of a byte-level BPE: 256 bytes, then up to `n_merges` merges of the most frequent pair.

    `words` counts the pieces that WORD_PATTERN cuts the training text into. Ties go to the smallest
    pair.
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
    write_whole(Path(path), lambda temporary: temporary.write_text("".join(lines)))
