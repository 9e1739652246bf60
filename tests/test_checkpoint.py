"""Checkpoints: what is saved comes back bit for bit, what does not fit is named, and a failed save
harms nothing."""

import copy
import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffa2_mini import weights
from diffa2_mini.config import SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training import files
from diffa2_mini.training.checkpoint import (
    ORIGINS,
    Checkpoint,
    begin,
    export,
    load_checkpoint,
    load_start,
    optimizer_tensors,
    require_same,
    require_same_parts,
    restore_optimizer,
    save_checkpoint,
)
from diffa2_mini.training.objective import adamw
from diffa2_mini.weights import restore, trained_tensors

TRAINS = ("semantic", "acoustic", "lora")


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def saved(path, model, **changes):
    """A checkpoint of the model, written; and what was written."""
    state = Checkpoint(model.config, stage=3, step=7, done=False, model=trained_tensors(model),
                       **changes)
    save_checkpoint(path, state)
    return state


def training(model):
    """The model's trained parameters, an optimiser of them, and the function that does a step on
    noise."""
    trained = model.train_only(TRAINS)
    optimizer = adamw(trained, 0.01, (0.9, 0.999), 0.05)

    def step():
        optimizer.zero_grad()
        sum((p * torch.randn(p.shape)).sum() for p in trained.values()).backward()
        optimizer.step()

    return trained, optimizer, step


def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(tmp_path, config, model):
    model.add_lora()
    _, optimizer, step = training(model)
    for _ in range(2):
        step()
    state = saved(tmp_path / "new/a.safetensors", model, audio=("acoustic", "semantic"),
                  optimizer=optimizer_tensors(optimizer, model),
                  settings={"seed": 3, "betas": [0.9, 0.999]},
                  fingerprints={"whisper": "a"})
    at_save = copy.deepcopy(state)
    torch.manual_seed(7)
    step()

    found = load_checkpoint(tmp_path / "new/a.safetensors")
    for name in ("config", "stage", "step", "done", "audio", "settings", "fingerprints"):
        assert getattr(found, name) == getattr(state, name)
    assert same(found.model, at_save.model) and same(found.optimizer, at_save.optimizer)
    assert not same(found.model, trained_tensors(model))
    torch.manual_seed(99)
    other = Diffa2Model(config)
    restore(other, found.model, "a file")
    trained, optimizer, step = training(other)
    restore_optimizer(optimizer, other, found.optimizer)
    assert same(optimizer_tensors(optimizer, other), found.optimizer)
    assert len(found.optimizer) == 3 * len(trained)
    torch.manual_seed(7)
    step()
    assert same(trained_tensors(other), trained_tensors(model))


def test_a_fused_optimiser_counts_its_steps_where_its_parameters_are():
    """As torch makes them on CUDA; where it is not fused, on the CPU."""
    model = torch.nn.Linear(2, 2, device="meta")
    tensors = {f"{key}.{name}": torch.zeros(()) for key in ("step", "exp_avg")
               for name, _ in model.named_parameters()}
    for fused, where in ((True, "meta"), (None, "cpu")):
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.defaults["fused"] = fused
        restore_optimizer(optimizer, model, tensors)
        assert {state["step"].device.type for state in optimizer.state.values()} == {where}
        assert {state["exp_avg"].device.type for state in optimizer.state.values()} == {"meta"}


