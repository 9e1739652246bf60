"""Text to token ids and back, and the prompt that the audio is spliced into (arXiv 2601.23161,
section 3.2).

A byte-level BPE (arXiv 1508.07909) starts from the 256 bytes and merges, again and again, the pair
of neighbours that was most frequent in its training text. Merging stays within words, into which
patterns split the text first. tiktoken does the merging; all it needs is the rank of each token.

The prompt is LLaDA's chat template. A user's text is always encoded as plain text: a typed
`<|eot_id|>` becomes letters, and only the template inserts special tokens.

What differs: the tokenizer of LLaDA is read from its tokenizer.json without Hugging Face's library;
and each response has an EOS of its own, whatever its neighbours in a batch.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import regex
import tiktoken

from .errors import UserError, require, require_contents

# In this order they follow the ranks of a rank file. `<|mdm_mask|>` is the [MASK] of the papers.
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eot_id|>")
# How a rank file's text is split. `A.`, the letter of a choice, is one word.
WORD_PATTERN = r"[A-Z]\.| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s"
SPLIT_TIMEOUT = 2  # seconds for a pattern to split a text: some would take years
BEFORE_AUDIO = "This is the audio: "


# ------------------------------------------------------------------------------------ text to words

Split = Callable[[str], list[str]]  # a partial function of this file, so that it can be pickled


def cut(pattern: regex.Pattern, text: str, between: bool = True) -> list[str]:
    """The matches of a pattern and, if asked for, what is `between` them."""
    pieces, at = [], 0
    for match in pattern.finditer(text, timeout=SPLIT_TIMEOUT):
        pieces += [text[at:match.start()] if between else "", match.group()]
        at = match.end()
    pieces.append(text[at:] if between else "")
    return [piece for piece in pieces if piece]


def isolate(pattern: str) -> Split:
    """Splits a text into the matches of a pattern and what is between them."""
    return partial(cut, regex.compile(pattern))


# ------------------------------------------------------------------------------------ the tokenizer


@dataclass(frozen=True)
class Prompt:
    """Token ids [L] of everything before the response, and where the audio embeddings go."""

    ids: list[int]
    audio_at: int  # they go before this one


class Tokenizer:
    """A byte-level BPE with LLaDA's special tokens.

    Args:
        ranks: of the tokens, which are byte strings, in the order of merging.
        split: how a text is split into words.
        ids: of the tokens, by rank. Default: the ranks.
        special: ids of SPECIAL_TOKENS, at least. Default: they follow the ranks.
        words: ids of tokens that are whole text, and are found before it is split.
        unreachable: tokens by id that no text gives, but that a model may predict.
    """

    def __init__(self, ranks: dict[bytes, int], split: Split | None = None,
                 ids: list[int] | None = None, special: dict[str, int] | None = None,
                 words: dict[str, int] | None = None, unreachable: dict[int, bytes] | None = None):
        self.split = split or isolate(WORD_PATTERN)
        self.ids, self.words = ids or list(range(len(ranks))), words or {}
        self.special = special or {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.eos_id, self.mask_id = self.special["<|endoftext|>"], self.special["<|mdm_mask|>"]
        self.eot_id = self.special["<|eot_id|>"]
        self.merges = tiktoken.Encoding("diffa2", pat_str="(?s:.+)", mergeable_ranks=ranks,
                                        special_tokens={})
        longest_first = sorted(map(regex.escape, self.words), key=len, reverse=True)
        self.cut = isolate("|".join(longest_first) or "(?!)")  # (?!) matches nowhere
        self.tokens = {self.ids[rank]: token for token, rank in ranks.items()} | (unreachable or {})
        self.tokens |= {i: token.encode() for token, i in (self.special | self.words).items()}

    @classmethod
    def from_ranks(cls, path: str | Path) -> "Tokenizer":
        """Read a rank file: a line per token, base64 of its bytes and its rank."""
        require(Path(path).is_file(), f"{path}: expected a tokenizer's rank file, found none")
        try:
            rows = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
        except ValueError as error:
            raise UserError(f"{path}: expected a token in base64 and its rank in each line, got "
                            f"{error}") from None
        is_complete = all(bytes([b]) in ranks for b in range(256))
        require(is_complete and list(ranks.values()) == list(range(len(rows))),
                f"{path}: expected the 256 bytes and what is merged of them, ranked from 0, got "
                "another list")
        return cls(ranks)

    @classmethod
    def from_tokenizer_json(cls, path: str | Path) -> "Tokenizer":
        """Read a byte-level BPE from Hugging Face's tokenizer.json. Raises UserError if it is
        broken, has a feature that is not known here, or is merged otherwise by tiktoken."""
        require(Path(path).is_file(), f"{path}: expected a tokenizer.json, found none")
        require_contents(Path(path), "a tokenizer.json")
        try:
            return cls(**read_tokenizer(json.loads(Path(path).read_text(encoding="utf-8"))))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError,
                regex.error) as error:
            raise UserError(f"{path}: expected the tokenizer.json of a byte-level BPE, got a "
                            f"broken one ({type(error).__name__}: {error})") from None

    @property
    def vocab_size(self) -> int:
        return max(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, never special tokens. Raises UserError if splitting it takes too
        long."""
        ids = []
        try:
            for piece in self.cut(text):
                if piece in self.words:
                    ids.append(self.words[piece])
                    continue
                for word in self.split(piece):
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


# ---------------------------------------------------------------------------- Hugging Face's format

BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_ID = 2**20
UNKNOWN_FEATURES = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                    "fuse_unk", "byte_fallback")
# The file writes bytes as letters: printable ones as they are, the others as U+0100 and following.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {chr(b): b for b in PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(OTHERS)}


