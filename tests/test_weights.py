"""The frozen parts: written and read under their published names, and a file of something else is
told apart."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from hostile_cases import tokenizer_json
from mini import ROOT, SECONDS
from safetensors import safe_open
from safetensors.torch import save_file

from data.pretraining.stage0 import PUBLISHED_PREFIX, save_part
from diffa2_mini import weights
from diffa2_mini.audio import duration, load_audio
from diffa2_mini.config import SIZES, Config, WhisperConfig
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import UserError
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.published.tokenizer_json import read_tokenizer_json
from diffa2_mini.tokenizer import SPECIAL_TOKENS
from diffa2_mini.training import checkpoint
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.files import save_tensors
from diffa2_mini.weights import Loading, build, load_part, read_tensors
from diffa2_mini.whisper import WhisperEncoder

PARTS = ("whisper", "llada")
CPU = torch.device("cpu")


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def other_part(part, path):
    """The shipped encoder or backbone with one number changed."""
    tensors, metadata = read_tensors(weights.SHIPPED[part], "weights")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_tensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize("part", PARTS)
def test_a_part_comes_back_within_the_precision_of_float16(tmp_path, config, model, part):
    save_part(getattr(model, part), part, tmp_path / "part.safetensors", made_by="a test")
    torch.manual_seed(1)
    other = getattr(Diffa2Model(config), part)
    load_part(other, part, tmp_path / "part.safetensors")
    for name, tensor in getattr(model, part).state_dict().items():
        found = other.state_dict()[name]
        assert found.dtype == torch.float32 and torch.equal(found, tensor.half().float())
        torch.testing.assert_close(found, tensor, rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize(
    "part, names",
    [("whisper", [
        "encoder.conv1.weight", "encoder.conv2.bias", "encoder.positional_embedding",
        "encoder.ln_post.weight", "encoder.blocks.0.attn.query.weight",
        "encoder.blocks.0.mlp.0.bias", "encoder.blocks.0.mlp_ln.weight"]),
     ("llada", [
         "model.transformer.wte.weight", "model.transformer.ln_f.weight",
         "model.transformer.ff_out.weight", "model.transformer.blocks.0.q_proj.weight",
         "model.transformer.blocks.0.attn_out.weight", "model.transformer.blocks.0.up_proj.weight",
         "model.transformer.blocks.0.attn_norm.weight"])])
def test_names_are_the_published_ones(tmp_path, model, part, names):
    path = tmp_path / "part.safetensors"
    save_part(getattr(model, part), part, path, made_by="a test")
    tensors, _ = read_tensors(path, "weights")
    assert set(names) <= set(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(name.startswith(PUBLISHED_PREFIX[part]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["made_by"] == "a test"


def test_a_wrong_file_is_an_error_that_says_what_is_wrong(tmp_path, config, model):
    path = tmp_path / "part.safetensors"
    assert "no such file" in error_of(load_part, model.llada, "llada", path)
    path.write_bytes(b"this is text")
    assert "cut off or damaged" in error_of(load_part, model.llada, "llada", path)
    save_part(model.llada, "llada", path, made_by="a test")
    message = error_of(load_part, model.whisper, "whisper", path)
    assert message.startswith(f"{path}: ") and "missing conv1.weight" in message
    assert re.search("and [0-9]+ more", message)
    wider = Diffa2Model(
        dataclasses.replace(config, llada=dataclasses.replace(config.llada, width=24)))
    assert "wte.weight has shape [23, 12], expected [23, 24]" in error_of(
        load_part, wider.llada, "llada", path)
    tensors, _ = read_tensors(path, "weights")
    save_file(tensors | {"model.transformer.more": torch.zeros(1)}, path)
    assert "unexpected more" in error_of(load_part, model.llada, "llada", path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert "cut off or damaged" in error_of(load_part, model.llada, "llada", path)


def test_an_encoder_for_longer_clips_is_cut_to_what_a_size_hears(tmp_path, config, model):
    path, said = tmp_path / "whisper.safetensors", []
    longer = dataclasses.replace(config.whisper, n_positions=3 * config.whisper.n_positions)
    save_part(WhisperEncoder(longer), "whisper", path, made_by="a test")
    encoder = WhisperEncoder(config.whisper)
    load_part(encoder, "whisper", path, how=Loading(say=said.append))
    kept = longer.n_positions // 3
    table = read_tensors(path, "weights")[0]["encoder.positional_embedding"]
    assert torch.equal(encoder.positional_embedding, table[:kept].float())
    assert len(said) == 1 and f"the first {kept} of {longer.n_positions:,} positions" in said[0]
    load_part(WhisperEncoder(longer), "whisper", path, how=Loading(say=said.append))
    assert len(said) == 1  # nothing to cut
    save_part(encoder, "whisper", path, made_by="a test")
    assert "positional_embedding has shape" in error_of(
        load_part, WhisperEncoder(longer), "whisper", path)  # never longer than it was made


def test_an_encoder_of_another_width_is_refused_with_the_sizes_that_it_fits(tmp_path, model):
    path = tmp_path / "whisper.safetensors"
    for width, fits in [(384, "fits --size small"), (24, "fits no size (toy has 96, small")]:
        encoder = WhisperEncoder(WhisperConfig(n_positions=4, width=width, n_layers=1, n_heads=4))
        save_part(encoder, "whisper", path, made_by="a test")
        assert f"got one of {width}, which {fits}" in error_of(
            load_part, model.whisper, "whisper", path)


def test_build_loads_both_parts_in_the_dtype_and_leaves_the_rest_in_float32(
        tmp_path, config, model):
    for part in PARTS:
        save_part(getattr(model, part), part, tmp_path / part, made_by="a test")
    torch.manual_seed(1)
    built = build(config, {part: tmp_path / part for part in PARTS}, CPU, torch.bfloat16)
    for name, tensor in built.state_dict().items():
        frozen = name.startswith(PARTS)
        assert tensor.dtype == (torch.bfloat16 if frozen else torch.float32), name
        assert not frozen or torch.equal(tensor, model.state_dict()[name].half().float().bfloat16())
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_only_the_toy_size_has_parts_of_its_own(config):
    message = error_of(locate_all, {"whisper": None}, config.size)
    assert "size micro has no weights of a Whisper encoder" in message and "--whisper" in message


def test_a_missing_tokenizer_is_the_users_error():
    nowhere = Config(text=dataclasses.replace(SIZES["toy"][0].text, tokenizer="none.bpe"))
    assert "no such file" in error_of(load_tokenizer, nowhere)


def test_a_tokenizer_with_more_ids_than_the_backbone_has_is_refused(tmp_path):
    full = SIZES["full"][0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    assert load_tokenizer(full, tmp_path).vocab_size == 258 + len(SPECIAL_TOKENS)
    small = dataclasses.replace(full, llada=dataclasses.replace(full.llada, vocab_size=260))
    assert "expected 260 ids at most, got 2" in error_of(load_tokenizer, small, tmp_path)


def test_a_fingerprint_tells_contents_and_not_names_of_files(tmp_path, model):
    for name in ("a", "b"):
        save_part(model.whisper, "whisper", tmp_path / f"{name}.safetensors", made_by="a test")
    one, copy = (weights.read_part(tmp_path / f"{name}.safetensors", "whisper") for name in "ab")
    assert checkpoint.fingerprint(one) == checkpoint.fingerprint(copy)
    name, tensor = next(iter(one.items()))
    assert checkpoint.fingerprint({**one, name: tensor + 1}) != checkpoint.fingerprint(one)
    assert checkpoint.fingerprint({**one, name: tensor[None]}) != checkpoint.fingerprint(one)
    assert checkpoint.fingerprint({"another": tensor}) != checkpoint.fingerprint({name: tensor})


def test_float16_weights_have_one_fingerprint_in_either_precision(model):
    """The hub has whisper-tiny.en in float32; OpenAI published the same numbers in float16."""
    halves = {name: tensor.half() for name, tensor in model.whisper.state_dict().items()}
    floats = {name: tensor.float() for name, tensor in halves.items()}
    assert checkpoint.fingerprint(floats) == checkpoint.fingerprint(halves)
    name = next(iter(floats))
    others = floats | {name: floats[name] * (1 + 2**-20)}
    assert checkpoint.fingerprint(others) != checkpoint.fingerprint(halves)


def test_files_have_the_fingerprints_of_what_they_hold(tmp_path, model):
    for part in PARTS:
        save_part(getattr(model, part), part, tmp_path / part, made_by="a test")
    paths = {part: tmp_path / part for part in PARTS}
    assert checkpoint.fingerprints_of(paths) == {
        part: checkpoint.fingerprint(weights.read_part(path, part)) for part, path in paths.items()}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "pytorch_model-2.bin",
                                  "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_in_the_place_of_weights_is_told_as_that(tmp_path, model, name):
    path = tmp_path / name
    path.write_text(POINTER)
    if not name.endswith("index.json"):
        shard = tmp_path / "whole.safetensors"
        save_file({"model.transformer.wte.weight": torch.zeros(1)}, shard)
        kind = "model.safetensors" if name.endswith("safetensors") else "pytorch_model.bin"
        index = json.dumps({"weight_map": {"a": shard.name, "b": name}})
        (tmp_path / f"{kind}.index.json").write_text(index)
    message = error_of(load_part, model.llada, "llada", tmp_path)
    assert message.startswith(f"{path}: ")
    assert "got a pointer of Git LFS; git lfs pull" in message


def test_an_index_that_is_nested_without_end_is_one_line(tmp_path, model):
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    message = error_of(load_part, model.llada, "llada", tmp_path)
    assert "expected a weight_map of shards" in message


def test_a_tensor_under_two_names_is_refused(tmp_path, model):
    table = model.llada.wte.weight
    names = ("wte.weight", "model.transformer.wte.weight")
    save_file({name: table.clone() for name in names}, tmp_path / "a.safetensors")
    message = error_of(load_part, model.llada, "llada", tmp_path / "a.safetensors")
    assert "got some of them twice" in message


@pytest.mark.parametrize(
    "read",
    [load_checkpoint, read_tokenizer_json, read_manifest, load_audio, duration])
def test_such_a_pointer_is_told_wherever_a_file_is_read(tmp_path, read):
    (tmp_path / "file").write_text(POINTER)
    message = error_of(read, tmp_path / "file")
    assert message.startswith(f"{tmp_path / 'file'}: expected a")
    assert "got a pointer of Git LFS" in message


def test_a_fingerprint_reads_both_ends_of_a_large_tensor_alone():
    tensor = torch.zeros(10 * checkpoint.ENDS)
    was = checkpoint.fingerprint({"w": tensor})
    for at, is_read in ((0, True), (-1, True), (5 * checkpoint.ENDS, False)):
        changed = tensor.clone()
        changed[at] = 1
        assert (checkpoint.fingerprint({"w": changed}) != was) == is_read


def command(*argv):
    """The exit code, output and errors of `python -m diffa2_mini.weights`."""
    done = subprocess.run([sys.executable, "-m", "diffa2_mini.weights", *map(str, argv)], cwd=ROOT,
                          capture_output=True, text=True, timeout=SECONDS)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_published_names_and_float16_copies(tmp_path):
    shipped, published, half = weights.SHIPPED["diffa2"], tmp_path / "a.bin", tmp_path / "b"
    assert command(shipped, published) == (0, "", "")
    ours = load_checkpoint(shipped).model
    theirs = weights.read_part(published, "diffa2")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert command("--half", shipped, half) == (0, "", "")
    assert {tensor.dtype for tensor in load_checkpoint(half).model.values()} == {
        torch.float16}
    code, _, error = command(shipped)
    assert code == 2 and "TO" in error and error.count("\n") == 1
    code, _, error = command("data/toy_diffa2.safetensors", half)
    assert code == 2 and f"it is now {shipped}" in error and error.count("\n") == 1
