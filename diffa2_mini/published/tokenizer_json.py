"""LLaDA's tokenizer, or any other byte-level BPE, from Hugging Face's tokenizer.json, without their
library."""

import json
from functools import partial
from pathlib import Path

import regex

from ..errors import UserError, require, require_contents
from ..tokenizer import SPECIAL_TOKENS, Split, Tokenizer, cut, isolate

BYTE_LEVEL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MAX_ID = 2**20
UNKNOWN_FEATURES = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                    "fuse_unk", "byte_fallback")
# The file writes bytes as letters: printable ones as they are, the others as U+0100 and following.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
LETTERS = {chr(b): b for b in PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(OTHERS)}


def read_tokenizer_json(path: str | Path) -> Tokenizer:
    """The byte-level BPE of a tokenizer.json. Raises UserError if it is broken, has a feature that
    is not known here, or is merged otherwise by tiktoken."""
    require(Path(path).is_file(), f"{path}: expected a tokenizer.json, found none")
    require_contents(Path(path), "a tokenizer.json")
    try:
        return Tokenizer(**arguments_of(json.loads(Path(path).read_text(encoding="utf-8"))))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError,
            regex.error) as error:
        raise UserError(f"{path}: expected the tokenizer.json of a byte-level BPE, got a "
                        f"broken one ({type(error).__name__}: {error})") from None


def to_bytes(letters: str) -> bytes:
    return bytes(LETTERS[letter] for letter in letters)


def arguments_of(data: dict) -> dict:
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
