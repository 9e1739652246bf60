"""Golden files: what the libraries that people trust give for seeded inputs and weights. Run by
hand; needs the extra `reference`:

    pip install -e ".[reference]" && python tests/make_golden.py
    python tests/make_golden.py real_encoders    # one of them; this one needs OpenAI's encoders

The tests compare against the files in tests/golden, and need none of these libraries.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import golden_inputs as inputs

from diffa2_mini.tokenizer import SPECIAL_TOKENS
from diffa2_mini.weights import read_part

GOLDEN = Path(__file__).resolve().parent / "golden"


def save(name: str, **arrays) -> None:
    """Write arrays, float32 at most, compressed."""
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
    print(f"{name}: {(GOLDEN / f'{name}.npz').stat().st_size:,} bytes")


def filled(module: torch.nn.Module, prefix: str) -> tuple[torch.nn.Module, str]:
    """The module with the seeded weights of its own names below `prefix`; these names and their
    shapes as JSON."""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    values = inputs.weights(shapes)
    module.load_state_dict({name: values[prefix + name] for name in module.state_dict()})
    return module.eval(), json.dumps(shapes)


def log_mels() -> None:
    """Both references, for 80 and 128 bins: every frame of the short clip, strided slices of the
    long ones."""
    import whisper.audio
    from transformers import WhisperFeatureExtractor

    found = {}
    for n_mels in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
        for name, samples in inputs.clips().items():
            cut = whisper.audio.pad_or_trim(samples)
            openai = whisper.audio.log_mel_spectrogram(cut, n_mels).numpy()
            hugging = extractor(samples, sampling_rate=16_000).input_features[0]
            found[f"openai_{n_mels}_{name}"] = openai[:, inputs.MEL_FRAMES]
            found[f"gap_{n_mels}_{name}"] = np.abs(openai - hugging).max()
    save("log_mel", **found)
    print("largest gap between the references:",
          max(float(v) for k, v in found.items() if k.startswith("gap")))


def encoders() -> None:
    """All hidden states of both encoders, on weights of their own names."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder
    from whisper.model import AudioEncoder

    config = inputs.ENCODER
    E, layers, heads = config.width, config.n_layers, config.n_heads
    T, n_mels = config.n_positions, config.n_mels
    mel = inputs.tensor("mel", 2, n_mels, 2 * T)
    hugging, names = filled(
        WhisperEncoder(
            WhisperConfig(d_model=E, encoder_layers=layers, encoder_attention_heads=heads,
                          num_mel_bins=n_mels, encoder_ffn_dim=4 * E, max_source_positions=T,
                          attn_implementation="eager")), "model.encoder.")
    openai, openai_names = filled(AudioEncoder(n_mels, T, E, heads, layers), "encoder.")
    states_openai = []
    with torch.no_grad():
        states = hugging(mel, output_hidden_states=True).hidden_states
        for block in openai.blocks:
            block.register_forward_hook(lambda module, given, output: states_openai.append(output))
        final = openai(mel)
    save("encoder", hugging_face_names=names, openai_names=openai_names,
         hugging_face=torch.stack(states)[..., ::3, ::3],
         openai=torch.stack([*states_openai[:-1], final])[..., ::3, ::3])


def real_encoders() -> None:
    """Slices of all hidden states of OpenAI's own encoders on a clip of this repository: as they
    are, and with the positions of 13 s alone."""
    import whisper.audio
    from whisper.model import AudioEncoder

    samples, found = inputs.clips()["speech"], {}
    for name, config in inputs.REAL_ENCODERS.items():
        path = inputs.real_encoder(name)
        assert path, f"expected whisper-{name}, found none; see `real_encoder` for where it can be"
        tensors = {key: tensor.float() for key, tensor in read_part(path, "whisper").items()}
        for seconds, (frames, channels) in inputs.REAL_SLICES.items():
            states, T = [], 50 * seconds
            encoder = AudioEncoder(config.n_mels, T, config.width, config.n_heads, config.n_layers)
            table = tensors["positional_embedding"][:T]
            encoder.load_state_dict(tensors | {"positional_embedding": table})
            cut = whisper.audio.pad_or_trim(samples, 16_000 * seconds)
            mel = whisper.audio.log_mel_spectrogram(cut, config.n_mels)
            for block in encoder.blocks:  # each takes the state before it
                block.register_forward_pre_hook(
                    lambda module, given, kept=states: kept.append(given[0]))
            with torch.no_grad():
                every = torch.cat([encoder(mel[None]), *states]).roll(-1, 0)  # [N, T, E]
            found[f"{name}_{seconds}"] = every[:, frames, channels]
    save("real_encoders", **found)


