"""Published weights: every layout loads strictly, what is wrong is named, no code is run, and what
we write the authors can read."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import golden_inputs as inputs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample
from diffa2_mini import config as configs
from diffa2_mini import weights
from diffa2_mini.audio import encoder_frames, load_audio, log_mel
from diffa2_mini.config import DATA, AdapterConfig, AudioConfig, Config, DecodeConfig, LladaConfig
from diffa2_mini.errors import UserError
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.state import DecodingState
from diffa2_mini.listen import Diffa2
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.training.checkpoint import save_diffa2
from diffa2_mini.training.model_source import find_source
from diffa2_mini.weights import load_diffa2, load_part, trained_tensors
from diffa2_mini.whisper import WhisperEncoder

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
CLIP = DATA / "clips" / "three_one_four.wav"
WHISPER = dataclasses.replace(inputs.ENCODER, n_positions=100)
CONFIG = Config(
    size="mini",
    audio=AudioConfig(n_mels=20, max_seconds=2),
    whisper=WHISPER,
    adapter=AdapterConfig(n_queries=3, qformer_hidden=24, n_prompts=2),
    llada=LladaConfig(vocab_size=1210, width=32, n_layers=2, n_heads=4, hidden=40),
    decode=DecodeConfig(gen_length=8, block_length=4, steps=8),
)
HUGGING_FACE = {  # names of Whisper there: here
    "conv1.weight": "conv1.weight", "conv2.bias": "conv2.bias",
    "embed_positions.weight": "positional_embedding",
    "layers.3.self_attn.q_proj.bias": "blocks.3.attn.query.bias",
    "layers.0.self_attn.k_proj.weight": "blocks.0.attn.key.weight",
    "layers.1.self_attn.v_proj.weight": "blocks.1.attn.value.weight",
    "layers.2.self_attn.out_proj.bias": "blocks.2.attn.out.bias",
    "layers.0.self_attn_layer_norm.weight": "blocks.0.attn_ln.weight",
    "layers.0.final_layer_norm.bias": "blocks.0.mlp_ln.bias",
    "layers.3.fc1.weight": "blocks.3.mlp.0.weight", "layers.3.fc2.bias": "blocks.3.mlp.2.bias",
    "layer_norm.weight": "ln_post.weight"}
LORA = "llm_model.base_model.model.model.transformer.blocks.1.up_proj.lora_A.default.weight"
QFORMER, OURS = "acoustic_connector.qformer.layer.", "acoustic_connector.qformer."
NAMES = {  # SPEC section 12: names of DIFFA-2's file, here
    "semantic_connector.conv.0.weight": "semantic_connector.conv.0.weight",
    "semantic_connector.linear_connector.2.bias": "semantic_connector.linear_connector.2.bias",
    "semantic_connector.layernorm.weight": "semantic_connector.layernorm.weight",
    "acoustic_connector.layer_prompts.4": "acoustic_connector.layer_prompts.4",
    "acoustic_connector.layer_weights": "acoustic_connector.layer_weights",
    f"{QFORMER}0.attention.self.query.weight": f"{OURS}0.attention.query.weight",
    f"{QFORMER}1.attention.output.dense.bias": f"{OURS}1.attention.dense.bias",
    f"{QFORMER}1.crossattention.self.value.bias": f"{OURS}1.crossattention.value.bias",
    f"{QFORMER}0.crossattention.output.LayerNorm.weight":
        f"{OURS}0.crossattention.LayerNorm.weight",
    f"{QFORMER}0.intermediate.dense.weight": f"{OURS}0.intermediate.weight",
    f"{QFORMER}1.output.dense.weight": f"{OURS}1.output.weight",
    f"{QFORMER}1.output.LayerNorm.bias": f"{OURS}1.LayerNorm.bias",
    "acoustic_connector.proj.1.weight": "acoustic_connector.proj.1.weight",
    "trainable_prompts.weight": "trainable_prompts.weight", LORA: "llada.blocks.1.up_proj.lora_A",
    LORA.replace("lora_A", "lora_B"): "llada.blocks.1.up_proj.lora_B"}


def load_pretrained(config, merge=False, **sources):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.SIZES, "full", (config, {}))
        return Diffa2.load(find_source("full", None, sources), CPU, torch.float32, merge).model


def hugging_face_whisper(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A Whisper in Hugging Face's names, its decoder too. The table of positions fits CONFIG."""
    names = json.loads(str(np.load(GOLDEN / "encoder.npz")["hugging_face_names"]))
    names["model.encoder.embed_positions.weight"] = (WHISPER.n_positions, WHISPER.width)
    tensors = inputs.weights({name: tuple(shape) for name, shape in names.items()})
    decoder = {"model.decoder.embed_tokens.weight": torch.zeros(3, 2),
               "proj_out.weight": torch.zeros(3, 2)}
    return {name: tensor.to(dtype) for name, tensor in (tensors | decoder).items()}


