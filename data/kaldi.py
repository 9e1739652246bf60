"""A manifest from Kaldi's tables: `wav.scp` (id, path of the clip) and `text` (id, words).

    python data/kaldi.py test_clean      # test_clean/manifest.json
    python -m diffa2_mini.evaluate --benchmark asr --file test_clean/manifest.json

wav.scp may have fewer ids than text: such a clip counts as one that could not be read.
"""

import sys
from pathlib import Path

# so that this file runs as a script
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import re

from data.toy import write_json
from diffa2_mini.command.script import Parser
from diffa2_mini.errors import read_text, require


def read_table(path: Path) -> dict[str, str]:
    """A table of Kaldi's: on each line an id and what belongs to it."""
    rows = re.findall(r"(\S+)(.*)", read_text(path, "a table of Kaldi's"))
    require(len(dict(rows)) == len(rows) > 0,
            f"{path}: expected lines with an id each, got none, or an id twice")
    return {id: text.strip() for id, text in rows}


def read_kaldi(folder: Path) -> list[dict]:
    """The rows of a manifest, in the order of `text`. Raises UserError."""
    file = folder / "wav.scp"
    clips, texts = read_table(file), read_table(folder / "text")
    wrong = [id for id, clip in clips.items() if id not in texts or clip.endswith("|")]
    require(not wrong, f"{file}: expected paths of clips with a transcript in 'text', got none, or "
                       f"a command to run, for {', '.join(wrong[:5])}")
    return [{"id": id, "audio_filepath": clips.get(id), "transcription": text}
            for id, text in texts.items()]


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the tables are, and the manifest goes")
    folder = parser.parse_args(argv).folder
    rows, path = read_kaldi(folder), folder / "manifest.json"
    write_json(path, rows)
    print(f"{len(rows):,} transcripts: {path}")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
