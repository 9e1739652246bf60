"""Where each size's weights and tokenizer are: shipped, at a path, or on the Hugging Face hub."""

import os
import re
from contextlib import suppress
from pathlib import Path

from ..config import ASSETS, Config
from ..errors import UserError, require
from ..tokenizer import Tokenizer
from ..weights import SHIPPED, WHAT, files_in
from .tokenizer_json import read_tokenizer_json

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
SOURCES = {  # of each part, unless the user says otherwise: files, folders or hub names
    "toy": SHIPPED,
    "small": {"whisper": "openai/whisper-tiny.en", "llada": ASSETS / "small_llada.safetensors",
              "diffa2": ASSETS / "small_diffa2.safetensors"},
    "diffa1": {"whisper": "openai/whisper-small", "llada": LLADA, "diffa2": "zhoujiaming777/DIFFA"},
    "full": {"whisper": "openai/whisper-large-v3", "llada": LLADA,
             "diffa2": "zhoujiaming777/DIFFA-2"}}


def hub_folders(name: str) -> list[Path]:
    """Where a download from the Hugging Face hub may be: in weights/NAME, or in hf's cache."""
    variable = os.environ.get
    home = variable("HF_HOME") or Path(variable("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = variable("HF_HUB_CACHE") or variable("HUGGINGFACE_HUB_CACHE") or Path(home, "hub")
    cache = Path(os.path.expandvars(os.path.expanduser(hub)), f"models--{name.replace('/', '--')}")
    main = cache / "refs" / "main"  # names the snapshot to prefer
    preferred = cache / "snapshots" / (main.read_text().strip() if main.is_file() else "")
    return [Path("weights", name), preferred, *sorted(cache.glob("snapshots/*"))]


def is_complete(folder: Path, part: str) -> bool:
    """Whether a folder holds all the files of a part."""
    beside = [folder / "tokenizer.json"] if part == "llada" else []
    with suppress(UserError):
        return all(file.is_file() for file in files_in(folder) + beside)
    return False


def moved(path: Path) -> str:
    """Where a file that earlier versions shipped in data/ is now, to be added to an error."""
    is_old = path.parent.name == "data" and (ASSETS / path.name).is_file()
    return f"; it is now {ASSETS / path.name}" if is_old else ""


def locate_all(sources: dict[str, str | Path | None], size: str) -> dict[str, Path]:
    """The file or folder of each part. Its source is a path, the name of a download from the hub or
    None for the size's own. Raises UserError that says how to get what is missing."""
    found, downloads = {}, []
    for part, source in sources.items():
        source = source or SOURCES.get(size, {}).get(part)
        require(source, f"size {size} has no {WHAT[part]} of its own; name them with --{part}")
        name, here = str(source), Path(source)
        is_file = here.suffix in (".safetensors", ".bin", ".pt")
        is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_file
        folders = [here, *hub_folders(name)] if is_on_hub else []
        found[part] = next((folder for folder in folders if is_complete(folder, part)), here)
        if is_on_hub and not found[part].exists():
            form = " model.safetensors" if part == "whisper" else ""  # of several forms there
            downloads.append(f"hf download {name}{form} --local-dir weights/{name}")
        elif not found[part].exists():
            stage, how = "1" if part == "diffa2" else f"0 --parts {part}", f"; check --{part}"
            if size == "toy" or size == "small" and part != "whisper":
                how = f"; python train.py --stage {stage} --size {size} makes some"
            raise UserError(f"{source}: expected {WHAT[part]}, found no such file or folder"
                            f"{moved(here) or how}")
    require(not downloads, "found no such file or folder, nor a download in weights/ or in the "
                           f"hub's cache; pip install huggingface_hub && {' && '.join(downloads)}")
    return found


def tokenizer_file(config: Config, llada: str | Path | None = None) -> Path:
    """Where the tokenizer of a size is: with us, or beside the backbone's weights."""
    if config.from_scratch:
        return ASSETS / config.text.tokenizer
    path = locate_all({"llada": llada}, config.size)["llada"]
    return (path if path.is_dir() else path.parent) / config.text.tokenizer


def load_tokenizer(config: Config, llada: str | Path | None = None,
                   random_weights: bool = False) -> Tokenizer:
    """The tokenizer of a size; with random weights, the toy's in place of one to be downloaded."""
    is_toy = random_weights and not config.from_scratch
    file = ASSETS / "toy.bpe" if is_toy else tokenizer_file(config, llada)
    tokenizer = (Tokenizer.from_ranks if file.suffix == ".bpe" else read_tokenizer_json)(file)
    n_ids, most = tokenizer.vocab_size, config.llada.vocab_size
    require(n_ids <= most,
            f"{file}: expected {most:,} ids at most, got {n_ids:,}; take the backbone's own")
    return tokenizer