def test_what_is_fitted_is_given_away_with_stage_1(tmp_path, config):
    """So that whoever starts from it does not fit the adapters anew, over what was trained."""
    adapter = dataclasses.replace(config.adapter, fitted=True)
    fitted = dataclasses.replace(config, adapter=adapter)
    model = Diffa2Model(fitted).requires_grad_(False)
    model.acoustic_connector.mean.fill_(3)
    model.semantic_connector.layernorm.bias.fill_(2)
    state = Checkpoint(fitted, 1, 7, True, trained_tensors(model), ("prompts", "semantic"))
    save_checkpoint(tmp_path / "stage1.safetensors", state)
    export(tmp_path / "stage1.safetensors", tmp_path / "given.safetensors")
    other = Diffa2Model(fitted)
    assert weights.load_diffa2(other, tmp_path / "given.safetensors") == ("prompts", "semantic")
    assert other.acoustic_connector.mean.eq(3).all()
    assert other.semantic_connector.layernorm.bias.eq(2).all()


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(tmp_path, model):
    state = saved(tmp_path / "a.safetensors", model)
    found = load_checkpoint(tmp_path / "a.safetensors")
    assert same(found.model, state.model) and found.optimizer == {} and found.done is False
    assert {name.split(".")[0]
            for name in found.model} == {
                "semantic_connector", "acoustic_connector", "trainable_prompts"}
    save_checkpoint(tmp_path / "a.safetensors", dataclasses.replace(state, done=True))
    assert load_checkpoint(tmp_path / "a.safetensors").done is True


def test_lora_tensors_make_the_model_grow_its_lora(config, model):
    other, plain = Diffa2Model(config), trained_tensors(model)
    model.add_lora()
    for tensor in trained_tensors(model).values():
        tensor.normal_()
    restore(other, trained_tensors(model), "a file")
    assert same(trained_tensors(other), trained_tensors(model))
    assert len(trained_tensors(other)) > len(plain)
    # has no LoRA yet, and leaves the model's own as it is
    restore(other, plain, "the stage before")
    assert same({n: p for n, p in trained_tensors(other).items() if "lora_" in n},
                {n: p for n, p in trained_tensors(model).items() if "lora_" in n})


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_cut_file(tmp_path, model, length):
    path = tmp_path / "a.safetensors"
    saved(path, model)
    path.write_bytes(path.read_bytes()[:length])
    message = error_of(load_checkpoint, path)
    assert message.startswith(f"{path}: ") and "cut off or damaged" in message


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.safetensors"
    assert "no such file" in error_of(load_checkpoint, path)
    assert "found a folder; name a stage's file" in error_of(load_checkpoint, tmp_path)
    path.write_text("this is no safetensors file, but text of some length")
    assert "cut off or damaged" in error_of(load_checkpoint, path)
    save_file({"x": torch.zeros(2)}, path)
    assert "another safetensors file" in error_of(load_checkpoint, path)
    save_file({"x": torch.zeros(2)}, path, {"format": "diffa2_mini 2"})
    assert ("expected a checkpoint of 'diffa2_mini 3', got 'diffa2_mini 2'; choose or train"
            in error_of(load_checkpoint, path))


@pytest.mark.parametrize("function", ["save_file", "replace", "fsync"])
def test_a_save_that_fails_midway_leaves_the_old_file(tmp_path, model, monkeypatch, function):
    path = tmp_path / "a.safetensors"
    saved(path, model)
    before = path.read_bytes()
    torch.nn.init.normal_(model.trainable_prompts.weight)

    def fail(*args):
        if function == "save_file":
            args[1].write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if function == "save_file" else files.os, function, fail)
    message = error_of(saved, path, model)
    assert message.startswith(f"{path}: ") and "No space left" in message
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    saved(path, model)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path, model):
    (tmp_path / "file").write_text("")
    assert "could not be written" in error_of(saved, tmp_path / "file/a.safetensors", model)


