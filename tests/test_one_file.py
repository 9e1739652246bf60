"""tutorials/one_file.py answers as the library does, token by token."""

import ast
import base64
import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffa2_mini.audio import encoder_frames, log_mel
from diffa2_mini.config import (
    ASSETS,
    DATA,
    AdapterConfig,
    AudioConfig,
    Config,
    DecodeConfig,
    LladaConfig,
    LoraConfig,
    WhisperConfig,
)
from diffa2_mini.fast.generate import Step
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.listen import Diffa2
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import SPECIAL_TOKENS, Tokenizer
from tutorials import one_file

CLIPS = sorted((DATA / "clips").glob("*.wav"))
QUESTIONS = ("What is said?", "Describe the audio.", "Which sounds do you hear?", "Who speaks?",
             "Which instrument plays? A. flute B. piano", "<|eot_id|>", "", " wie heißt\n\tes? 日 ")
SEEDS = (*range(20, 34), 35, 37, 42, 43, 46, 47)  # whose choices are clear: closest_choice
PARTS = (("acoustic", "semantic"), ("prompts", "semantic"), ("semantic",), ("acoustic",))


@pytest.fixture(scope="module")
def toy():
    return Diffa2.from_pretrained("toy"), *one_file.load()


def read(clip, diffa2):
    return torch.from_numpy(diffa2.load_clip(clip))


@pytest.mark.parametrize("clip", CLIPS, ids=lambda path: path.stem)
def test_it_answers_about_the_shipped_clips_as_the_library_does(clip, toy):
    diffa2, w, about = toy
    bpe, samples = one_file.read_tokenizer(ASSETS / about.config.text.tokenizer), read(clip, diffa2)
    for question in QUESTIONS:
        tokens = one_file.respond(samples, question, w, about, bpe).tolist()
        assert tokens == diffa2.ask(clip, question).tokens, question


def test_it_leaves_the_blocks_behind_an_end_as_they_are(toy):
    diffa2, w, about = toy
    bpe, n = one_file.read_tokenizer(ASSETS / about.config.text.tokenizer), 8
    settings = SimpleNamespace(gen_length=4 * n, block_length=n, factor=about.config.decode.factor)
    about = SimpleNamespace(**vars(about) | {
        "config": SimpleNamespace(**vars(about.config) | {"decode": settings})})
    for clip in CLIPS:
        tokens = one_file.respond(read(clip, diffa2), "What is said?", w, about, bpe).tolist()
        answer = diffa2.ask(clip, "What is said?", gen_length=4 * n, block_length=n)
        assert tokens == answer.tokens and tokens[-n:] == [diffa2.tokenizer.mask_id] * n


def micro(rng: random.Random) -> Config:
    """A size with everything drawn, of a few thousand parameters."""
    block, n_mels = rng.randint(3, 6), rng.randint(3, 8)
    heads, llada_heads = rng.randint(1, 3), rng.randint(1, 3)
    seconds, hop, layers = rng.randint(1, 2), rng.choice((320, 400, 640, 1000)), rng.randint(1, 3)
    mel_frames = seconds * 16_000 // hop
    taps = tuple(rng.sample(range(layers + 1), rng.randint(1, layers)))
    linears = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    targets = tuple(rng.sample(linears, rng.randint(1, 7)))
    return Config(
        size="micro",
        audio=AudioConfig(n_fft=rng.choice((256, 400)), hop_length=hop, n_mels=n_mels,
                          max_seconds=seconds),
        whisper=WhisperConfig(n_mels=n_mels, n_positions=(mel_frames + 1) // 2, taps=taps,
                              width=heads * rng.choice((4, 6)), n_layers=layers, n_heads=heads),
        adapter=AdapterConfig(n_queries=rng.randint(1, 5), qformer_layers=rng.randint(1, 2),
                              qformer_hidden=rng.randint(5, 12),
                              semantic_stride=rng.randint(3, 6), n_prompts=rng.randint(1, 3)),
        llada=LladaConfig(vocab_size=rng.randint(262, 300), n_layers=rng.randint(1, 3),
                          width=llada_heads * rng.choice((4, 6, 8)), n_heads=llada_heads,
                          hidden=rng.randint(5, 20), rope_theta=rng.choice((10.0, 1e4)),
                          norm_eps=rng.choice((1e-5, 1e-2))),
        lora=LoraConfig(rank=rng.randint(1, 3), alpha=rng.choice((1.0, 4.0)), targets=targets),
        decode=DecodeConfig(gen_length=2 * block, block_length=block, steps=2 * block,
                            factor=rng.choice((0.5, 1.0, 2.0))))


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "bytes.bpe"
    path.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    return path


