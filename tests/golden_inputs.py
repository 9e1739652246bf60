"""The inputs and weights of the golden files, the same for the references and for us: everything
from a seed."""

import os
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import torch

from diffa2_mini.audio import load_audio
from diffa2_mini.config import DATA, AdapterConfig, LladaConfig, WhisperConfig
from diffa2_mini.published.sources import hub_folders, is_complete
from diffa2_mini.tokenizer import SPECIAL_TOKENS

REAL_ENCODERS = {  # OpenAI's own: every hidden state is a tap
    "tiny.en": WhisperConfig(n_mels=80, width=384, n_layers=4, n_heads=6, taps=tuple(range(5))),
    "base": WhisperConfig(n_mels=80, width=512, n_layers=6, n_heads=8, taps=tuple(range(7)))}
REAL_SLICES = {30: ([0, 1, 7, 50, 99, 150, 500, 1000, 1499], slice(3, None, 48)),
               13: ([0, 1, 7, 50, 99, 150, 300, 500, 649], slice(3, None, 48))}  # by seconds heard
ENCODER = WhisperConfig(n_mels=20, n_positions=60, width=48, n_layers=4, n_heads=4,
                        taps=(0, 1, 2, 3, 4))
ADAPTER = AdapterConfig(n_queries=7, qformer_hidden=80)
LLADA = LladaConfig(vocab_size=97, width=64, n_layers=1, n_heads=4, hidden=160)
LLAMA_NAMES = {  # of a layer in transformers: ours
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ff_norm.weight", "self_attn.q_proj.weight": "q_proj.weight",
    "self_attn.k_proj.weight": "k_proj.weight", "self_attn.v_proj.weight": "v_proj.weight",
    "self_attn.o_proj.weight": "attn_out.weight", "mlp.gate_proj.weight": "ff_proj.weight",
    "mlp.up_proj.weight": "up_proj.weight", "mlp.down_proj.weight": "ff_out.weight"}
MEL_FRAMES = [0, 1, 2, 3, 5, 9, 10, 11, 50, 100, 117, 500, 1234, 2000, 2996, 2997, 2998, 2999]
TEMPLATE = (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThis is the audio: <audio>. Who sings?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n")

FRAGMENTS = [
    "def f(x):\n\treturn x**2", "for (int i=0; i<10; ++i) {", "</div>\r\n",
    "I'm we'LL they'Re it's", "naïve façade", "e\u0301e\u0300", "3.14159 1234567 １２３ Ⅷ ½ ٣",
    "汉字かな交じり文", "한국어", "ﬁﬂ ſ K", "👩‍👩‍👧‍👦🏽 🇺🇳 ❤️", "   ", "\t\t", "\n\n\n", "\r\n",
    "\u00a0\u2003\u3000", "\u200b\u200d", "...", "!?!?", "$1,000.00",
    "https://example.org/a?b=c&d=%20", "snake_case camelCase", "ÅÄÖ ŞİI", "a" * 40, "-" * 25,
    " leading", "trailing ", "A. one\nB. two", "<|not_special|>", "<audio>", "[MASK]",
    *SPECIAL_TOKENS]


def real_encoder(name: str) -> Path | None:
    """Where one of REAL_ENCODERS is: in the folder that the environment variable DIFFA2_WHISPER
    names, in weights/ or in the hub's cache. None if it is nowhere."""
    given = os.environ.get("DIFFA2_WHISPER")
    here = [Path(given, f"{name.replace('.', '_')}_encoder.safetensors"),
            Path(given, "openai", f"whisper-{name}")] if given else []
    found = [*here, *hub_folders(f"openai/whisper-{name}")]
    return next((path for path in found if is_complete(path, "whisper")), None)


def is_old(character: str) -> bool:
    return unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs")


def strings(n: int = 10_000, seed: int = 0) -> list[str]:
    """Texts of every kind: fragments of language and code, any character, combining marks, emoji,
    spaces. Characters newer than Unicode 3.2 are left out, but for emoji: the tables of two
    libraries are not of the same year."""
    rng, found = np.random.default_rng(seed), []
    ranges = [(0x20, 0x7F), (0x00, 0x100), (0x300, 0x370), (0x1F300, 0x1FAFF), (0x00, 0x10000),
              (0x10000, 0x110000)]
    for _ in range(n):
        pieces = []
        for _ in range(rng.integers(1, 6)):
            if rng.random() < 0.5:
                pieces.append(FRAGMENTS[rng.integers(len(FRAGMENTS))])
            else:
                low, high = ranges[rng.integers(len(ranges))]
                points = rng.integers(low, high, size=rng.integers(1, 9))
                pieces += [chr(point) for point in points
                           if 0x1F300 <= point < 0x1FB00 or is_old(chr(point))]
            pieces.append(" " * int(rng.integers(0, 4)))
        found.append("".join(pieces))
    return found


def fingerprint(ids: list[int]) -> int:
    """32 bits that tell token ids apart."""
    return zlib.crc32(np.array(ids, dtype="<i4").tobytes())


def weights(shapes: dict[str, tuple[int, ...]], scale: float = 0.05) -> dict[str, torch.Tensor]:
    """A random tensor for each name, the same whatever the order; those of norms are around 1."""
    found = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.standard_normal(shape, dtype=np.float32) * scale
        mean = 1 if "norm" in name.lower() and name.endswith("weight") else 0
        found[name] = torch.from_numpy(values + mean)
    return found


def tensor(name: str, *shape: int) -> torch.Tensor:
    """A seeded input of standard deviation 1."""
    return weights({name: shape}, scale=1.0)[name]


def clips() -> dict[str, np.ndarray]:
    """Samples at 16 kHz, float32: noise, speech, silence, a tenth of a second, and more than 30
    s."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(35 * 16_000, dtype=np.float32) * 0.1
    tone = np.sin(np.arange(35 * 16_000) * 0.05).astype(np.float32)
    return {
        "noise": noise[:5 * 16_000],
        "speech": load_audio(DATA / "clips" / "three_one_four.wav", 16_000),
        "silence": np.zeros(16_000, np.float32),
        "tenth": noise[:1600],
        "long": 0.5 * noise + 0.3 * tone}