def to_bytes(letters: str) -> bytes:
    return bytes(LETTERS[letter] for letter in letters)


def read_tokenizer(data: dict) -> dict:
    """The arguments of a Tokenizer from the contents of a tokenizer.json. Raises UserError."""
    model, added = data["model"], data.get("added_tokens") or []
    check_features(model, added, data.get("normalizer") or {})
    special = {token["content"]: token["id"] for token in added if token["special"]}
    words = {token["content"]: token["id"] for token in added if not token["special"]}
    apart = special | words
    vocab = {token: i for token, i in model["vocab"].items() if token not in apart}
    check_ids(special, words, vocab)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    bad = [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocab.keys()]
    require(not bad, f"expected merges of two tokens to one, got {bad[:1]}")
    ids = {to_bytes(token): i for token, i in vocab.items()}
    pairs = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    ranks = rank_tokens(ids, pairs, bool(model.get("ignore_merges")))
    return {"ranks": ranks, "ids": [ids[token] for token in ranks], "special": special,
            "words": words, "split": read_split(data["pre_tokenizer"]),
            "unreachable": {i: token for token, i in ids.items() if token not in ranks}}


def check_features(model: dict, added: list[dict], normalizer: dict) -> None:
    """Raise UserError unless this is a BPE with no more features than a Tokenizer has."""
    require(model.get("type", "BPE") == "BPE",
            f"expected a model of type BPE, got {model.get('type')}")
    unknown = [name for name in UNKNOWN_FEATURES if model.get(name)]
    require(not unknown, f"expected a plain byte-level BPE, got one with {', '.join(unknown)}")
    require(not normalizer, f"expected no normalizer, got {normalizer.get('type')}")
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        require(not flags or token["special"], "expected added tokens that match as they are, got "
                                               f"{token['content']!r} with {flags}")


def check_ids(special: dict[str, int], words: dict[str, int], vocab: dict[str, int]) -> None:
    """Raise UserError unless all ids are in range, and the special tokens have their own."""
    every = [*special.values(), *words.values(), *vocab.values()]
    odd = [i for i in every if type(i) is not int or not 0 <= i < MAX_ID]
    require(not odd, f"expected ids from 0 to {MAX_ID - 1}, got {odd[:1]}")
    missing = [token for token in SPECIAL_TOKENS if token not in special]
    require(not missing, f"expected LLaDA's special tokens, got none of {', '.join(missing)}")
    shared = {*special.values()} & {*vocab.values(), *words.values()}
    require(not shared, "expected special tokens with ids of their own, got "
                        f"{min(shared, default=0)} for ordinary text too")


def with_space(split: Split, text: str) -> list[str]:
    """The pieces of a text that is made to begin with a space."""
    return split(text if text.startswith(" ") else " " + text)


def in_turn(splits: list[Split], text: str) -> list[str]:
    """The pieces of a text after several splits, each of the pieces before it."""
    pieces = [text]
    for split in splits:
        pieces = [part for piece in pieces for part in split(piece)]
    return pieces


def read_split(spec: dict | None) -> Split:
    """How a `pre_tokenizer` splits a text. Raises UserError for one that is not known here."""
    require(spec is not None, "expected a pre_tokenizer, got none")
    kind = spec["type"]
    if kind == "Sequence":
        return partial(in_turn, [read_split(step) for step in spec["pretokenizers"]])
    if kind == "Digits":
        return isolate(r"\p{N}" if spec["individual_digits"] else r"\p{N}+")
    if kind == "ByteLevel":
        split = isolate(BYTE_LEVEL_PATTERN if spec.get("use_regex", True) else "(?!)")
        return partial(with_space, split) if spec["add_prefix_space"] else split
    require(kind == "Split",
            f"expected the pre_tokenizer Split, ByteLevel, Digits or Sequence, got {kind}")
    (form, pattern), = spec["pattern"].items()
    pattern = regex.escape(pattern) if form == "String" else pattern
    behavior, invert = spec["behavior"], spec.get("invert")
    if behavior == "Isolated":
        return isolate(pattern)
    require(behavior == "Removed" and invert,
            f"expected the pre_tokenizer Split to isolate, got {behavior}, invert {invert}")
    return partial(cut, regex.compile(pattern), between=False)


def rank_tokens(ids: dict[bytes, int], merges: list[tuple[bytes, bytes]],
                ignore_merges: bool) -> dict[bytes, int]:
    """The ranks with which tiktoken merges as the list `merges` says. Raises UserError if there are
    none.

    The list ranks pairs; tiktoken ranks tokens, and merges the two neighbours that give the token
    of lowest rank. Both do the same if, for each token, the last two parts that it is merged from
    are a pair of the list, and the tokens are ranked as these pairs are.
    """
    missing = [b for b in range(256) if bytes([b]) not in ids]
    require(not missing, f"expected a token for each byte, got none for {missing[:4]}")
    order = {pair: at for at, pair in enumerate(merges)}
    require(len(order) == len(merges), "expected each merge once, got one twice")
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    last = -1
    for token in list(ranks)[256:]:
        pair = last_pair(token, ranks)
        require(order.get(pair, -1) > last,
                f"the token {token!r} is merged otherwise by tiktoken, which runs this; "
                "use a tokenizer whose merges are ranked as its tokens are")
        last = order[pair]
    if ignore_merges:  # a word that is a token stays whole, as it always does in tiktoken
        for token in ids:
            if token not in ranks:
                require(len(last_pair(token, ranks)) > 2,
                        f"tiktoken, which runs this, would merge {token!r} anywhere")
                ranks[token] = len(ranks)
    return ranks


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """The parts of a token before its last merge: two, or more if it cannot be merged."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        at = joined.index(min(joined))
        if joined[at] == len(ranks):
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)
