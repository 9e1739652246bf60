"""The numbers: `full` has exactly the published parameter counts, and a config survives its trip
through JSON."""

import dataclasses
import json
from collections import Counter

import pytest
import torch

from diffa2_mini.config import SIZES, DecodeConfig, from_dict
from diffa2_mini.errors import UserError
from diffa2_mini.model import Diffa2Model, part_of

COUNTS = {  # SPEC section 1
    "whisper": 636_968_960,  # its fixed sinusoid table included
    "semantic": 36_392_448,
    "acoustic": 47_892_992,
    "prompts": 81_920,
    "llada": 8_015_581_184,
    "lora": 14_680_064,
}


@pytest.fixture(scope="module")
def full_counts() -> dict[str, int]:
    """Numbers in each part of the full model, built without memory."""
    with torch.device("meta"):
        model = Diffa2Model(SIZES["full"][0])
        model.add_lora()
    counts = dict.fromkeys(COUNTS, 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.is_meta
        counts[part_of(name)] += tensor.numel()
    return counts


@pytest.mark.parametrize("part", COUNTS)
def test_full_size_has_the_published_parameter_count(full_counts, part):
    assert full_counts[part] == COUNTS[part]


def test_what_is_ever_trained_fills_the_published_file(full_counts):
    trained = sum(full_counts[part] for part in ("semantic", "acoustic", "prompts", "lora"))
    assert 4 * trained == 396_189_696  # bytes in float32


@pytest.mark.parametrize("size", SIZES)
def test_json_round_trip_is_the_identity(size):
    config = SIZES[size][0]
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_json_carries_the_values_and_not_the_defaults():
    decode = DecodeConfig(gen_length=64, block_length=8, steps=16, factor=None)
    config = dataclasses.replace(SIZES["toy"][0], decode=decode)
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(config)))).decode == decode


@pytest.mark.parametrize("part, changes", [
    ("whisper", {"n_width": 2}),
    ("audio", {"hop": 160}),
    ("text", {"system_prompt": "Hello."}),
    ("decode", {"gen_length": 24, "block_length": 16}),
    ("decode", {"remasking": "lowest"}),
])
def test_from_dict_refuses_bad_parts(part, changes):
    values = dataclasses.asdict(SIZES["toy"][0])
    values[part].update(changes)
    with pytest.raises(UserError):
        from_dict(values)


@pytest.mark.parametrize(
    "values", [None, [], "toy", {"size": "toy", "speaker": {}}, {"size": "toy", "colour": "red"}])
def test_from_dict_refuses_what_is_not_a_config(values):
    with pytest.raises(UserError):
        from_dict(values)


@pytest.mark.parametrize(
    "part, name", [(None, "size"), (None, "llada"), ("llada", "rope_theta"), ("lora", "alpha")])
def test_from_dict_refuses_missing_fields(part, name):
    values = dataclasses.asdict(SIZES["toy"][0])
    del (values if part is None else values[part])[name]
    with pytest.raises(UserError):
        from_dict(values)


def test_a_switch_that_is_off_may_be_missing_as_in_checkpoints_from_before_it():
    for size in ("toy", "small"):
        values = dataclasses.asdict(SIZES[size][0])
        del values["adapter"]["only_sound"], values["decode"]["revise"]
        found = from_dict(values)
        assert not found.adapter.only_sound and found.decode.revise is None


@pytest.mark.parametrize("bad", [
    dict(gen_length=0),
    dict(gen_length=-32, block_length=-32),
    dict(gen_length=100, block_length=32),
    dict(gen_length=64, block_length=16, steps=2),
    dict(gen_length=64, block_length=16, steps=63),
    dict(steps=0),
    dict(factor=0.0),
    dict(factor=float("nan")),
    dict(temperature=-0.1),
    dict(temperature=float("nan")),
    dict(temperature=float("inf")),
    dict(temperature=1e7),
    dict(cfg=float("nan")),
    dict(cfg=float("inf")),
    dict(seed=-1),
    dict(seed=2**63),
    dict(refresh=2),
    dict(eos_threshold=1.1),
    dict(revise=-0.1),
    dict(factor=None, revise=0.5),
    dict(capture=True),
    dict(cache="dual", compile=True),
    dict(cache="dual", refresh=0),
    dict(remasking="best"),
])
def test_decoding_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        DecodeConfig(**bad)


@pytest.mark.parametrize("stage", (1, 2, 3, 4))
def test_toy_and_full_curricula_differ_in_numbers_alone(stage):
    toy, full = SIZES["toy"][1][stage], SIZES["full"][1][stage]
    for field in ("trains", "audio", "data", "schedule", "preference"):
        assert getattr(toy, field) == getattr(full, field)


def test_dropout_is_the_releases_at_its_sizes_and_never_in_preference_optimisation():
    dropouts = {size: [(stage.lora_dropout, stage.adapter_dropout) for stage in stages.values()]
                for size, (_, stages) in SIZES.items()}
    assert dropouts["full"] == [(0, 0), (0, 0.1), (0.05, 0.1), (0, 0)]
    assert dropouts["diffa1"] == [(0, 0), (0, 0.1)]
    assert dropouts["small"] == dropouts["full"]
    assert dropouts["toy"] == [(0, 0)] * 4
    for name in ("lora_dropout", "adapter_dropout"):
        with pytest.raises(UserError, match="no dropout"):
            dataclasses.replace(SIZES["full"][1][4], **{name: 0.1})


@pytest.mark.parametrize("size", SIZES)
def test_taps_positions_and_frames_fit_together(size):
    config = SIZES[size][0]
    assert config.audio.max_frames == 2 * config.whisper.n_positions
    assert config.audio.n_mels == config.whisper.n_mels
    assert set(config.whisper.taps) <= set(range(config.whisper.n_layers + 1))
    assert config.decode.gen_length % config.text.response_multiple == 0


def test_small_hears_with_whisper_tiny_and_ships_in_24_megabytes():
    config = SIZES["small"][0]
    assert (config.audio.n_mels, config.whisper.width, config.whisper.n_heads) == (80, 384, 6)
    assert config.audio.max_seconds == 13 and config.adapter.only_sound
    assert config.llada.vocab_size <= 2048
    model = Diffa2Model(config, "meta")
    model.add_lora()
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert counts["llada"] <= 4e6
    assert 2 * (sum(counts.values()) - counts["whisper"]) <= 24e6  # bytes in float16
