"""Files and command lines that someone hostile could give us, each made from a number; and what
reads them."""

import io
import json
import pickle
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

import sample
import train
from data import toy, toybench
from diffa2_mini import weights
from diffa2_mini.audio import duration, load_audio
from diffa2_mini.command.script import run_script
from diffa2_mini.config import ASSETS, DATA, SIZES
from diffa2_mini.data import load_examples
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.evaluate import benchmarks
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.tokenizer_json import read_tokenizer_json
from diffa2_mini.tokenizer import SPECIAL_TOKENS, Tokenizer
from diffa2_mini.training.checkpoint import FORMAT, load_checkpoint

CONFIG, STAGES = SIZES["toy"]
CLIP = DATA / "clips" / "three_one_four.wav"
HERE = tempfile.TemporaryDirectory()  # gone when the process ends
MODEL = Diffa2Model(CONFIG)
NUMBERS = [
    "nan", "-nan", "inf", "-1", "0", "1e400", "9" * 400, "-0.0", "1.5", "0x10", "", " ", "1\n2",
    "١٢", "true", "1e-400",
    str(2**63)]
TEXTS = [
    "", " ", "\n", "/", "..", "../../etc/passwd", "a" * 5000, "--", "-", "\u202e", "💥" * 99,
    "no\nsuch", "C:\\x", "~", "$(true)", "{}", "\udcff", *SPECIAL_TOKENS, "<audio>"]
VALUES = [
    None, True, -1, 0, 1e308,
    float("nan"),
    float("inf"), 10**400, "", "x", [], [1], {}, {"a": 1}, "\0", "\ud800", "../" * 300,
    "a" * 10_000_000, [[[[]]]], *SPECIAL_TOKENS[:2]]
# what it is, whether it must be refused, and the call that reads it
Case = tuple[str, bool, Callable]