def acoustic() -> None:
    """Two layers of transformers' BERT as a decoder with cross-attention: eager, post-norm."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEncoder

    config, E = inputs.ADAPTER, inputs.ENCODER.width
    bert = BertEncoder(
        BertConfig(hidden_size=E, num_hidden_layers=config.qformer_layers,
                   intermediate_size=config.qformer_hidden,
                   num_attention_heads=inputs.ENCODER.n_heads, is_decoder=True,
                   add_cross_attention=True, layer_norm_eps=1e-12, attn_implementation="eager"))
    bert, names = filled(bert, "acoustic_connector.qformer.")
    queries = inputs.tensor("queries", 3, config.n_queries, E)
    frames = inputs.tensor("frames", 3, 50, E)
    mask = torch.zeros(3, 1, config.n_queries, config.n_queries)  # every query sees every query
    with torch.no_grad():
        output = bert(queries, attention_mask=mask, encoder_hidden_states=frames,
                      use_cache=False).last_hidden_state
    save("acoustic", names=names, output=output)


def lora() -> None:
    """peft on a linear layer: forward and merged."""
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(48, 32, bias=False)

        def forward(self, x):
            return self.q_proj(x)

    about = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    model = get_peft_model(filled(Model(), "lora.")[0], about).eval()
    layer = model.base_model.model.q_proj
    values = inputs.weights({"lora_A": (8, 48), "lora_B": (32, 8)})
    layer.lora_A.default.weight.data = values["lora_A"]
    layer.lora_B.default.weight.data = values["lora_B"]
    x = inputs.tensor("x", 5, 48)
    with torch.no_grad():
        output = model(x)
        merged = model.merge_and_unload().q_proj.weight
    save("lora", output=output, merged=merged)


def block() -> None:
    """transformers' Llama layer without its causal mask, in eager attention."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = inputs.LLADA
    llama = LlamaConfig(hidden_size=config.width, intermediate_size=config.hidden,
                        num_attention_heads=config.n_heads, num_key_value_heads=config.n_heads,
                        rms_norm_eps=config.norm_eps, attn_implementation="eager",
                        rope_theta=config.rope_theta, rope_parameters={
                            "rope_type": "default", "rope_theta": config.rope_theta})
    names = inputs.LLAMA_NAMES
    layer = LlamaDecoderLayer(llama, 0)
    values = inputs.weights({
        f"model.transformer.blocks.0.{ours}": tuple(layer.state_dict()[theirs].shape)
        for theirs, ours in names.items()})
    layer.load_state_dict({theirs: values[f"model.transformer.blocks.0.{ours}"]
                           for theirs, ours in names.items()})
    x = inputs.tensor("x", 2, 70, config.width)
    rotation = LlamaRotaryEmbedding(llama)(x, torch.arange(70)[None])
    with torch.no_grad():
        output = layer.eval()(x, attention_mask=torch.zeros(1, 1, 70, 70),
                              position_embeddings=rotation)
    save("block", output=output[0] if isinstance(output, tuple) else output)


def tokenizers() -> None:
    """Four byte-level BPEs in the spellings that occur, and a fingerprint of the ids of each
    text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    splits = {
        "gpt2": pre.ByteLevel(add_prefix_space=False),
        "llama3": pre.Sequence([
            pre.Split(Regex(llama3), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False)]),
        "digits": pre.Sequence([
            pre.Digits(individual_digits=True),
            pre.ByteLevel(add_prefix_space=False)]),
        "odd": pre.Sequence([
            pre.Split(Regex(r"\S+|\s"), "removed", invert=True),
            pre.Split("e", "isolated"),
            pre.Digits(),
            pre.ByteLevel(add_prefix_space=True)])}
    corpus = inputs.strings(2000, seed=1) + [Path(__file__).read_text()] * 3
    texts, found = inputs.strings(), {}
    for name, split in splits.items():
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
        tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
        tokenizer.train_from_iterator(
            corpus,
            trainers.BpeTrainer(vocab_size=1200, initial_alphabet=pre.ByteLevel.alphabet(),
                                special_tokens=[], show_progress=False))
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        if name == "odd":
            tokenizer.add_tokens([
                AddedToken("<audio>", normalized=False),
                AddedToken("snake_case", normalized=False)])
        data = json.loads(tokenizer.to_str())
        if name in ("odd", "digits"):  # the other spelling of merges, and ids in any order
            data["model"]["merges"] = [" ".join(merge) for merge in data["model"]["merges"]]
            vocab = data["model"]["vocab"]
            data["model"]["vocab"] = dict(
                zip(vocab, np.random.default_rng(0).permutation(list(vocab.values())).tolist()))
        path = GOLDEN / f"tokenizer_{name}.json"
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        tokenizer = Tokenizer.from_file(str(path))
        template = tokenizer.encode(inputs.TEMPLATE, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = True  # specials that a user types are text
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        found |= {
            name: np.array([inputs.fingerprint(row) for row in ids], np.uint32),
            f"{name}_template": template}
    save("tokenizers", **found)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for make in (log_mels, encoders, real_encoders, acoustic, lora, block, tokenizers):
        if make.__name__ in (sys.argv[1:] or [make.__name__]):
            make()
