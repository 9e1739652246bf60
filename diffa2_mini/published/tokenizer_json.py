"""LLaDA's tokenizer, or another byte-level BPE, from a tokenizer.json of Hugging Face's library."""

import json
from pathlib import Path

import regex

from ..errors import UserError, read_text, require
from ..tokenizer import SPECIAL_TOKENS, Split, Tokenizer, splitter

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
    text = read_text(path, "a tokenizer.json")
    try:
        return build_tokenizer(json.loads(text))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError,
            regex.error) as error:
        raise UserError(f"{path}: expected a byte-level BPE, got none ({error!r})") from None


def to_bytes(letters: str) -> bytes:
    return bytes(LETTERS[letter] for letter in letters)


def build_tokenizer(data: dict) -> Tokenizer:
    """The tokenizer from a tokenizer.json's contents. Raises UserError, or what Python raises."""
    model, added = data["model"], data.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added if token["special"]}
    words = {token["content"]: token["id"] for token in added if not token["special"]}
    check(model, added, data.get("normalizer"), special)
    apart = special | words
    ids = {to_bytes(token): i for token, i in model["vocab"].items() if token not in apart}
    every = [*special.values(), *words.values(), *ids.values()]
    odd = [i for i in every if type(i) is not int or not 0 <= i < MAX_ID]
    require(not odd, f"expected ids from 0 to {MAX_ID - 1}, got {odd[:1]}")
    require(len({*every}) == len(every), "expected each id for one token, got one twice")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    pairs = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    ranks = rank_tokens(ids, pairs, bool(model.get("ignore_merges")))
    return Tokenizer(ranks, ids, special, words, read_splits(data.get("pre_tokenizer")))


def check(model: dict, added: list[dict], normalizer: dict | None, special: dict) -> None:
    """Raise UserError unless this is a BPE with LLaDA's special tokens and no other features."""
    more = [name for name in UNKNOWN_FEATURES if model.get(name)]
    more += [f"type {model['type']}"] if model.get("type", "BPE") != "BPE" else []
    more += [f"normalizer {normalizer.get('type')}"] if normalizer else []
    more += [f"{flag} of {token['content']!r}" for token in added if not token["special"]
             for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
    require(not more, f"expected a plain byte-level BPE, got one with {', '.join(more)}")
    missing = [token for token in SPECIAL_TOKENS if token not in special]
    require(not missing, f"expected LLaDA's special tokens, got none of {', '.join(missing)}")


def add_space(text: str) -> list[str]:
    return [text if text.startswith(" ") else " " + text]


def read_splits(spec: dict | None) -> list[Split]:
    """How a `pre_tokenizer` splits a text. Raises UserError for one that is not known here."""
    kind = spec and spec["type"]
    if kind == "Sequence":
        return [split for step in spec["pretokenizers"] for split in read_splits(step)]
    if kind == "Digits":
        return [splitter(r"\p{N}" if spec["individual_digits"] else r"\p{N}+")]
    if kind == "ByteLevel":
        pattern = BYTE_LEVEL_PATTERN if spec.get("use_regex", True) else "(?!)"
        return [add_space, splitter(pattern)] if spec["add_prefix_space"] else [splitter(pattern)]
    require(kind == "Split",
            f"expected the pre_tokenizer Split, ByteLevel, Digits or Sequence, got {kind}")
    (form, pattern), = spec["pattern"].items()
    behavior, invert = spec["behavior"], spec.get("invert")
    require(behavior == "Isolated" or behavior == "Removed" and invert,
            f"expected the pre_tokenizer Split to isolate, got {behavior}, invert {invert}")
    pattern = regex.escape(pattern) if form == "String" else pattern
    return [splitter(pattern, matches_alone=behavior == "Removed")]


def rank_tokens(ids: dict[bytes, int], merges: list[tuple[bytes, bytes]],
                ignore_merges: bool) -> dict[bytes, int]:
    """The ranks with which tiktoken merges as the list `merges` says; UserError if there are none.

    The list ranks pairs; tiktoken ranks tokens, and merges the two neighbours that give the token
    of lowest rank. Both do the same if, for each token, the last two parts that it is merged from
    are a pair of the list, and the tokens are ranked as these pairs are.
    """
    order = {pair: at for at, pair in enumerate(merges)}
    require(len(order) == len(merges), "expected each merge once, got one twice")
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    last = -1
    for token in list(ranks)[256:]:
        at = order.get(last_pair(token, ranks), -1)
        require(at > last, f"the token {token!r} is merged otherwise by tiktoken, which runs this; "
                           "use a tokenizer whose merges are ranked as its tokens are")
        last = at
    if ignore_merges:  # a word that is a token stays whole, as it always does in tiktoken
        for token in [token for token in ids if token not in ranks]:
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