def mutated(body: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled or put in."""
    body = bytearray(body)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        within = len(body) if rng.random() < 0.5 else min(len(body), 128)
        at = rng.randrange(within or 1)
        how = rng.randrange(5)
        if how == 0:
            body[at:at + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            number = rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)])
            body[at:at + 4] = struct.pack("<I", number)
        elif how == 2:
            del body[at:]
        elif how == 3:
            body[at:at] = body[at:at + rng.randrange(1, 400)]
        else:
            body[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(body)


# -------------------------------------------------------------------------------------------- sound


def wav(rate: int = 16_000, channels: int = 1, bits: int = 16, claimed: int | None = None,
        format: int = 1, body: bytes = b"\1\2" * 800) -> bytes:
    """A wav file by hand, whose header claims what it is told to."""
    claimed = len(body) if claimed is None else claimed
    frame = channels * bits // 8
    header = struct.pack("<HHIIHH", format, channels % 2**16, rate, rate * frame % 2**32,
                         frame % 2**16, bits)
    parts = [b"RIFF", struct.pack("<I", (36 + claimed) % 2**32), b"WAVEfmt \x10\0\0\0", header,
             b"data", struct.pack("<I", claimed % 2**32), body]
    return b"".join(parts)


def caf(rate: float = 16_000.0, channels: int = 1, frames: int = 100) -> bytes:
    """A CAF file by hand: its header has room for any rate and any number of channels."""
    about = struct.pack(">d4sIIIII", rate, b"lpcm", 0, 2 * channels % 2**32, 1, channels % 2**32,
                        16)
    parts = [b"caff\0\1\0\0desc", struct.pack(">q", 32), about,
             b"data", struct.pack(">q", frames), b"\0" * 400]
    return b"".join(parts)


def flac_claiming(frames: int) -> bytes:
    body = bytearray(encoded("flac"))
    (fields,) = struct.unpack(">Q", b"\0\0\0" + body[21:26])
    body[21:26] = struct.pack(">Q", fields & ~(2**36 - 1) | frames)[3:]
    return bytes(body)


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file,
                    np.random.default_rng(0).standard_normal(16_000) / 8, 16_000,
                    format=form.upper())
    return file.getvalue()


BY_HAND = [("wav", wav(claimed=2**31 - 2), False), ("wav", wav(claimed=2**32 - 2), False),
           ("wav", wav(rate=0), True), ("wav", wav(rate=2**32 - 1), True),
           ("wav", wav(channels=0), True), ("wav", wav(channels=65_535), True),
           ("wav", wav(bits=0), True), ("wav", wav(bits=7), False),
           ("wav", wav(format=3, bits=32, body=struct.pack("<f", float("nan")) * 400), True),
           ("wav", wav(format=3, bits=32, body=struct.pack("<f", float("inf")) * 400), True),
           ("wav", wav(format=3, bits=64, body=struct.pack("<d", 1e300) * 400), True),
           ("wav", wav(body=b""), True), ("wav", b"", True), ("wav", b"RIFF", True),
           ("caf", caf(channels=10**6), True), ("caf", caf(rate=0.0), True),
           ("caf", caf(rate=float("nan")), True), ("caf", caf(rate=-1.0), True),
           ("caf", caf(frames=2**62), False), ("flac", flac_claiming(2**31), False),
           ("flac", flac_claiming(2**36 - 1), False), ("raw", b"\1\2" * 100, True),
           ("mp3", b"\xff\xfb\x90\x00" * 50, False), ("ogg", b"OggS" + b"\0" * 200, True)]


def sound(rng: random.Random, folder: Path) -> Case:
    if rng.random() < 0.4:
        form, body, refused = rng.choice(BY_HAND)
    else:
        form, refused = rng.choice(["wav", "flac", "ogg", "mp3"]), False
        body = mutated(encoded(form), rng)
    path = folder / f"clip.{form}"
    path.write_bytes(body)

    def read():
        duration(path)
        samples = load_audio(path, max_seconds=rng.choice([None, 4]))
        assert samples.dtype == np.float32 and np.isfinite(samples).all()
    return f"sound {form}", refused, read


# --------------------------------------------------------------------------------- lists of entries


def manifest(rng: random.Random, folder: Path) -> Case:
    good = {
        "audio_filepath": str(CLIP), "transcription": "three one four", "input": "What is said?",
        "target": "three", "rejected": "four", "duration": 1.0, "audio_id": "one", "type": "asr"}
    refused, stage, bad = False, STAGES[rng.choice([1, 2, 4])], dict(good)
    how = rng.randrange(7)
    if how == 0:  # a value of any kind anywhere
        bad[rng.choice([*good])] = rng.choice(VALUES)
    elif how == 1:
        missing = rng.choice([*good])
        del bad[missing]
        refused = missing == "audio_filepath"
    elif how == 6:
        bad["duration"] = rng.choice([float("nan"), float("inf"), -1, 1e308, "long", None])
    elif how == 2:
        up = "../" * rng.randrange(1, 40)
        bad["audio_filepath"] = up + rng.choice(["etc/passwd", "dev/zero", "proc/self/mem"])
        refused = True
    elif how == 3:
        bad = rng.choice(VALUES)
        refused = not isinstance(bad, dict) or True
    rows = [good, bad, good]  # ids are given twice
    text = json.dumps(rows) if rng.random() < 0.5 else "\n".join(map(json.dumps, rows))
    body = text.encode("utf-8", "surrogatepass")
    if how == 4:
        body = mutated(body, rng)
    elif how == 5:
        body = rng.choice([
            b"", b"[" * 100_000, b"[" + b'{"a":' * 100_000, b"\xff\xfe\0", b"null", b"NaN",
            b'"' + b"a" * 10_000_000, b"[]", b"{}", b"1" * 10_000])
        refused = True
    path = folder / "manifest.json"
    path.write_bytes(body)
    if rng.random() < 0.5:
        return f"manifest {how}", refused, lambda: load_examples(path, stage, CONFIG)
    name = rng.choice([*benchmarks.BENCHMARKS])
    if rng.random() < 0.5:
        return f"benchmark {name} {how}", False, lambda: benchmarks.load_questions(
            name, path, folder, rng.choice([None, 3]))
    scored = ["--benchmark", name, "--score", str(path), "--out", str(folder / "out.jsonl")]
    return f"answers {name} {how}", False, lambda: called(evaluate.main, scored)


# ------------------------------------------------------------------------------------------ weights


def safetensors(header, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(dtype: str = "F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS = [
    safetensors({}, length=10**6),
    safetensors({}, length=2**63),
    safetensors({}, length=2**64 - 1),
    safetensors(b""), b"", b"\0" * 8,
    safetensors({"a": tensor(), "b": tensor()}, b"\0" * 8),
    safetensors({"a": tensor(offsets=(0, 2**60))}, b"\0" * 8),
    safetensors({"a": tensor(offsets=(8, 0))}, b"\0" * 8),
    safetensors({"a": tensor(shape=(2**40, 2**40))}, b"\0" * 8),
    safetensors({"a": tensor("F33")}, b"\0" * 8),
    safetensors({"a": tensor("I64")}, b"\0" * 8),
    safetensors({"a": tensor(shape=(-2, ))}, b"\0" * 8),
    safetensors({"__metadata__": {"format": 3}, "a": tensor()}, b"\0" * 8),
    safetensors(b"[" * 100_000),
    safetensors({"a": 3}),
    safetensors({"blocks.0": tensor("BOOL", (8, ))}, b"\7" * 8)]
READERS = {
    "checkpoint": load_checkpoint,
    "whisper": lambda path: weights.load_part(MODEL.whisper, "whisper", path),
    "llada": lambda path: weights.load_part(MODEL.llada, "llada", path),
    "diffa2": lambda path: weights.load_diffa2(MODEL, path), "sample": lambda path: called(
        sample.main, [str(CLIP), "--checkpoint", str(path)])}


def tensors_file(rng: random.Random, folder: Path) -> Case:
    path, state = folder / "weights.safetensors", rng.choice([*READERS])
    refused = True
    how = rng.randrange(4)
    if how == 0:
        path.write_bytes(rng.choice(SAFETENSORS))
    elif how == 1:
        body = bytearray((ASSETS / "toy_diffa2.safetensors").read_bytes())
        size = struct.unpack("<Q", body[:8])[0]
        path.write_bytes(body[:8] + mutated(bytes(body[8:8 + size]), rng) + body[8 + size:])
        refused = False
    elif how == 2:  # names of ours, and metadata and shapes that are not
        shapes = {
            name: rng.choice([tuple(p.shape), (), (1, ), (3, 5)])
            for name, p in [*MODEL.named_parameters()][:rng.randrange(1, 400)]}
        metadata = {
            "format": rng.choice([FORMAT, "", "x" * 10**6]),
            "checkpoint": rng.choice(["", "[]", "{}", "null", '{"config": {}}', "[" * 99_999]),
            "sha256": "0" * 64}
        kinds = [torch.float32, torch.int8, torch.bool]
        tensors = {name: torch.zeros(shape, dtype=rng.choice(kinds))
                   for name, shape in shapes.items()}
        save_file(tensors, path, metadata)
    else:
        path.write_bytes(rng.choice([b"PK\3\4", b"\x80\2", b"version https://git-lfs", b"<html>",
                                     rng.randbytes(500)]))
    return f"safetensors {how} {state}", refused, lambda: READERS[state](path)


class Harmful:
    """What would run code when unpickled; here it would leave a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(rng: random.Random, folder: Path) -> Case:
    path, ran = folder / "weights.pt", folder.parent / f"{folder.name}.ran"
    content = rng.choice([{"blocks.0": Harmful(ran)}, {"model_state_dict": Harmful(ran)}, [], {}, 3,
                          {"a": 3}, {3: torch.zeros(2)}, {"a": torch.zeros(2)}, {
                              "encoder.conv1.weight": torch.zeros(10**6).to_sparse()
                          }, {"dims": {"n_mels": -1}, "model_state_dict": {}}])
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    body = path.read_bytes()
    if rng.random() < 0.5:
        path.write_bytes(mutated(body, rng))
    elif rng.random() < 0.1:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:  # a bomb
            archive.writestr("archive/data.pkl", bytes(10**8))
    state = rng.choice(["whisper", "llada", "diffa2"])

    def read():
        try:
            READERS[state](path)
        finally:
            assert not ran.exists(), "code in a file has run"
    return f"pickle {state}", True, read


# ---------------------------------------------------------------------------------------- tokenizer


def tokenizer_json() -> dict:
    """A small byte-level BPE that is read."""
    from diffa2_mini.published.tokenizer_json import LETTERS
    vocab = {letter: i for i, letter in enumerate(LETTERS)} | {"ab": 256, "abc": 257}
    added = [{"id": 258 + i, "content": token, "special": True}
             for i, token in enumerate(SPECIAL_TOKENS)]
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "ab c"]}, "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}