def test_what_does_not_fit_is_listed_and_nothing_is_copied(model):
    tensors = {name: torch.full_like(tensor, 7) for name, tensor in trained_tensors(model).items()}
    shape = list(tensors["trainable_prompts.weight"].shape)
    missing = next(name for name in tensors if name.startswith("semantic_connector."))
    tensors["trainable_prompts.weight"] = torch.zeros(1, 2)
    tensors["other.weight"] = tensors.pop(missing)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    message = error_of(restore, model, tensors, "a file")
    assert message.startswith("a file: ") and same(trained_tensors(model), before)
    for words in (f"missing {missing}", "unexpected other.weight",
                  f"trainable_prompts.weight has shape [1, 2], expected {shape}"):
        assert words in message
    assert message.count("; ") == 2
    assert f"and {len(before) - 8} more" in error_of(restore, model, {}, "a file")


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_frozen_tensor_is_unexpected(model, with_lora):
    if with_lora:
        model.add_lora()
    frozen = {"llada.wte.weight": torch.zeros_like(model.llada.wte.weight)}
    assert "unexpected llada.wte.weight" in error_of(
        restore, model, trained_tensors(model) | frozen, "a file")
    assert model.llada.wte.weight.any()


def test_a_missing_piece_of_lora_is_listed(model):
    model.add_lora()
    tensors = dict(trained_tensors(model))
    missing = next(name for name in tensors if name.endswith("lora_B"))
    del tensors[missing]
    assert f"missing {missing}" in error_of(restore, model, tensors, "a file")


