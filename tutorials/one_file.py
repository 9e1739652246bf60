"""All of DIFFA-2 (arXiv 2601.23161) that an answer needs, in one file:

    python tutorials/one_file.py data/clips/three_one_four.wav "What is said?"

    sound -> log-mel -> Whisper's encoder -> two adapters -> audio embeddings
    prompt with these + masked response -> LLaDA -> commit the surest tokens, and again

Weights are a dictionary `w` of tensors by name; each function gets those of its part, and
`c`, its part of the checkpoint's config (adapters: all of it). One clip, so no batch.
Shapes: M mel frames, T encoder frames, E encoder width, N taps (encoder states that the
acoustic adapter reads), Q queries, A audio embeddings, R response tokens, K masks among
them, S all tokens that LLaDA reads, D its width, H heads of width h, V vocabulary.
"""

import base64
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import soundfile
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import safe_open

ASSETS = Path(__file__).resolve().parent.parent / "diffa2_mini" / "assets"


# ---- Weights, and the layers that several networks share
def load():
    """The weights; and `about`: the config, and `audio`, which adapters a prompt gets."""
    w = {}
    for name in ("toy_whisper", "toy_llada", "toy_diffa2"):
        file = safe_open(ASSETS / f"{name}.safetensors", "pt")
        for key in file.keys():
            ours = key.replace("encoder", "whisper").replace("model.transformer", "llada")
            w[ours] = file.get_tensor(key).float()
    text = file.metadata()["checkpoint"]  # of toy_diffa2, in JSON
    about = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
    merge_lora(w, about.config.lora)
    return w, about


def merge_lora(w, c):
    """LoRA is W x + (alpha / rank) B A x: add B A to W, once and for all."""
    for name in [name.removesuffix(".lora_A") for name in w if name.endswith(".lora_A")]:
        change = w[f"{name}.lora_B"] @ w[f"{name}.lora_A"]  # [out, rank] @ [rank, in]
        w[f"{name}.weight"] = w[f"{name}.weight"] + c.alpha / c.rank * change


def part(w, prefix):
    """The weights whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): w[name] for name in w if name.startswith(prefix)}


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

def conv(x, w, name, stride=1):
    return F.conv1d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding=1)

def layer_norm(x, w, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

def rms_norm(x, w, name, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]


def attention(q, k, v, n_heads):
    """For each row of q [n, H h] a mean of the rows of v [m, H h], weighted by q . k."""
    q, k, v = (x.unflatten(1, (n_heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT / q.shape[2] ** 0.5  # [H, n, h] @ [H, h, m] -> [H, n, m]
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)  # [H, n, h] -> [n, H h]


# ---- Sound -> log-mel -> hidden states
def mel_filterbank(c):
    """Triangles that sum power at frequencies into bands, [n_mels, n_fft // 2 + 1]."""
    nyquist = c.sample_rate / 2
    bins = torch.linspace(0, nyquist, c.n_fft // 2 + 1, dtype=torch.float64)  # Hz
    highest = 15 + 27 * math.log(nyquist / 1000, 6.4)  # mel: 1000 Hz is 15, 6400 Hz is 42
    mels = torch.linspace(0, highest, c.n_mels + 2, dtype=torch.float64)[:, None]
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # Hz
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]  # [n_mels, 1] each
    rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
    return (torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)).float()


def log_mel(samples, c):
    """A clip [samples] -> how loud each mel band is every 10 ms, [n_mels, M]."""
    samples = F.pad(samples, (0, c.max_seconds * c.sample_rate - len(samples)))  # or cut
    spectrum = torch.stft(samples, c.n_fft, c.hop_length, return_complex=True,
                          window=torch.hann_window(c.n_fft))  # [n_fft // 2 + 1, M + 1]
    log = (mel_filterbank(c) @ spectrum[:, :-1].abs() ** 2).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4  # at most 80 dB below the loudest


