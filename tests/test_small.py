"""The mixed data of `small`: whole paths, no leak, a share of each corpus; its texts and tokenizer;
and train.py on it, from stage 0 on, with a published encoder."""

import dataclasses
import json
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from mini import MINI, refused
from safetensors.torch import save_file

import train
from data import orders, people, small
from data.toy import write_json
from data.toy_sound import DIGITS
from diffa2_mini import config as configs
from diffa2_mini.command.script import run_script
from diffa2_mini.config import ASSETS, SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.whisper import WhisperEncoder
from tutorials import small_without

SMALL = SIZES["small"][0]


def row(clip, type, domain="speech", **more):
    return {"audio_filepath": clip, "input": "What?", "target": "yes", "rejected": "no",
            "chosen": "yes", "type": type, "domain": domain, "transcription": "some one"} | more


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folders of the four corpora, each with a clip that all of its rows are about."""
    folder = tmp_path_factory.mktemp("data")
    for name, n in {"fsdd": 5, "orders": 7, "people": 4, "toy": 6}.items():
        (folder / name / "clips").mkdir(parents=True)
        soundfile.write(folder / name / "clips" / "a.wav", np.random.default_rng(0).uniform(
            -0.5, 0.5, 8000 * n), 16_000)
        rows = [row("clips/a.wav", f"{name} {i % 2}", "music" if name == "toy" and i % 2 else
                    "speech") for i in range(n)]
        for manifest in small.NAMES:
            if (name, manifest) != ("orders", "stage1"):
                write_json(folder / name / f"{manifest}.json", rows)
    return folder


def test_the_manifests_of_all_corpora_become_one(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(small, "MOST", {"sft": {"orders": 6}})
    monkeypatch.setattr(small, "N_PER_TYPE", 2)
    assert run_script(small.main, ["--data", str(data), "--out", str(tmp_path / "out")]) == 0
    assert "stage1.json 15, sft.json 18" in capsys.readouterr().out
    types = {}
    for name in small.NAMES:
        rows = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        types[name] = Counter(each["type"].split()[0] for each in rows)
        for each in rows:
            corpus = each["type"].split()[0]
            assert each["audio_filepath"] == str((data / corpus / "clips/a.wav").resolve())
            assert name == "stage1" or corpus != "toy" or each["domain"] == "music"
    assert types["stage1"] == {"fsdd": 5, "people": 4, "toy": 6}
    assert types["sft"] == {"fsdd": 5, "orders": 6, "people": 4, "toy": 3}  # 7 orders are too many
    assert types["validation"] == {"fsdd": 4, "orders": 4, "people": 4, "toy": 2}


def test_what_is_missing_is_one_line(tmp_path, capsys):
    assert "python data/people.py && python data/toy.py makes them" in refused(
        small.main, capsys, "--data", tmp_path)
    with pytest.raises(UserError, match="python data/people.py makes it"):
        small.texts(tmp_path)


@pytest.mark.parametrize("change", [
    None, 3, {"domain": None}, {"type": 3}, {"audio_filepath": None}, {"audio_filepath": "\0"}])
def test_a_damaged_manifest_of_a_corpus_is_one_line(change, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    path = tmp_path / "data" / "toy" / "sft.json"
    rows = json.loads(path.read_text())
    rows[2] = rows[2] | change if isinstance(change, dict) else change
    write_json(path, rows)
    message = refused(small.main, capsys, "--data", tmp_path / "data", "--out", tmp_path / "out")
    assert "toy/sft.json: entry 3: " in message and "data/toy.py makes it anew" in message
    assert not (tmp_path / "out").exists()


def test_a_manifest_without_transcripts_is_one_line(tmp_path):
    write_json(tmp_path / "people" / "stage1.json", [row("a.wav", "asr"), {"transcription": None}])
    with pytest.raises(UserError, match="stage1.json: entry 2: the field transcription is missing"):
        small.texts(tmp_path / "people")


def test_texts_are_answered_by_their_descriptions(data):
    draw, rng = small.texts(data / "people"), np.random.default_rng(0)
    types = Counter()
    for _ in range(600):
        example = draw(rng)
        text, types[example.type] = " ".join(example.words()), types[example.type] + 1
        if example.type in orders.SLOTS:
            assert example.answer in text
        elif example.type == "none":
            slot = next(slot for slot, wordings in orders.WORDINGS.items()
                        if example.instruction in wordings)
            assert slot == "size" or not any(f" {value}" in text for value in orders.VALUES[slot])
        elif example.type in ("adult", "child"):
            assert example.answer == example.traits[1] and example.answer in people.KINDS
    assert {"order", "none", "drink", "adult", "child", "asr", "sounds"} <= {*types}


def test_half_of_the_digits_and_of_the_toys_clips_are_not_counted():
    """Whisper writes down what is said; ordinals must not be all that tells the order."""
    draw, rng = partial(small.draw_text, {False: ["some one"]}), np.random.default_rng(0)
    examples = [draw(rng) for _ in range(2500)]
    counted = [bool(example.items) for example in examples if example.traits[0] == "sound"]
    assert 0.25 < np.mean(counted) < 0.75 and len(counted) > 100
    digits = [example for example in examples if example.type == "asr"
              and {*example.answer.split()} <= {*DIGITS}]
    for example in digits:
        said = [word for word in example.words() if word in DIGITS]
        assert " ".join(said) == example.answer
    assert np.mean([bool(example.items) for example in digits]) < 0.3


def test_the_shipped_tokenizer_has_a_token_for_each_word_of_orders_and_people():
    tokenizer = load_tokenizer(SMALL)
    assert tokenizer.vocab_size <= SMALL.llada.vocab_size
    for values in (*orders.VALUES.values(), people.KINDS):
        for word in " ".join(values).split():
            assert len(tokenizer.encode(f" {word}")) == 1, word
    longest = orders.sentence({slot: max(values, key=len)
                               for slot, values in orders.VALUES.items()})
    assert len(tokenizer.response(longest, 1)) <= SMALL.decode.gen_length


@pytest.mark.slow
def test_a_tokenizer_is_trained_on_the_texts(data, tmp_path):
    small.make_tokenizer(tmp_path / "small.bpe", data / "people")
    tokenizer = Tokenizer.from_ranks(tmp_path / "small.bpe")
    assert tokenizer.vocab_size <= 2048 and len(tokenizer.encode(" cappuccino")) == 1
    assert tokenizer.decode(tokenizer.encode("some one, 2 über")) == "some one, 2 über"


@pytest.fixture
def narrow(monkeypatch):
    """`small` with little of everything; its encoder hears 1 s."""
    config = dataclasses.replace(
        SMALL, audio=dataclasses.replace(SMALL.audio, max_seconds=1),
        whisper=dataclasses.replace(SMALL.whisper, n_positions=50, width=24, n_heads=2),
        adapter=dataclasses.replace(SMALL.adapter, n_queries=3, qformer_layers=1,
                                    qformer_hidden=16),
        llada=dataclasses.replace(SMALL.llada, width=24, n_heads=2, n_layers=2, hidden=32))
    monkeypatch.setitem(configs.SIZES, "small", (config, SIZES["small"][1]))
    return config


def test_all_stages_of_small_run_on_a_published_encoder(data, narrow, tmp_path, monkeypatch,
                                                        capsys):
    """Stage 0 makes the backbone; the encoder is in Hugging Face's folder, for longer clips."""
    out, folder = tmp_path / "runs", tmp_path / "weights" / "openai" / "whisper-tiny.en"
    monkeypatch.chdir(tmp_path)
    folder.mkdir(parents=True)
    longer = dataclasses.replace(narrow.whisper, n_positions=200)
    save_file({f"model.encoder.{name}": tensor for name, tensor in
               WhisperEncoder(longer).state_dict().items()}, folder / "model.safetensors")
    few = ["--size", "small", "--out", str(out), *MINI]
    stage_0 = ["--stage", "0", *few, "--sample-every", "200"]  # the default: it prints no samples
    assert run_script(train.main, stage_0) == 2
    assert "--parts llada makes its backbone" in capsys.readouterr().err
    monkeypatch.setattr(small.texts, "__defaults__", (data / "people",))
    train.main([*stage_0, "--parts", "llada"])
    small.mix(data, tmp_path / "mixed")
    made = str(out / "small_llada.safetensors")
    train.main([*few, "--llada", made, "--data", str(tmp_path / "mixed"), "--steps", "2"])
    printed = capsys.readouterr().out
    assert "the first 50 of 200 positions are used" in printed
    assert f"whisper: {folder.relative_to(tmp_path)}, llada: {made}" in printed
    saved = [load_checkpoint(out / f"stage{n}.safetensors").model for n in (1, 2, 3, 4)]
    means = [tensors["acoustic_connector.mean"] for tensors in saved]
    assert means[0].all()  # fitted at the start of stage 1
    assert all(torch.equal(means[0], other) for other in means)
    assert torch.isfinite(torch.tensor([json.loads(line)["loss"] for line in (
        out / "log.jsonl").read_text().splitlines() if '"loss"' in line])).all()

    small_without.main([*few, "--llada", made, "--data", str(tmp_path / "mixed"), "--steps", "1",
                        "--out", str(tmp_path / "without"), "--size", "toy"])  # it has one size
    first, *rest = (load_checkpoint(tmp_path / f"without/stage{n}.safetensors") for n in (1, 2, 4))
    assert first.audio == ("prompts", "semantic")
    acoustic = [name for name in first.model if name.startswith("acoustic_connector")]
    for later in rest:
        assert later.audio == ("semantic",)
        assert all(torch.equal(later.model[name], first.model[name]) for name in acoustic)
        assert not torch.equal(later.model["semantic_connector.linear_connector.0.weight"],
                               first.model["semantic_connector.linear_connector.0.weight"])


def test_the_rank_file_ships():
    assert (ASSETS / SMALL.text.tokenizer).stat().st_size < 40_000
