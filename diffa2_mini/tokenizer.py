"""Text to token ids and back, and the prompt that the audio is spliced into.

A byte-level BPE starts from the 256 bytes and merges, again and again, the pair that training saw
most often. tiktoken runs it; it needs the rank of every merged byte string. Before that, patterns
cut the text into words; what cuts is a function of this file with its arguments bound, so that it
can be pickled and sent to processes that load audio. The prompt is LLaDA's chat template with one
sentence about the audio. Text from a user is always encoded as plain text: typing `<|eot_id|>`
gives letters, only the template inserts special tokens.
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

Split = Callable[[str], list[str]]  # a text to the pieces that are merged within

# The order fixes their ids in the toy vocabulary. `<|mdm_mask|>` is the [MASK] of the papers.
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eot_id|>")
# `A.`, the letter of a choice, is one word
WORD_PATTERN = r"[A-Z]\.| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s"
SPLIT_TIMEOUT = 2  # seconds that a pattern may take: there are some that would take years
BEFORE_AUDIO = "This is the audio: "


@dataclass(frozen=True)
class Prompt:
    """Token ids of everything before the response, and where in them the audio embeddings go."""

    ids: list[int]
    audio_at: int


def cut(pattern: regex.Pattern, text: str) -> list[str]:
    """The matches of a pattern and what is between them."""
    pieces, at = [], 0
    for match in pattern.finditer(text, timeout=SPLIT_TIMEOUT):
        pieces += [text[at:match.start()], match.group()]
        at = match.end()
    return [piece for piece in [*pieces, text[at:]] if piece]


def isolate(pattern: str) -> Split:
    """Cuts a text into the matches of a pattern and what is between them."""
    return partial(cut, regex.compile(pattern))


class Tokenizer:
    """A byte-level BPE with LLaDA's special tokens.

    `ranks` maps byte strings to ranks. `ids` has the token id of each rank (default: the rank).
    `special` has the ids of the template's tokens (default: they follow the ranks). `words` are
    further tokens of whole text, which are found before the text is `split`; `unreachable` those
    that no text gives, but which a model may utter.
    """

    def __init__(self, ranks: dict[bytes, int], split: Split = isolate(WORD_PATTERN),
                 ids: list[int] | None = None, special: dict[str, int] | None = None,
                 words: dict[str, int] | None = None, unreachable: dict[int, bytes] | None = None):
        self.split, self.ids, self.words = split, ids or list(range(len(ranks))), words or {}
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
            raise UserError(
                f"{path}: expected a token in base64 and its rank in each line, got {error}"
            ) from None
        complete = [*ranks.values()] == [*range(len(rows))] and all(
            bytes([b]) in ranks for b in range(256))
        require(
            complete,
            f"{path}: expected the 256 bytes and what is merged of them, ranked from 0, got another list"
        )
        return cls(ranks)

    @classmethod
    def from_tokenizer_json(cls, path: str | Path) -> "Tokenizer":
        """Read a byte-level BPE from Hugging Face's tokenizer.json. Raises UserError that names
        what it does not know, and if tiktoken, which ranks merged bytes and not pairs, would merge
        otherwise."""
        require(Path(path).is_file(), f"{path}: expected a tokenizer.json, found none")
        require_contents(Path(path), "a tokenizer.json")
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**read_tokenizer(data))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError,
                regex.error) as error:
            what = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path}: expected the tokenizer.json of a byte-level BPE, got a broken one ({what})"
            ) from None

    @property
    def vocab_size(self) -> int:
        return max(self.tokens) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special token. Raises UserError if a pattern of the tokenizer
        takes too long."""
        ids = []
        try:
            for piece in self.cut(text):
                if piece in self.words:
                    ids.append(self.words[piece])
                else:
                    ids += [
                        self.ids[rank]
                        for word in self.split(piece)
                        for rank in self.merges.encode_ordinary(word)]
        except TimeoutError:
            raise UserError(
                f"expected a tokenizer that splits text in time, got a pattern that takes over {SPLIT_TIMEOUT} s"
            ) from None
        return ids

    def spell(self, ids: list[int]) -> str:
        """The text of any tokens; masks are shown as ░, and an id that is no token as �."""
        pieces = ["░".encode() if i == self.mask_id else self.tokens.get(i, b"\xff") for i in ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode(self, ids: list[int]) -> str:
        """The text of an answer: up to the first `<|eot_id|>` or EOS."""
        end = next((at for at, token in enumerate(ids) if token in (self.eot_id, self.eos_id)),
                   len(ids))
        return self.spell(ids[:end]).strip()

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
        """The answer, `<|eot_id|>`, and EOS (at least one) up to the next multiple of
        `multiple`."""
        ids = [*self.encode(answer), self.eot_id]
        return ids + [self.eos_id] * (multiple - len(ids) % multiple)


# ---------------------------------------------------------------------------- Hugging Face's format

BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_ID = 2**20
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level BPEs are written in letters: a printable byte is itself, the others are the letters
# from U+0100 on.
LETTERS = {chr(b): b for b in PRINTABLE} | {
    chr(0x100 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def read_tokenizer(data: dict) -> dict:
    """The arguments of a Tokenizer from the contents of a tokenizer.json. Raises UserError."""
    model, added = data["model"], data.get("added_tokens") or []
    require(
        model.get("type", "BPE") == "BPE", f"expected a model of type BPE, got {model.get('type')}")
    unknown = [
        name for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                          "fuse_unk", "byte_fallback") if model.get(name)]
    require(not unknown, f"expected a plain byte-level BPE, got one with {', '.join(unknown)}")
    require(not data.get("normalizer"),
            f"expected no normalizer, got {(data.get('normalizer') or {}).get('type')}")
    for token in added:
        flags = [
            flag for flag in ("lstrip", "rstrip", "single_word")
            if token.get(flag) and not token["special"]]
        require(
            not flags,
            f"expected added tokens that match as they are, got {token['content']!r} with {flags}")
    special = {token["content"]: token["id"] for token in added if token["special"]}
    words = {token["content"]: token["id"] for token in added if not token["special"]}
    every = [*(special | words | model["vocab"]).values()]
    odd = [i for i in every if type(i) is not int or not 0 <= i < MAX_ID]
    require(not odd, f"expected ids from 0 to {MAX_ID - 1}, got {odd[:1]}")
    missing = [token for token in SPECIAL_TOKENS if token not in special]
    require(not missing, f"expected LLaDA's special tokens, got none of {', '.join(missing)}")

    vocab = {
        token: i
        for token, i in model["vocab"].items()
        if token not in special and token not in words}
    shared = {*special.values()} & {*vocab.values(), *words.values()}
    require(
        not shared,
        f"expected special tokens with ids of their own, got {min(shared, default=0)} for ordinary text too"
    )
    merges = [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model["merges"]]
    bad = [
        merge for merge in merges
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys()]
    require(not bad, f"expected merges of two tokens to one, got {bad[:1]}")
    ids = {bytes(LETTERS[letter] for letter in token): i for token, i in vocab.items()}
    pairs = [tuple(bytes(LETTERS[letter] for letter in part) for part in merge) for merge in merges]
    ranks = rank_tokens(ids, pairs, bool(model.get("ignore_merges")))
    return {
        "ranks": ranks, "ids": [ids[token] for token in ranks], "special": special, "words": words,
        "split": read_split(data["pre_tokenizer"]),
        "unreachable": {i: token
                        for token, i in ids.items()
                        if token not in ranks}}


def pick(pattern: regex.Pattern, text: str) -> list[str]:
    """The matches of a pattern, without what is between them."""
    found = (match.group() for match in pattern.finditer(text, timeout=SPLIT_TIMEOUT))
    return [piece for piece in found if piece]


def with_space(split: Split, text: str) -> list[str]:
    """The pieces of a text that is made to begin with a space."""
    return split(text if text.startswith(" ") else " " + text)


def in_turn(splits: list[Split], text: str) -> list[str]:
    """Each split cuts the pieces of the one before."""
    pieces = [text]
    for split in splits:
        pieces = [part for piece in pieces for part in split(piece)]
    return pieces


def read_split(spec: dict | None) -> Split:
    """How a `pre_tokenizer` cuts a text. Raises UserError if it does not know how."""
    require(spec is not None, "expected a pre_tokenizer, got none")
    kind = spec["type"]
    if kind == "Sequence":
        return partial(in_turn, [read_split(step) for step in spec["pretokenizers"]])
    if kind == "Digits":
        return isolate(r"\p{N}" if spec["individual_digits"] else r"\p{N}+")
    if kind == "ByteLevel":
        split = isolate(BYTE_LEVEL_PATTERN) if spec.get("use_regex", True) else isolate("(?!)")
        return partial(with_space, split) if spec["add_prefix_space"] else split
    require(kind == "Split",
            f"expected the pre_tokenizer Split, ByteLevel, Digits or Sequence, got {kind}")
    (form, pattern), = spec["pattern"].items()
    pattern = regex.escape(pattern) if form == "String" else pattern
    if spec["behavior"] == "Isolated":
        return isolate(pattern)
    require(
        spec["behavior"] == "Removed" and spec.get("invert"),
        f"expected the pre_tokenizer Split to isolate, got {spec['behavior']}, invert {spec.get('invert')}"
    )
    return partial(pick, regex.compile(pattern))


def rank_tokens(ids: dict[bytes, int], merges: list[tuple[bytes, bytes]],
                ignore_merges: bool) -> dict[bytes, int]:
    """The ranks with which tiktoken does what the list of merges says. Raises UserError if there
    are none.

    A merge list ranks pairs; tiktoken joins any two neighbours whose bytes together are a token,
    the lowest rank first. Both do the same if, for each token, the two neighbours that are left
    before it is formed are a pair of the list, and the tokens are ranked as these pairs are.
    Whoever forms the token anywhere has formed it from these two.
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
    if ignore_merges:  # a word that is a token is that token, and so it is in tiktoken, always
        for token in ids:
            if token not in ranks:
                require(len(last_pair(token, ranks)) > 2,
                        f"tiktoken, which runs this, would merge {token!r} anywhere")
                ranks[token] = len(ranks)
    return ranks


def last_pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, ...]:
    """What is left of a token's bytes when everything is merged but the last two."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        at = joined.index(min(joined))
        if joined[at] == len(ranks):
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)
