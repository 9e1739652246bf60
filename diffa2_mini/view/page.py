"""A page that shows answers forming: the clip, and every step of every answer with the alternatives
to each token.

It is one file that fetches nothing: `assets/page.html` with all of that written into it as JSON.
The page shows what users and models wrote as text, never as HTML.
"""

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile

from ..audio import log_mel
from ..config import ASSETS, DecodeConfig
from ..fast.generate import Step
from ..listen import Answer, Diffa2
from ..tokenizer import Tokenizer
from ..training.files import write_whole

TEMPLATE = ASSETS / "page.html"
TOP = 5  # alternatives to each token


def predictions(history: list[Step], tokenizer: Tokenizer) -> list[list]:
    """What each step of decoding one response predicted, as a list with, for each token:

        [position, token, confidence, [[alternative, probability], ... TOP of them]]

    The token is written as its bytes, a character each (latin-1), since a letter may take several
    tokens. It is None where a mask was left, and "" where the answer ends.
    """
    special, found = {tokenizer.mask_id: None, tokenizer.eot_id: "", tokenizer.eos_id: ""}, []
    for step in history:
        found.append([])
        columns = (step.tokens, step.confidence, *step.likely)  # [1, R], and [1, R, TOP] each
        rows = zip(*(column[0].tolist() for column in columns))
        for at, (token, confidence, *likely) in enumerate(rows):
            top = [[tokenizer.spell([each]), round(p, 4)] for each, p in zip(*likely) if p > 0]
            if top:  # it was predicted
                spelled = tokenizer.tokens.get(token, b"\xff").decode("latin-1")
                found[-1].append([at, special.get(token, spelled), round(confidence, 4), top])
    return found


def picture(mel: np.ndarray) -> np.ndarray:
    """A log-mel [n_mels, M] as uint8 [n_mels, M], 0 where it is quietest; the highest band is the
    first row. The page colours it."""
    quiet, loud = mel.min(), mel.max()
    return np.round(255 * (mel[::-1] - quiet) / max(loud - quiet, 1e-6)).astype(np.uint8)


def section(diffa2: Diffa2, name: str, samples: np.ndarray, prompt: str, answer: Answer,
            decode: DecodeConfig) -> dict:
    """What the page shows of an answer about a clip [samples]; its steps have TOP likely tokens."""
    audio, wav = diffa2.config.audio, BytesIO()
    n_frames = -(-len(samples) // audio.hop_length)
    mel = log_mel(samples, audio)[:, :n_frames].numpy()  # without the silence behind the clip
    soundfile.write(wav, samples, audio.sample_rate, format="WAV", subtype="PCM_16")
    return {
        "clip": name, "prompt": prompt, "text": answer.text, "length": len(answer.tokens),
        "steps": predictions(answer.history, diffa2.tokenizer),
        "passes": answer.steps * (2 if decode.cfg > 0 else 1), "seconds": answer.seconds,
        "duration": len(samples) / audio.sample_rate, "highest": audio.sample_rate / 2,  # s, Hz
        "bands": audio.n_mels, "picture": b64encode(picture(mel)).decode(),
        "sound": f"data:audio/wav;base64,{b64encode(wav.getvalue()).decode()}"}


def save(path: Path, sections: list[dict]) -> None:
    """Write the page, or raise UserError. No `<` of the JSON can end the script that holds it."""
    data = json.dumps(sections).replace("<", "\\u003c")
    text = TEMPLATE.read_text(encoding="utf-8").replace("SECTIONS", data)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
