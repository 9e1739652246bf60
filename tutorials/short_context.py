"""What it costs a published Whisper encoder to hear less than 30 s: how far its hidden states move
if positions beyond the first are cut.

    pip install huggingface_hub
    hf download openai/whisper-tiny.en model.safetensors --local-dir weights/openai/whisper-tiny.en
    python tutorials/short_context.py    # on data/orders/test.json, or name another manifest

Only frames that hold sound are compared. A figure is the mean squared distance of the states from
those that 30 s of context give, in percent of the variance of these over frames and clips: 100
would be what the mean state of all frames costs.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

from dataclasses import replace

import torch
from torch import Tensor

from diffa2_mini import weights
from diffa2_mini.audio import encoder_frames, load_audio, log_mel
from diffa2_mini.command.script import Parser
from diffa2_mini.command.table import columns
from diffa2_mini.config import AudioConfig, WhisperConfig
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import require
from diffa2_mini.published.sources import locate_all
from diffa2_mini.whisper import WhisperEncoder

TINY = WhisperConfig(n_mels=80, width=384, n_layers=4, n_heads=6, taps=(0, 1, 2, 3, 4))
AUDIO = AudioConfig(n_mels=80)


@torch.no_grad()
def states_of(clips: list, path: Path, seconds: int) -> Tensor:
    """Hidden states [N, frames, E] of all frames of `clips` that hold sound, heard so long."""
    encoder = WhisperEncoder(replace(TINY, n_positions=50 * seconds)).eval()
    weights.load_part(encoder, "whisper", path)
    audio, found = replace(AUDIO, max_seconds=seconds), []
    for samples in clips:
        taps = encoder(log_mel(samples, audio)[None])[1][0]  # [N, T, E]
        found.append(taps[:, :encoder_frames(len(samples), audio)])
    return torch.cat(found, dim=1)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("manifest", type=Path, nargs="?",
                        default=ROOT / "data" / "orders" / "test.json")
    parser.add_argument("--whisper", help="an encoder of tiny.en (default: a download)")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--seconds", type=int, nargs="+", default=[20, 15, 13])
    args = parser.parse_args(argv)
    path = locate_all({"whisper": args.whisper or "openai/whisper-tiny.en"}, "small")["whisper"]
    names = dict.fromkeys(row["audio_filepath"] for row in read_manifest(args.manifest))
    every = [load_audio(args.manifest.parent / name, AUDIO.sample_rate, AUDIO.max_seconds)
             for name in names]
    shortest = min(args.seconds) * AUDIO.sample_rate
    clips = [samples for samples in every if len(samples) <= shortest][:args.clips]
    require(clips, f"{args.manifest}: expected clips of at most {min(args.seconds)} s, got none")
    print(f"{len(clips)} clips of {sum(map(len, clips)) / len(clips) / AUDIO.sample_rate:.1f} s on "
          "average; percent of the variance")
    whole = states_of(clips, path, AUDIO.max_seconds)
    variance = (whole - whole.mean(1, keepdim=True)).pow(2).sum((1, 2))  # [N]
    shares = [100 * (states_of(clips, path, seconds) - whole).pow(2).sum((1, 2)) / variance
              for seconds in args.seconds]
    rows = [("hidden state", *(f"{seconds} s" for seconds in args.seconds))]
    rows += [(f"h{tap}", *(f"{share[i]:.2f}" for share in shares))
             for i, tap in enumerate(TINY.taps)]
    print(columns(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