def whisper(mel, w, c):
    """Log-mel [n_mels, M] -> hidden states [T, E]: before the blocks and after each."""
    x = F.gelu(conv(mel, w, "conv1"))  # [E, M]
    x = F.gelu(conv(x, w, "conv2", stride=2)).T + w["positional_embedding"]  # [T, E]
    states = [x]
    for i in range(c.n_layers):
        block = part(w, f"blocks.{i}.")
        y = layer_norm(x, block, "attn_ln")
        q, k, v = (linear(y, block, f"attn.{name}") for name in ("query", "key", "value"))
        x = x + linear(attention(q, k, v, c.n_heads), block, "attn.out")
        y = layer_norm(x, block, "mlp_ln")
        x = x + linear(F.gelu(linear(y, block, "mlp.0")), block, "mlp.2")
        states.append(x)
    return [*states[:-1], layer_norm(x, w, "ln_post")]


# ---- Hidden states -> embeddings that LLaDA reads like words
def semantic_adapter(frames, n, w, c):
    """What was said: an embedding [D] for each few of the first n frames [T, E]."""
    stride = c.adapter.semantic_stride
    x = F.gelu(conv(frames.T, w, "conv.0"))  # [E, T]
    x = conv(x, w, "conv.2", stride).T[:n // stride]  # none of these reads beyond n
    x = F.relu(linear(x, w, "linear_connector.0"))  # [n / stride, E]
    return layer_norm(F.relu(linear(x, w, "linear_connector.2")), w, "layernorm")


def attend(x, memory, w, n_heads):
    """x [Q, E] attends to memory [Q or T, E]; added, then normalised, as in BERT."""
    q, k, v = linear(x, w, "query"), linear(memory, w, "key"), linear(memory, w, "value")
    x = x + linear(attention(q, k, v, n_heads), w, "dense")
    return layer_norm(x, w, "LayerNorm", eps=1e-12)


def acoustic_adapter(states, w, c):
    """How it sounded, by a Q-Former: for each tap, queries [Q, E] attend to each other
    and to its frames [T, E]. A mean over the N taps, learned per query, gives [Q, D]."""
    outputs = []
    for tap, depth in enumerate(c.whisper.taps):
        x, frames = w[f"layer_prompts.{tap}"][0], states[depth]  # learned queries, frames
        for i in range(c.adapter.qformer_layers):
            layer = part(w, f"qformer.{i}.")
            x = attend(x, x, part(layer, "attention."), c.whisper.n_heads)
            x = attend(x, frames, part(layer, "crossattention."), c.whisper.n_heads)
            y = linear(F.gelu(linear(x, layer, "intermediate")), layer, "output")
            x = layer_norm(x + y, layer, "LayerNorm", eps=1e-12)
        outputs.append(x)
    x = torch.einsum("nqe,qn->qe", torch.stack(outputs), w["layer_weights"].softmax(-1))
    return linear(layer_norm(x, w, "proj.0"), w, "proj.1")


def embed_audio(samples, w, about):
    """A clip [samples] -> its embeddings [A, D]."""
    c = about.config
    states = whisper(log_mel(samples, c.audio), part(w, "whisper."), c.whisper)
    n = min(len(states[0]), math.ceil(len(samples) / c.audio.hop_length / 2))  # of sound
    emb = {"semantic": semantic_adapter(states[-1], n, part(w, "semantic_connector."), c),
           "acoustic": acoustic_adapter(states, part(w, "acoustic_connector."), c),
           "prompts": w["trainable_prompts.weight"]}  # in stage 1 instead of acoustic
    return torch.cat([emb[name] for name in about.audio])


# ---- Text -> tokens
WORDS = r"[A-Z]\.| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\n|\s"  # BPE merges within a match
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>")
BEFORE = ("<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
          "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio:")  # then audio
BEHIND = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"  # then response


def read_tokenizer(path):
    """Byte-level BPE: again and again, the neighbours of lowest rank become one token."""
    rows = [line.split() for line in Path(path).read_text().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    ids = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=ids)


# ---- LLaDA, the mask predictor: a transformer in which each token attends to all
def rotate(x, n_heads, theta):
    """Rotary embedding: at position s, a pair (x_i, x_{i + h/2}) turns by an angle of
    s / theta^(2i / h), so that q . k depends on how far apart two tokens are."""
    x = x.unflatten(1, (n_heads, -1))  # [S, D] -> [S, H, h]
    rates = theta ** -(torch.arange(0, x.shape[2], 2) / x.shape[2])  # [h/2]
    angles = torch.outer(torch.arange(len(x)).float(), rates)[:, None]  # [S, 1, h/2]
    cos, sin, (a, b) = angles.cos(), angles.sin(), x.chunk(2, dim=-1)  # a, b: [S, H, h/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1)  # [S, D]


def llada(x, w, c):
    """Embeddings [S, D] -> hidden states [S, D]."""
    for i in range(c.n_layers):
        block = part(w, f"blocks.{i}.")
        y = rms_norm(x, block, "attn_norm", c.norm_eps)
        q, k, v = (linear(y, block, name) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, c.n_heads, c.rope_theta), rotate(k, c.n_heads, c.rope_theta)
        x = x + linear(attention(q, k, v, c.n_heads), block, "attn_out")
        y = rms_norm(x, block, "ff_norm", c.norm_eps)
        y = F.silu(linear(y, block, "ff_proj")) * linear(y, block, "up_proj")  # SwiGLU
        x = x + linear(y, block, "ff_out")
    return rms_norm(x, w, "ln_f", c.norm_eps)


def surest(confidence, factor):
    """Of c_1 >= c_2 >= ..., commit the first, and on while (n + 1)(1 - c_n) <= factor."""
    c, order = confidence.sort(descending=True, stable=True)
    passes = torch.arange(2, len(c) + 2) * (1 - c) <= factor
    return order[:max(1, passes.int().cumprod(0).sum())]  # up to the first that fails


def decode(predict, c, mask_id, eos_id):
    """Masks become a response [R], block by block until there is an EOS. `predict` gives,
    from all tokens, the logits [K, V] of those at `masked` [K]."""
    tokens = torch.full((c.gen_length,), mask_id)
    for start in range(0, c.gen_length, c.block_length):
        block = tokens[start:start + c.block_length]  # a view: it changes with `tokens`
        while mask_id in block and eos_id not in tokens[:start]:
            masked = start + (block == mask_id).nonzero()[:, 0]
            logits = predict(tokens, masked)
            logits[:, mask_id] = -math.inf  # a mask is no answer
            confidence, predicted = logits.softmax(-1).max(-1)  # [K] each
            chosen = surest(confidence, c.factor)
            tokens[masked[chosen]] = predicted[chosen]
    return tokens


def respond(samples, question, w, about, bpe):
    """The response [R] to a question about a clip [samples]."""
    c, backbone = about.config, part(w, "llada.")
    before = bpe.encode(BEFORE.format(c.text.system), allowed_special="all")
    behind = bpe.encode(BEHIND, allowed_special="all")
    behind = bpe.encode_ordinary(f" <audio>. {question}") + behind  # no special tokens
    words = backbone["wte.weight"]  # [V, D]
    prompt = torch.cat([words[before], embed_audio(samples, w, about), words[behind]])

    def predict(tokens, masked):
        hidden = llada(torch.cat([prompt, words[tokens]]), backbone, c.llada)  # [S, D]
        return linear(hidden[len(prompt) + masked], backbone, "ff_out")  # head: [K, V]

    ids = map(bpe.encode_single_token, ("<|mdm_mask|>", "<|endoftext|>"))
    return decode(predict, c.decode, *ids)


def main():
    w, about = load()
    try:
        _, clip, question = sys.argv
        samples, rate = soundfile.read(clip, dtype="float32", always_2d=True)
    except (ValueError, TypeError, soundfile.SoundFileError):
        rate = None
    if rate != (wanted := about.config.audio.sample_rate):
        print(f'usage: one_file.py CLIP "QUESTION", CLIP at {wanted} Hz', file=sys.stderr)
        sys.exit(2)
    bpe = read_tokenizer(ASSETS / about.config.text.tokenizer)
    samples = torch.from_numpy(samples.mean(axis=1))  # of channels
    text = bpe.decode(respond(samples, question, w, about, bpe).tolist())
    print(text.split("<|eot_id|>")[0].split("<|endoftext|>")[0].strip())


if __name__ == "__main__":
    main()