def tokenizer(rng: random.Random, folder: Path) -> Case:
    data = tokenizer_json()
    model, refused = data["model"], False
    how = rng.randrange(11)
    if how == 0:
        model["merges"], refused = ["abc a", "a bc"], True  # each needs the other
    elif how == 1:
        model["merges"], refused = rng.choice(
            [None, ["a"], ["a b c"], [["a"]], [[1, 2]], 3, ["z zz"], ["a b", "a b"]]), True
    elif how == 2:
        model["vocab"][rng.choice(["ab", "abc", "a"])] = rng.choice(
            [-1, 2**70, 1e9, None, "x", [], True, 10**400])
        refused = True
    elif how == 3:
        model["vocab"] = rng.choice([{}, [], None, 3, {"a": 0}])
        refused = True
    elif how == 4:
        data["added_tokens"] = rng.choice(
            [None, [], {}, [1], [{"id": 1}], [{"content": SPECIAL_TOKENS[0], "special": True}]])
        refused = True
    elif how == 5:
        data["pre_tokenizer"] = rng.choice([
            None, [], {"type": "Split"}, {"type": 3},
            {"type": "Split", "pattern": {"Regex": "(" * 500},
             "behavior": "Isolated"}, {"type": "Sequence", "pretokenizers": None}])
        refused = True
    elif how == 6:
        deep = {"type": "ByteLevel", "add_prefix_space": False}
        for _ in range(300):
            deep = {"type": "Sequence", "pretokenizers": [deep]}
        data["pre_tokenizer"] = deep
    elif how == 7:
        data["added_tokens"][0]["id"] = rng.choice([-5, 2**70, None, "x", 0, 256])
        refused = True
    elif how == 8:
        slow = rng.choice(["(a+)+$", "(a|a)*$", "(?:a*)*b", ""])
        data["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": slow}, "behavior": "Isolated"}
    body = json.dumps(data).encode()
    path = folder / "tokenizer.json"
    path.write_bytes(mutated(body, rng) if how == 9 else b"[" * 100_000 if how == 10 else body)

    def read():
        ids = read_tokenizer_json(path).encode("abc " * 50 + "a" * 40 + "!")
        assert all(isinstance(i, int) for i in ids)
    return f"tokenizer {how}", refused or how == 10, read