def test_200_damaged_variants_never_load_as_something_else(tmp_path, model):
    path, rng = tmp_path / "a.safetensors", random.Random(0)
    state = saved(path, model)
    whole, refused = path.read_bytes(), 0
    for variant in range(200):
        if variant % 4 == 0:
            damaged = bytearray(whole[:rng.randrange(len(whole))])
        else:
            damaged = bytearray(whole)
            for _ in range(rng.choice([1, 8])):
                # half of them near the header
                at = rng.randrange(len(whole) if variant % 2 else len(whole) // 10)
                damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(path)
            assert same(found.model, state.model) and found.step == state.step
            assert same(found.optimizer, state.optimizer)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused == 200


def require_same_run(path, found, now):
    require_same(path, found, "choose another --out", config=now.config, settings=now.settings,
                 fingerprints=now.fingerprints)


def test_what_differs_from_the_run_that_was_begun_is_named(tmp_path, config):
    stage = dataclasses.replace(SIZES["toy"][1][3], steps=None)
    begun = begin(config, stage, seed=7)
    begun.fingerprints = {"whisper": "a", "llada": "b", "start": "c", "manifest": "d"}
    require_same_run(tmp_path, begun, copy.deepcopy(begun))
    in_pieces = begin(config, dataclasses.replace(stage, micro_batch=2, title="another"), seed=7)
    require_same_run(tmp_path, begun, in_pieces)  # decides nothing; nor do unknown fingerprints
    steps, epochs = (begin(config, dataclasses.replace(stage, steps=4, epochs=n), seed=7)
                     for n in (1, 2))
    require_same_run(tmp_path, steps, epochs)  # likewise
    for done in (True, False):
        found = dataclasses.replace(begun, done=done)
        for field in dataclasses.fields(stage):
            if field.name not in ("title", "data", "micro_batch"):
                other = begin(config, stage, seed=7)
                other.settings[field.name] = "another"
                name = field.name.replace("_", " ")
                message = error_of(require_same_run, tmp_path, found, other)
                assert f"was trained with {name} " in message
        other = begin(config, stage, seed=8)
        assert "seed 7, got 8" in error_of(require_same_run, tmp_path, found, other)
        for name, what in ORIGINS.items():
            fingerprints = begun.fingerprints | {name: "e"}
            other = dataclasses.replace(begun, fingerprints=fingerprints)
            message = error_of(require_same_run, tmp_path, found, other)
            assert f"was trained with {what}; " in message
    whisper = dataclasses.replace(config.whisper, taps=(1, 2, 3))
    narrow = dataclasses.replace(config, whisper=whisper)
    other = begin(narrow, dataclasses.replace(stage, lr=1.0), seed=7)
    message = error_of(require_same_run, tmp_path, begun, other)
    assert f"whisper.taps (0, 2, 3), got (1, 2, 3); lr {stage.lr}, got 1.0" in message


@pytest.mark.parametrize("part, change", [
    ("whisper", {"taps": (1, 2, 3)}), ("llada", {"rope_theta": 1e4}), ("llada", {"norm_eps": 1e-6}),
    ("lora", {"alpha": 1.0}), ("text", {"train_system": "Listen."}), ("size", "toy")])
def test_a_start_of_another_model_is_refused_if_shapes_fit(tmp_path, config, model, part, change):
    path = tmp_path / "a.safetensors"
    saved(path, model)
    assert load_start(path, config, is_named=True).step == 7
    changed = change if part == "size" else dataclasses.replace(getattr(config, part), **change)
    message = error_of(load_start, path, dataclasses.replace(config, **{part: changed}), True)
    assert f"was trained with {part}" in message and "got" in message
    decodes = dataclasses.replace(config, decode=SIZES["toy"][0].decode)
    assert load_start(path, decodes, is_named=True)


def test_the_stage_before_is_no_start_before_it_is_done(tmp_path, config, model):
    path = tmp_path / "a.safetensors"
    state = saved(path, model)
    assert "expected a stage that is done, got 7 steps" in error_of(load_start, path, config, False)
    save_checkpoint(path, dataclasses.replace(state, done=True))
    assert load_start(path, config, is_named=False).done


def test_other_parts_than_a_checkpoint_was_trained_on_are_named(tmp_path, config, model):
    found = saved(tmp_path / "a.safetensors", model,
                  fingerprints={"whisper": "a", "llada": "b", "start": "c"})
    require_same_parts(tmp_path, found, {"whisper": "a", "llada": "b"})
    message = error_of(require_same_parts, tmp_path, found, {"whisper": "a", "llada": "c"})
    assert "with another backbone (--llada); " in message and "--other-parts" in message


def test_a_shared_copy_still_knows_what_it_belongs_to(tmp_path, model):
    about = dict(settings={"seed": 3}, fingerprints={"whisper": "a"})
    state = saved(tmp_path / "a.safetensors", model, optimizer={"step.x": torch.zeros(())}, **about)
    message = error_of(export, tmp_path / "a.safetensors", tmp_path / "b.safetensors", True)
    assert "expected a stage that is done, got 7 steps" in message
    save_checkpoint(tmp_path / "a.safetensors", dataclasses.replace(state, done=True))
    export(tmp_path / "a.safetensors", tmp_path / "b.safetensors", half=True)
    found = load_checkpoint(tmp_path / "b.safetensors")
    assert found.done and found.optimizer == {}
    assert all(getattr(found, name) == value for name, value in about.items())
    assert all(torch.equal(found.model[name], t.half()) for name, t in state.model.items())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what is mapped")
def test_a_checkpoint_that_was_read_is_not_mapped(tmp_path, model):
    path = tmp_path / "a.safetensors"
    saved(path, model, optimizer={"step.x": torch.ones(())})
    tensors, _ = weights.read_tensors(path, "a checkpoint")
    assert str(path) in Path("/proc/self/maps").read_text()  # as weights are, which no run writes
    del tensors
    found = load_checkpoint(path)
    assert found.model and str(path) not in Path("/proc/self/maps").read_text()


def test_the_state_of_an_optimiser_fits_by_name_whatever_its_groups(model):
    trained = model.train_only(TRAINS)
    plain = torch.optim.AdamW(trained.values(), lr=0.01)  # one group, as before vectors had theirs
    for i, p in enumerate(trained.values()):
        p.grad = torch.full_like(p, i + 1.0)
    plain.step()
    tensors = optimizer_tensors(plain, model)
    grouped = adamw(trained, 0.01, (0.9, 0.999), 0.05)
    restore_optimizer(grouped, model, tensors)
    assert same(optimizer_tensors(grouped, model), tensors)
    assert all(torch.equal(grouped.state[p]["exp_avg"], plain.state[p]["exp_avg"])
               for p in trained.values())
