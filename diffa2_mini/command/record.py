"""A clip from the microphone, by way of the package sounddevice, which is an extra."""

import sys
from io import BytesIO
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import soundfile

from ..errors import UserError, require

SILENCE = 1e-4  # of full scale: three steps of 16 bits, less than the noise of a microphone


def record(seconds: float, longest: float) -> Path:
    """A wav file, one of the system's temporary ones, with what the default microphone hears from
    now on. Raises UserError if that is longer than `longest`, or there is no microphone."""
    require(seconds <= longest,
            f"--record must be at most {longest}, the seconds that this size takes, got {seconds}")
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise UserError("--record: expected the package sounddevice and its library PortAudio, got "
                        f"'{error}'; pip install sounddevice, and on Debian or Ubuntu apt install "
                        "libportaudio2") from None
    try:
        rate = round(sounddevice.query_devices(kind="input")["default_samplerate"])
        sound = np.zeros((round(seconds * rate), 1), np.float32)  # silence if it is unplugged
        print(f"recording {seconds:g} s: speak now", file=sys.stderr)
        sounddevice.rec(out=sound, samplerate=rate, blocking=True)
    except sounddevice.PortAudioError as error:
        raise UserError(f"--record: expected a microphone, got '{' '.join(str(error).split())}'; "
                        "plug one in and choose it in the system's settings") from None
    wav = BytesIO()
    soundfile.write(wav, sound, rate, format="WAV", subtype="PCM_16")
    with NamedTemporaryFile(prefix="recording_", suffix=".wav", delete=False) as file:
        path = Path(file.name)
    try:
        path.write_bytes(wav.getvalue())
    except OSError:
        path.unlink()
        raise
    print(f"recorded: {path}", file=sys.stderr)
    if np.abs(sound).max() < SILENCE:
        print("note: the recording is silent; is the microphone muted, or kept from this program?",
              file=sys.stderr)
    return path
