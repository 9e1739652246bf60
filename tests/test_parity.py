"""Each piece gives what the library that people trust for it gives, on the same weights:
tests/golden, which tests/make_golden.py wrote."""

import dataclasses
import json
from pathlib import Path

import golden_inputs as inputs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffa2_mini import weights
from diffa2_mini.adapters import QFormerLayer
from diffa2_mini.audio import log_mel
from diffa2_mini.config import AudioConfig, LoraConfig
from diffa2_mini.errors import UserError
from diffa2_mini.llada import Block, rotary
from diffa2_mini.lora import LoraLinear
from diffa2_mini.published.tokenizer_json import read_tokenizer_json
from diffa2_mini.whisper import WhisperEncoder

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    assert tuple(ours.shape) == theirs.shape
    return float((ours.double() - torch.from_numpy(theirs)).abs().max() / np.abs(theirs).max())


def seeded(names: np.ndarray, part: str) -> dict[str, torch.Tensor]:
    """The weights of a golden file, whose names and shapes are JSON, under our names."""
    return weights.renamed(inputs.weights(json.loads(str(names))), part)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("name", ["noise", "speech", "silence", "tenth", "long"])
def test_log_mel_is_whispers(n_mels, name):
    found = golden("log_mel")
    ours = log_mel(inputs.clips()[name], AudioConfig(n_mels=n_mels)).numpy()
    assert np.abs(ours[:, inputs.MEL_FRAMES] - found[f"openai_{n_mels}_{name}"]).max() <= 1e-5
    # between openai-whisper and WhisperFeatureExtractor
    assert found[f"gap_{n_mels}_{name}"] <= 1e-6


@pytest.mark.parametrize("key", ["openai", "hugging_face"])
def test_all_hidden_states_are_whispers(key):
    found = golden("encoder")
    config = inputs.ENCODER
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(seeded(found[f"{key}_names"], "whisper"))
    with torch.no_grad():
        final, taps = encoder(inputs.tensor("mel", 2, config.n_mels, 2 * config.n_positions))
    assert torch.equal(final, taps[:, -1])
    states = taps.transpose(0, 1)[..., ::3, ::3]  # [N, B, T, E]
    assert relative(states if key == "hugging_face" else states[1:], found[key]) <= 2e-5


@pytest.fixture(params=inputs.REAL_ENCODERS)
def real(request):
    """The name of one of OpenAI's own encoders, and where it is."""
    path = inputs.real_encoder(request.param)
    if not path:
        pytest.skip(f"found no whisper-{request.param}: hf download openai/whisper-{request.param} "
                    f"model.safetensors --local-dir weights/openai/whisper-{request.param}, or set "
                    "DIFFA2_WHISPER")
    return request.param, path


def real_states(name, path, seconds):
    """All hidden states [N, T, E] of a clip that the repository has."""
    config = dataclasses.replace(inputs.REAL_ENCODERS[name], n_positions=50 * seconds)
    encoder = WhisperEncoder(config)
    weights.load_part(encoder, "whisper", path)
    with torch.no_grad():
        return encoder(log_mel(inputs.clips()["speech"],
                               AudioConfig(n_mels=80, max_seconds=seconds))[None])[1][0]


@pytest.mark.parametrize("seconds", inputs.REAL_SLICES)
def test_openais_own_encoders_give_their_hidden_states(real, seconds):
    """Also with the positions of 13 s alone."""
    name, path = real
    frames, channels = inputs.REAL_SLICES[seconds]
    states = real_states(name, path, seconds)[:, frames, channels]
    assert relative(states, golden("real_encoders")[f"{name}_{seconds}"]) <= 2e-5


def test_openais_own_encoders_load_as_the_hub_has_them(real, tmp_path):
    """In Hugging Face's names, with the decoder in the same file."""
    name, path = real
    back = {"blocks.": "layers.", "positional_embedding": "embed_positions.weight",
            "ln_post.": "layer_norm.", ".attn_ln.": ".self_attn_layer_norm.",
            ".mlp_ln.": ".final_layer_norm.", ".attn.query.": ".self_attn.q_proj.",
            ".attn.key.": ".self_attn.k_proj.", ".attn.value.": ".self_attn.v_proj.",
            ".attn.out.": ".self_attn.out_proj.", ".mlp.0.": ".fc1.", ".mlp.2.": ".fc2."}
    tensors = {}
    for key, tensor in weights.read_part(path, "whisper").items():
        for ours, theirs in back.items():
            key = key.replace(ours, theirs)
        tensors[f"model.encoder.{key}"] = tensor.clone()
    decoder = ("embed_tokens.weight", "embed_positions.weight", "layer_norm.weight",
               "layers.0.encoder_attn.k_proj.weight", "layers.0.fc1.bias")
    tensors |= {f"model.decoder.{key}": torch.zeros(3) for key in decoder}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(real_states(name, tmp_path, 13), real_states(name, path, 13))


