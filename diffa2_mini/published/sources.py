"""Where the weights of each size are, and its tokenizer: with us, at a path, or in what was
downloaded from the Hugging Face hub."""

import os
import re
from pathlib import Path

from ..config import ASSETS, Config
from ..errors import UserError, require
from ..tokenizer import Tokenizer
from ..weights import SHIPPED, WHAT, files_in, moved
from .tokenizer_json import read_tokenizer_json

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
SOURCES = {  # of each part, unless the user says otherwise: files, folders or hub names
    "toy": SHIPPED,
    "small": {
        "whisper": "runs/small/small_whisper.safetensors",
        "llada": "runs/small/small_llada.safetensors", "diffa2": "runs/small/stage4.safetensors"},
    "diffa1": {"whisper": "openai/whisper-small", "llada": LLADA, "diffa2": "zhoujiaming777/DIFFA"},
    "full": {
        "whisper": "openai/whisper-large-v3", "llada": LLADA, "diffa2": "zhoujiaming777/DIFFA-2"},
}


def hub_folders(name: str) -> list[Path]:
    """Where the files of a repository on the Hugging Face hub are, if they were downloaded:
    weights/NAME, then the cache."""
    def folder(default: Path, *variables: str) -> Path:
        """What the first variable that is set names, with ~ and $NAME expanded as by hf."""
        values = [os.environ[name] for name in variables if os.environ.get(name)]
        return Path(os.path.expandvars(os.path.expanduser([*values, default][0])))

    home = folder(folder(Path("~", ".cache"), "XDG_CACHE_HOME") / "huggingface", "HF_HOME")
    hub = folder(home / "hub", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    cache = hub / f"models--{name.replace('/', '--')}"
    main = cache / "refs" / "main"  # names the snapshot to prefer
    preferred = cache / "snapshots" / (main.read_text().strip() if main.is_file() else "")
    return [Path("weights", name), preferred, *sorted(cache.glob("snapshots/*"))]


def is_complete(folder: Path, part: str) -> bool:
    """Whether a folder holds all the files of a part."""
    try:
        files_in(folder)
    except UserError:
        return False
    return folder.is_dir() and (part != "llada" or (folder / "tokenizer.json").is_file())


def locate(source: str | Path | None, part: str, size: str) -> Path:
    """The file or folder that `source` names: a path, or a repository on the Hugging Face hub that
    was downloaded; None is the size's own. Raises UserError that says how to get it."""
    source = source or SOURCES.get(size, {}).get(part)
    require(source, f"size {size} has no {WHAT[part]} of its own; name them with --{part}")
    name, here = str(source), Path(source)
    is_file = here.is_file() or name.endswith((".safetensors", ".bin", ".pt"))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not is_file and not is_complete(here, part):
        folder = next((folder for folder in hub_folders(name) if is_complete(folder, part)), None)
        if folder:
            return folder
        # Whisper's repositories hold it in many forms
        file = " model.safetensors" if part == "whisper" else ""
        published = source in (SOURCES[of].get(part) for of in ("diffa1", "full"))
        require(here.parent.exists() and not published,  # a path that was mistyped, and no name
                f"expected {WHAT[part]} in weights/{name} or in the cache of the Hugging Face hub, "
                f"found them in neither; get them: hf download {name}{file} --local-dir "
                f"weights/{name}")
    if here.exists():
        return here
    stage, how = 1 if part == "diffa2" else 0, f"; check --{part}"
    if size in ("toy", "small"):
        how = f"; python train.py --stage {stage} --size {size} makes some"
    raise UserError(f"{source}: expected {WHAT[part]}, found no such file or folder"
                    f"{moved(here) or how}")


def locate_all(sources: dict[str, str | Path | None], size: str) -> dict[str, Path]:
    """Each part's file or folder. Raises one UserError for all that are missing."""
    found, missing = {}, []
    for part, source in sources.items():
        try:
            found[part] = locate(source, part, size)
        except UserError as error:
            missing.append(str(error))
    require(not missing, "; ".join(missing))
    return found


def tokenizer_file(config: Config, llada: str | Path | None = None) -> Path:
    """Where the tokenizer of a size is: with us, or beside the backbone's weights."""
    if config.text.tokenizer.endswith(".bpe"):
        return ASSETS / config.text.tokenizer
    path = locate(llada, "llada", config.size)
    return (path if path.is_dir() else path.parent) / config.text.tokenizer


def load_tokenizer(config: Config, llada: str | Path | None = None,
                   random_weights: bool = False) -> Tokenizer:
    """The tokenizer of a size: a rank file that we ship, or the tokenizer.json beside the
    backbone's weights; with random weights, to which all tokens are alike, that of the toy."""
    if random_weights and not config.from_scratch:
        return Tokenizer.from_ranks(ASSETS / "toy.bpe")
    file = tokenizer_file(config, llada)
    if file.suffix == ".bpe":
        return Tokenizer.from_ranks(file)
    tokenizer = read_tokenizer_json(file)
    most = config.llada.vocab_size
    require(tokenizer.vocab_size <= most,
            f"{file}: expected ids below {most:,}, got up to {tokenizer.vocab_size - 1:,}; take "
            "the backbone's own")
    return tokenizer