def openai_whisper(dtype=torch.float16) -> dict:
    tensors = {
        f"encoder.{name}": tensor.to(dtype)
        for name, tensor in WhisperEncoder(WHISPER).state_dict().items()}
    return {
        "dims": {"n_mels": 20}, "model_state_dict": tensors | {"decoder.ln.weight": torch.zeros(3)}}


def write_shards(folder: Path, tensors: dict, name: str) -> None:
    """Two shards and their index, as Hugging Face lays them out."""
    folder.mkdir(parents=True)
    stem, suffix = name.split(".")
    where = {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        shard = f"{stem}-0000{i}-of-00002.{suffix}"
        held = {key: tensors[key].contiguous() for key in part}
        save_file(held, folder /
                  shard) if suffix == "safetensors" else torch.save(held, folder / shard)
        where |= dict.fromkeys(part, shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.fixture(scope="module")
def trained() -> Diffa2Model:
    """A model with everything trained at random."""
    torch.manual_seed(0)
    model = Diffa2Model(CONFIG)
    model.add_lora()
    for tensor in trained_tensors(model).values():
        tensor.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory, trained) -> dict[str, Path]:
    """The three downloads of CONFIG, as they are published: folders."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "whisper").mkdir()
    save_file(hugging_face_whisper(torch.float16), folder / "whisper" / "model.safetensors")
    llada = {
        f"model.transformer.{name}": tensor.bfloat16()
        for name, tensor in trained.llada.state_dict().items()
        if "lora_" not in name}
    write_shards(folder / "llada", llada, "model.safetensors")
    shutil.copy(GOLDEN / "tokenizer_gpt2.json", folder / "llada" / "tokenizer.json")
    save_diffa2(trained_tensors(trained), folder / "diffa2" / "pytorch_model.bin")
    return {part: folder / part for part in ("whisper", "llada", "diffa2")}


def error_of(function, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [
    "model.safetensors", "pytorch_model.bin", "shards model.safetensors",
    "shards pytorch_model.bin", "without model."])
def test_hugging_faces_whisper_loads_from_every_layout(tmp_path, layout, dtype):
    tensors = hugging_face_whisper(dtype)
    if layout == "without model.":
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        layout = "model.safetensors"
    if layout.startswith("shards"):
        write_shards(tmp_path / "whisper", tensors, layout.split()[1])
    elif layout.endswith("bin"):
        (tmp_path / "whisper").mkdir()
        torch.save(tensors, tmp_path / "whisper" / layout)
    else:
        (tmp_path / "whisper").mkdir()
        save_file(tensors, tmp_path / "whisper" / layout)
    encoder = WhisperEncoder(WHISPER)
    load_part(encoder, "whisper", tmp_path / "whisper")
    prefix = "model.encoder." if "model.encoder.conv1.weight" in tensors else "encoder."
    for theirs, ours in HUGGING_FACE.items():
        assert torch.equal(encoder.state_dict()[ours], tensors[prefix + theirs].float()), ours


@pytest.mark.parametrize("zipped", [True, False], ids=["of today", "older than torch 1.6"])
def test_openais_whisper_loads(tmp_path, zipped):
    file = openai_whisper()
    torch.save(file, tmp_path / "large-v3.pt", _use_new_zipfile_serialization=zipped)
    encoder = WhisperEncoder(WHISPER)
    load_part(encoder, "whisper", tmp_path / "large-v3.pt", dtype=torch.bfloat16)
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, file["model_state_dict"][f"encoder.{name}"].bfloat16())
    load_part(encoder, "whisper", tmp_path)  # the only file of its folder


def test_published_weights_are_asked_from_python(published, monkeypatch):
    config = dataclasses.replace(CONFIG, size="full")
    monkeypatch.setitem(configs.SIZES, "full", (config, {}))
    diffa2 = Diffa2.from_pretrained("full", sources=published, device="cpu", dtype="float32")
    alone, (first, second) = diffa2.ask(CLIP, "What?"), diffa2.ask([CLIP, CLIP], "What?")
    assert alone.tokens == first.tokens == second.tokens and len(alone.tokens) == 8
    assert diffa2.parts == ("acoustic", "semantic") and diffa2.dtype == torch.float32
    by_default = Diffa2.from_pretrained("full", sources=published, device="cpu")
    assert by_default.dtype == torch.bfloat16  # as for all that has billions of weights


def test_all_three_load_in_one_call_and_answer(published, trained):
    model = load_pretrained(CONFIG, **published)
    for name, tensor in trained_tensors(model).items():
        assert torch.equal(tensor, trained_tensors(trained)[name]), name
    assert torch.equal(model.llada.wte.weight, trained.llada.wte.weight.bfloat16().float())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    samples = load_audio(CLIP, 16_000)[:32_000]
    audio = model.encode(log_mel(samples, CONFIG.audio)[None],
                         torch.tensor([encoder_frames(len(samples), CONFIG.audio)]))
    tokenizer = load_tokenizer(CONFIG, published["llada"])
    question = tokenizer.prompt(CONFIG.text.system, "Who speaks?")
    state = DecodingState(model, model.embed_audio(audio, ("acoustic", "semantic")), [question],
                          [8], tokenizer.mask_id)
    *_, step = generate(state, CONFIG.decode, tokenizer.eos_id)
    response = step.tokens[0].tolist()
    assert len(response) == 8 and tokenizer.mask_id not in response[:(
        response + [tokenizer.eos_id]).index(tokenizer.eos_id)]


def test_sample_runs_on_published_files(published, monkeypatch, capsys):
    monkeypatch.setitem(configs.SIZES, "full", (dataclasses.replace(CONFIG, size="full"), {}))
    flags = [word for part, path in published.items() for word in (f"--{part}", str(path))]
    sample.main([str(CLIP), "--size", "full", "--json", *flags])
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == CONFIG.decode.gen_length


# --------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_out_and_in_is_bit_identical_and_in_the_authors_names(tmp_path, trained, name):
    save_diffa2(trained_tensors(trained), tmp_path / name)
    file = weights.read_weights(tmp_path / name, "diffa2")
    assert len(file) == len(trained_tensors(trained))
    for theirs, ours in NAMES.items():
        assert torch.equal(file[theirs], trained_tensors(trained)[ours]), theirs
    model = Diffa2Model(CONFIG)
    assert load_diffa2(model, tmp_path) == ("acoustic", "semantic")
    for ours, tensor in trained_tensors(trained).items():
        assert torch.equal(trained_tensors(model)[ours], tensor)


@pytest.mark.parametrize("old, new", [("base_model.model.", ""), (".default", "")])
def test_other_spellings_of_lora_load_and_copies_of_frozen_parts_are_skipped(
        tmp_path, trained, old, new):
    save_diffa2(trained_tensors(trained), tmp_path / "all.bin")
    file = {
        name.replace(old, new): tensor
        for name, tensor in weights.read_weights(tmp_path / "all.bin", "diffa2").items()}
    file |= {
        "whisper_model.conv1.weight": torch.zeros(2),
        LORA.replace("lora_A.default", "base_layer"): torch.zeros(2),
        "llm_model.model.transformer.wte.weight": torch.zeros(2)}
    torch.save({name: tensor.clone() for name, tensor in file.items()}, tmp_path / "other.bin")
    model = Diffa2Model(CONFIG)
    load_diffa2(model, tmp_path / "other.bin")
    assert torch.equal(model.llada.blocks[1].up_proj.lora_A, trained.llada.blocks[1].up_proj.lora_A)


def test_stage_1_and_the_first_diffa_load(tmp_path, trained):
    tensors = trained_tensors(trained)
    listen = {name: t for name, t in tensors.items() if name.startswith(("semantic", "trainable"))}
    save_diffa2(listen, tmp_path / "stage1" / "pytorch_model.bin")
    model = Diffa2Model(CONFIG)
    assert load_diffa2(model, tmp_path / "stage1") == ("prompts", "semantic")
    assert torch.equal(model.trainable_prompts.weight, trained.trainable_prompts.weight)
    untrained = {
        name: torch.zeros_like(t) if name.endswith("layer_weights") else t
        for name, t in tensors.items()}
    # the authors' model always has an acoustic adapter
    save_diffa2(untrained, tmp_path / "untrained.bin")
    assert load_diffa2(Diffa2Model(CONFIG), tmp_path / "untrained.bin") == ("prompts", "semantic")
    save_diffa2({name: t
                 for name, t in tensors.items()
                 if "lora_" not in name}, tmp_path / "diffa1.bin")
    assert load_diffa2(model, tmp_path / "diffa1.bin") == ("acoustic", "semantic")
    assert not any("lora_" in name for name in model.state_dict())


def test_merged_and_separate_lora_give_the_same_logits(published):
    separate = load_pretrained(CONFIG, **published)
    merged = load_pretrained(CONFIG, **published, merge=True)
    x = torch.randn(2, 9, CONFIG.llada.width)
    a, b = (model.llada.logits(model.llada(x)) for model in (separate, merged))
    assert not any("lora_" in name for name in merged.state_dict())
    assert float((a - b).detach().abs().max()) <= 1e-5


# ------------------------------------------------------------------------------------ what is wrong


def test_every_tensor_is_accounted_for(tmp_path, trained):
    save_diffa2(trained_tensors(trained), tmp_path / "all.bin")
    file = weights.read_weights(tmp_path / "all.bin", "diffa2")
    model = Diffa2Model(CONFIG)
    before = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}

    def message(change: dict, without: str = "none"):
        torch.save({name: t.clone()
                    for name, t in (file | change).items()
                    if without not in name}, tmp_path / "x.bin")
        return error_of(load_diffa2, model, tmp_path / "x.bin")

    assert "unexpected acoustic_connector.more" in message(
        {"acoustic_connector.more": torch.zeros(1)})
    assert "unexpected more" in message({"more": torch.zeros(1)})
    assert "missing semantic_connector.conv.2.bias" in message({}, without="conv.2.bias")
    assert "[2, 3], expected [2, 32]" in message({"trainable_prompts.weight": torch.zeros(2, 3)})
    assert "missing semantic_connector.conv.0.weight" in message({}, without="semantic_connector")
    assert all(torch.equal(trained_tensors(model)[name], tensor) for name, tensor in before.items())


class Smuggler:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_smuggles_code_runs_nothing(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "code": Smuggler(tmp_path / "ran")},
               tmp_path / "whisper.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Smuggler(tmp_path / "ran")))
    for name in ("whisper.pt", "plain.bin"):
        assert "which was not run" in error_of(
            load_part, WhisperEncoder(WHISPER), "whisper", tmp_path / name)
    assert not (tmp_path / "ran").exists()
    run, arguments = Smuggler(tmp_path / "ran").__reduce__()
    run(*arguments)  # what unpickling would have done
    assert (tmp_path / "ran").exists()


def test_damaged_and_incomplete_downloads_are_one_clear_line(tmp_path):
    torch.save(openai_whisper(), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    assert "a damaged file" in error_of(
        load_part, WhisperEncoder(WHISPER), "whisper", tmp_path / "cut.pt")
    (tmp_path / "page.bin").write_text("<html>not found</html>")
    assert "a web page" in error_of(load_part, WhisperEncoder(WHISPER), "whisper",
                                     tmp_path / "page.bin")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "without named tensors" in error_of(
        load_part, WhisperEncoder(WHISPER), "whisper", tmp_path / "list.pt")
    write_shards(tmp_path / "shards", hugging_face_whisper(), "model.safetensors")
    shard = tmp_path / "shards" / "model-00002-of-00002.safetensors"
    shard.rename(tmp_path / "gone")
    assert shard.name in error_of(load_part, WhisperEncoder(WHISPER), "whisper",
                                  tmp_path / "shards")
    shutil.copy(tmp_path / "shards" / "model-00001-of-00002.safetensors", shard)
    assert "missing" in error_of(load_part, WhisperEncoder(WHISPER), "whisper", tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
    assert "weight_map" in error_of(load_part, WhisperEncoder(WHISPER), "whisper",
                                    tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in error_of(
        load_part, WhisperEncoder(WHISPER), "whisper", tmp_path / "empty")


def locate(source, part, size):
    return locate_all({part: source}, size)[part]


def test_a_hub_name_is_looked_up_here_and_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = "openai/whisper-large-v3"
    monkeypatch.setenv("HF_HOME", "~nobody-of-this-name/hf")  # a home that is not known
    assert "hf download" in error_of(locate, None, "whisper", "full")
    monkeypatch.delenv("HF_HOME")
    message = error_of(locate, None, "whisper", "full")
    assert f"hf download {name} model.safetensors --local-dir weights/{name}" in message
    message = error_of(load_pretrained, configs.SIZES["full"][0])  # all that is missing, at once
    assert message.count("hf download") == 3

    def complete(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.safetensors").touch()
        return folder

    def snapshot(hub: Path, commit: str) -> Path:
        return complete(hub / "models--openai--whisper-large-v3" / "snapshots" / commit)

    only = snapshot(tmp_path / "cache" / "huggingface" / "hub", "a1")
    assert locate(name, "whisper", "full") == only
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    first, second = (snapshot(tmp_path / "home" / "hub", commit) for commit in ("b1", "b2"))
    for commit, folder in (("b1", first), ("b2", second)):
        (folder.parent.parent / "refs").mkdir(exist_ok=True)
        (folder.parent.parent / "refs" / "main").write_text(commit)
        assert locate(name, "whisper", "full") == folder
    (second / "model.safetensors").unlink()  # a download that was stopped
    assert locate(name, "whisper", "full") == first
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    third = snapshot(tmp_path / "hub", "c1")
    assert locate(name, "whisper", "full") == third
    complete(tmp_path / "weights" / name)
    assert locate(name, "whisper", "full") == Path("weights", name)
    assert locate(str(third), "whisper", "full") == third
    assert "hf download" in error_of(locate, "GSAI-ML/LLaDA-8B-Instruct", "llada", "full")
    (tmp_path / "runs").mkdir()
    assert "no such file or folder" in error_of(locate, "runs/mine", "whisper", "full")
    (tmp_path / "openai").mkdir()  # hides no download of that name
    assert locate(name, "whisper", "full") == Path("weights", name)
    assert locate(None, "whisper", "full") == Path("weights", name)
    assert "hf download openai/whisper-small" in error_of(locate, None, "whisper", "diffa1")
    (tmp_path / name).mkdir()
    assert locate(name, "whisper", "full") == Path("weights", name)  # as nothing is in it
    complete(tmp_path / name)
    assert locate(name, "whisper", "full") == Path(name)
    for size, part, advice in (("full", "whisper", "; check --whisper"),
                               ("small", "whisper", "; check --whisper"),
                               ("small", "llada", "--stage 0 --parts llada --size small makes"),
                               ("toy", "diffa2", "--stage 1 --size toy makes some")):
        message = error_of(locate, "nowhere.safetensors", part, size)
        assert "no such file or folder" in message and advice in message


@pytest.mark.parametrize("variables, folder", [
    ({}, "home/.cache/huggingface/hub"), ({"XDG_CACHE_HOME": "~/xdg"}, "home/xdg/huggingface/hub"),
    ({"HF_HOME": "~/hf"}, "home/hf/hub"), ({"HF_HOME": "$PLACE/hf"}, "place/hf/hub"),
    ({"HF_HOME": "~/hf", "HUGGINGFACE_HUB_CACHE": "~/old"}, "home/old"),
    ({"HUGGINGFACE_HUB_CACHE": "~/old", "HF_HUB_CACHE": "${PLACE}/new"}, "place/new"),
    ({"HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub")])
def test_the_hubs_cache_is_where_hf_keeps_it(variables, folder, tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    homes = {name: str(tmp_path / "home") for name in ("HOME", "USERPROFILE")}
    for name, value in (homes | {"PLACE": str(tmp_path / "place")} | variables).items():
        monkeypatch.setenv(name, value)
    snapshot = tmp_path / folder / "models--openai--whisper-tiny" / "snapshots" / "a1"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    assert locate("openai/whisper-tiny", "whisper", "full") == snapshot