def test_the_acoustic_adapter_is_berts_encoder_with_cross_attention():
    found = golden("acoustic")
    config, encoder = inputs.ADAPTER, inputs.ENCODER
    layers = torch.nn.ModuleList(
        QFormerLayer(config, encoder.width, encoder.n_heads) for _ in range(config.qformer_layers))
    tensors = seeded(found["names"], "diffa2")
    layers.load_state_dict({name.removeprefix("acoustic_connector.qformer."): t
                            for name, t in tensors.items()})
    x = inputs.tensor("queries", 3, config.n_queries, encoder.width)
    frames = inputs.tensor("frames", 3, 50, encoder.width)
    with torch.no_grad():
        for layer in layers:
            x = layer(x, frames)
    # 1e-5 in the place of 1e-12 in its norms would cost 5e-6
    assert relative(x, found["output"]) <= 2e-6


def test_lora_and_its_merge_are_pefts():
    found = golden("lora")
    linear = torch.nn.Linear(48, 32, bias=False)
    linear.weight.data = inputs.weights({"lora.q_proj.weight": (32, 48)})["lora.q_proj.weight"]
    layer = LoraLinear(linear, LoraConfig(rank=8, alpha=16.0)).eval()
    values = inputs.weights({"lora_A": (8, 48), "lora_B": (32, 8)})
    layer.lora_A.data, layer.lora_B.data = values["lora_A"], values["lora_B"]
    with torch.no_grad():
        assert relative(layer(inputs.tensor("x", 5, 48)), found["output"]) <= 1e-6
        assert relative(layer.merged().weight, found["merged"]) <= 1e-6


def test_a_block_of_the_backbone_is_llamas_without_the_causal_mask():
    config = inputs.LLADA
    block = Block(config)
    values = inputs.weights({f"model.transformer.blocks.0.{name}": tuple(tensor.shape)
                             for name, tensor in block.state_dict().items()})
    block.load_state_dict({name: values[f"model.transformer.blocks.0.{name}"]
                           for name in block.state_dict()})
    with torch.no_grad():
        y = block(inputs.tensor("x", 2, 70, config.width),
                  rotary(torch.arange(70), config.width // config.n_heads, config.rope_theta), None)
    assert relative(y, golden("block")["output"]) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama3", "digits", "odd"])
def test_ten_thousand_texts_get_the_ids_of_the_tokenizers_library(name):
    found = golden("tokenizers")
    tokenizer = read_tokenizer_json(GOLDEN / f"tokenizer_{name}.json")
    texts = inputs.strings()
    assert len(texts) == len(found[name]) == 10_000
    wrong = [
        text for text, known in zip(texts, found[name])
        if inputs.fingerprint(tokenizer.encode(text)) != known]
    assert not wrong
    if name != "odd":  # the library puts odd's space before each piece that stands between specials
        assert tokenizer.prompt("Be kind.", "Who sings?").ids == found[f"{name}_template"].tolist()


def broken(change) -> str:
    data = json.loads((GOLDEN / "tokenizer_gpt2.json").read_text(encoding="utf-8"))
    change(data)
    return json.dumps(data)


def first_merges_swapped(data):
    """The first merge whose token is part of a later token changes its place with that one's."""
    merges = data["model"]["merges"]
    late = next(i for i, merge in enumerate(merges) if "".join(merges[0]) in merge)
    merges[0], merges[late] = merges[late], merges[0]


@pytest.mark.parametrize("change, message", [
    (lambda data: data.update(normalizer={"type": "NFC"}), "NFC"),
    (lambda data: data["model"].update(type="Unigram"), "Unigram"),
    (lambda data: data["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda data: data["model"].update(dropout=0.1), "dropout"),
    (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
    (lambda data: data.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda data: data.update(pre_tokenizer={
        "type": "Split", "pattern": {"String": "a"}, "behavior": "MergedWithNext",
        "invert": False}), "MergedWithNext"),
    (lambda data: data.update(added_tokens=data["added_tokens"][1:]), "<|startoftext|>"),
    (lambda data: data["added_tokens"].append(
        {"id": 5000, "content": "hm", "special": False, "lstrip": True}), "lstrip"),
    (lambda data: data["model"]["vocab"].pop("A"), "A"),
    (first_merges_swapped, "merged otherwise"),
    (lambda data: data["model"]["merges"].append(["A", "never"]), "never"),
    (lambda data: data["model"]["merges"].append(data["model"]["merges"][0]), "one twice"),
    (lambda data: data.pop("model"), "model"),
])
def test_a_tokenizer_of_another_kind_is_an_error_that_names_it(tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(broken(change), encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json: ") as caught:
        read_tokenizer_json(tmp_path / "tokenizer.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_that_only_tiktoken_would_merge_is_noticed(tmp_path):
    """`ab` + `c` and `a` + `bc` are the same bytes; the list of merges joins `abc` only from the
    latter, which it never reaches where `ab` is merged first."""
    def change(data):
        vocab, merges = data["model"]["vocab"], [["a", "b"], ["b", "c"], ["a", "bc"]]
        data["model"]["vocab"] = {t: i
                                  for t, i in vocab.items()
                                  if len(t) == 1} | {"ab": 900, "bc": 901, "abc": 902}
        data["model"]["merges"] = merges
    (tmp_path / "tokenizer.json").write_text(broken(change), encoding="utf-8")
    with pytest.raises(UserError, match="merged otherwise"):
        read_tokenizer_json(tmp_path / "tokenizer.json")