def ranks(rng: random.Random, folder: Path) -> Case:
    path = folder / "toy.bpe"
    body = (ASSETS / "toy.bpe").read_bytes()
    path.write_bytes(rng.choice([
                         b"", b"\xff", b"a", b"YQ== x\n", b"YQ== 0\n", b"YQ== -1\n",
                         mutated(body, rng),
                         mutated(body, rng),
                         mutated(body, rng)]))
    return "ranks", False, lambda: Tokenizer.from_ranks(path).encode("abc <|eot_id|>")


# ------------------------------------------------------------------------------------ command lines


def called(main: Callable, argv: list[str]) -> None:
    """A script as a user calls it. Raises UserError where it would end with 2; anything else but 0
    is wrong."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            code = run_script(main, argv)
        except SystemExit as error:
            code = error.code
    if code == 2:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"expected one line, got {errors.getvalue()[:500]!r}"
        raise UserError(lines[0])
    assert code in (0, None), f"ended with {code!r}"


FLAGS = {
    "sample": ("--gen-length", "--block-length", "--steps", "--factor", "--threshold", "--refresh",
               "--eos-threshold", "--revise", "--temperature", "--cfg", "--seed"),
    "train": ("--steps", "--epochs", "--batch-size", "--grad-accum", "--lr", "--warmup",
              "--lora-dropout", "--eval-every", "--save-every", "--sample-every", "--threads",
              "--seed", "--workers", "--processes"),
    "evaluate": ("--limit", "--batch-size", "--shuffle-options", "--factor", "--temperature")}
NAMES = {
    "sample": ("--prompt", "--checkpoint", "--size", "--whisper", "--llada", "--diffa2", "--device",
               "--dtype", "--cache", "--remasking"),
    "train": ("--data", "--validation", "--test", "--init", "--whisper", "--llada", "--diffa2",
              "--stage", "--size", "--device", "--dtype", "--recompute"),
    "evaluate": ("--file", "--audio-root", "--checkpoint", "--score", "--benchmark")}


@cache
def benchmark() -> str:
    """A small ToyBench, in a folder of its own."""
    with mock.patch.dict(toy.SPLITS, toybench=(2, 2, 2)):
        return str(toybench.make(Path(HERE.name)))


def command(rng: random.Random, folder: Path) -> Case:
    script = rng.choice([*FLAGS])
    flag = rng.choice(FLAGS[script] + NAMES[script])
    # a benchmark without a limit takes its time
    numbers = NUMBERS[:6] if flag == "--limit" else NUMBERS
    value = rng.choice(numbers if flag in FLAGS[script] else TEXTS)
    argv = {
        "sample": [str(CLIP)], "train": ["--dry-run", "--out",
                                         str(folder / "out")],
        "evaluate": ["--benchmark", "toy", "--file", benchmark(), "--limit", "1",
                     "--out", str(folder / "out.jsonl")]
    }[script]
    if rng.random() < 0.2 and script == "sample":
        argv = [rng.choice(TEXTS)]
    argv = [*argv, f"{flag}={value}"]
    main = {"sample": sample.main, "train": train.main, "evaluate": evaluate.main}[script]
    return f"command {script} {flag}={value[:40]!r}", False, lambda: called(main, argv)


KINDS = [
    sound, sound, sound, manifest, manifest, tensors_file, tensors_file, pickled, tokenizer, ranks,
    command, command]


def case(number: int, folder: Path) -> Case:
    """The case of a number; its files are in the folder."""
    return KINDS[number % len(KINDS)](random.Random(number), folder)