def random_model(config: Config, with_lora: bool) -> Diffa2Model:
    model = Diffa2Model(config, llada=FastLlada).eval()
    if with_lora:
        model.add_lora()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.llada.ff_out.weight.mul_(12)  # sure of some tokens: a step commits several
    return model


def closest_choice(steps: list[Step], factor: float) -> float:
    """The smallest difference of probabilities that decided which token, or which place."""
    gaps = []
    for step in steps:
        first, second = step.likely[1][0, step.committed[0]].T  # of each committed token
        c = step.confidence[step.confidence > 0].sort(descending=True).values
        rule = torch.arange(2, len(c) + 2) * (1 - c) - factor
        k = int(step.committed.sum())
        gaps += [*(first - second), *rule.abs(), *(c[k - 1:k] - c[k:k + 1])]
    return min(gaps).item()


def first_logits(model: Diffa2Model, mel, n_frames: int, parts, prompt, mask_id: int):
    """The library's logits [R, V] of a response of masks."""
    n = model.config.decode.gen_length
    with torch.no_grad():
        audio = model.encode(mel[None], torch.tensor([n_frames]))
        state = DecodingState(model, model.embed_audio(audio, parts), [prompt], [n], mask_id)
        return state.logits(state.forward_all(torch.full((1, n), mask_id)))[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_it_equals_the_library_on_a_random_micro_size(seed, rank_file, monkeypatch):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    config, parts, question = micro(rng), PARTS[seed % len(PARTS)], "What is said?"
    model = random_model(config, with_lora=seed % 3 > 0)
    tokenizer, bpe = Tokenizer.from_ranks(rank_file), one_file.read_tokenizer(rank_file)
    about = json.loads(json.dumps({"config": dataclasses.asdict(config), "audio": parts}),
                       object_hook=lambda fields: SimpleNamespace(**fields))
    samples = 0.1 * torch.randn(int(config.audio.max_samples * rng.uniform(0, 1.3)))

    def weights():
        w = dict(model.state_dict())
        one_file.merge_lora(w, about.config.lora)
        return w

    ours = one_file.respond(samples, question, weights(), about, bpe)
    diffa2 = Diffa2(model, parts, tokenizer, torch.device("cpu"), torch.float32)
    cut = samples[:config.audio.max_samples].numpy()
    (answer,) = diffa2.answer([cut], [question], config.decode, top=2)
    assert ours.tolist() == answer.tokens
    assert closest_choice(answer.history, config.decode.factor) > 1e-3  # rounding is 1e-6

    # In float64 nothing but a fault makes a difference: rounding is 1e-16 of what is added up.
    model.double()
    mel = log_mel(samples, config.audio).double()
    prompt = tokenizer.prompt(config.text.system, question)
    monkeypatch.setattr(one_file, "log_mel", lambda samples, c: mel)
    monkeypatch.setattr(one_file, "decode", lambda predict, c, mask_id, eos_id: predict(
        torch.full((c.gen_length,), mask_id), torch.arange(c.gen_length)))
    logits = one_file.respond(samples, question, weights(), about, bpe)
    expected = first_logits(model, mel, encoder_frames(len(samples), config.audio), parts, prompt,
                            tokenizer.mask_id)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_log_mel_is_the_librarys(toy):
    diffa2, _, about = toy
    for clip in CLIPS:
        samples = read(clip, diffa2)
        mel = one_file.log_mel(samples, about.config.audio)
        assert torch.equal(mel, log_mel(samples, diffa2.config.audio))
    assert one_file.SPECIAL == SPECIAL_TOKENS


def test_the_command_prints_the_answer(toy):
    command = [sys.executable, one_file.__file__, str(CLIPS[0]), "Describe the audio."]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.stdout == toy[0].ask(CLIPS[0], "Describe the audio.").text + "\n"
    assert done.returncode == 0 and not done.stderr


def test_a_wrong_call_prints_one_line_of_usage(tmp_path, monkeypatch, capsys):
    other_rate = tmp_path / "other.wav"
    soundfile.write(other_rate, np.zeros(800), 8000)
    for arguments in ((), (CLIPS[0],), (CLIPS[0], "a", "b"), ("none.wav", "a"), (tmp_path, "a"),
                      (one_file.__file__, "a"), (other_rate, "a")):
        monkeypatch.setattr(sys, "argv", ["one_file.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match="^2$"):
            one_file.main()
        out, said = capsys.readouterr()
        assert not out and said.startswith("usage: ") and said.count("\n") == 1, arguments


def test_it_is_one_short_file_that_needs_no_other():
    source = Path(one_file.__file__).read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 90
    modules = {name for node in ast.walk(ast.parse(source))
               for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                            [alias.name for alias in node.names] if isinstance(node, ast.Import)
                            else [])}
    outside = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert outside == {"soundfile", "tiktoken", "torch", "safetensors"}
