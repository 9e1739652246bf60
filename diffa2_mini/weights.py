"""Weights in and out: what others published, and checkpoints of our own.

Three downloads make the model: the two frozen parts, and the authors' adapters with LoRA. They come
in several layouts; each has a map from its names to ours. Every tensor of a file must be accounted
for: those that it also holds and we do not need (Whisper's decoder, copies of the frozen parts) are
skipped by name, and anything else that is too much, too little or of another shape is an error. The
frozen parts are built on torch's `meta` device, which has shapes and no memory, and filled tensor
by tensor from memory-mapped files, in the dtype and on the device where they are to be.

A checkpoint is one safetensors file with what was trained, its config, and all that resuming needs.
Such a file holds named tensors and a few strings, and no code. Tensors of the model keep their
names; those of the optimiser have a prefix. The fingerprints in it tell which frozen parts it was
trained on.

    python -m diffa2_mini.weights runs/full/stage4.safetensors pytorch_model.bin  # authors' names
    python -m diffa2_mini.weights --half runs/toy/stage4.safetensors half.safetensors   # float16
"""

if __name__ == "__main__":
    from .command.script import begin

    begin(__name__)  # Ctrl-C while the rest is imported

import dataclasses
import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import ACOUSTIC_AND_SEMANTIC, ASSETS, PROMPTS_AND_SEMANTIC, Config, from_dict, to_dict
from .errors import UserError, out_of_memory, require, require_contents
from .llada import Llada
from .model import Diffa2Model, part_of
from .tokenizer import Tokenizer

LLADA = "GSAI-ML/LLaDA-8B-Instruct"
# where the parts of each size are, unless the user says otherwise: files, folders or hub names
SOURCES = {
    "toy": {
        "whisper": ASSETS / "toy_whisper.safetensors", "llada": ASSETS / "toy_llada.safetensors",
        "diffa2": ASSETS / "toy_diffa2.safetensors"},
    "small": {
        "whisper": "runs/small/small_whisper.safetensors",
        "llada": "runs/small/small_llada.safetensors", "diffa2": "runs/small/stage4.safetensors"},
    "diffa1": {"whisper": "openai/whisper-small", "llada": LLADA, "diffa2": "zhoujiaming777/DIFFA"},
    "full": {
        "whisper": "openai/whisper-large-v3", "llada": LLADA, "diffa2": "zhoujiaming777/DIFFA-2"},
}
SHIPPED = SOURCES["toy"]
CPU = torch.device("cpu")

# Each layout: a pattern of the names that we do not need, and substitutions that together turn the
# other names into ours.
LAYOUTS = {
    "OpenAI's Whisper": (r"decoder\.", [(r"^encoder\.", "")]),
    "Hugging Face's Whisper": (r"(model\.)?decoder\.|proj_out\.", [
        (r"^(model\.)?encoder\.", ""), (r"^layers\.", "blocks."),
        (r"^embed_positions\.weight$", "positional_embedding"), (r"^layer_norm\.", "ln_post."),
        (r"\.self_attn_layer_norm\.", ".attn_ln."), (r"\.final_layer_norm\.", ".mlp_ln."),
        (r"\.self_attn\.q_proj\.", ".attn.query."), (r"\.self_attn\.k_proj\.", ".attn.key."),
        (r"\.self_attn\.v_proj\.", ".attn.value."), (r"\.self_attn\.out_proj\.", ".attn.out."),
        (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.2.")]),
    "LLaDA": (r"(?!)", [(r"^model\.transformer\.", "")]),
    "DIFFA-2": (r"whisper_model\.|llm_model\.(?!.*\.lora_)", [
        (r"^acoustic_connector\.qformer\.layer\.", "acoustic_connector.qformer."),
        (r"attention\.(self|output)\.", "attention."),
        (r"\.intermediate\.dense\.", ".intermediate."),
        (r"(\.qformer\.\d+)\.output\.dense\.", r"\1.output."),
        (r"(\.qformer\.\d+)\.output\.LayerNorm\.", r"\1.LayerNorm."),
        (r"^llm_model\.(base_model\.model\.)?model\.transformer\.", "llada."),
        (r"\.(lora_[AB])(\.default)?\.weight$", r".\1")]),
}
TO_PUBLISHED = [  # from our names to those of DIFFA-2
    (r"^acoustic_connector\.qformer\.", "acoustic_connector.qformer.layer."),
    (r"attention\.(query|key|value)\.", r"attention.self.\1."),
    (r"attention\.(dense|LayerNorm)\.", r"attention.output.\1."),
    (r"(layer\.\d+\.intermediate)\.", r"\1.dense."), (r"(layer\.\d+\.output)\.", r"\1.dense."),
    (r"(layer\.\d+)\.LayerNorm\.", r"\1.output.LayerNorm."),
    (r"^llada\.", "llm_model.base_model.model.model.transformer."),
    (r"\.(lora_[AB])$", r".\1.default.weight")]
PUBLISHED_PREFIX = {"whisper": "encoder.", "llada": "model.transformer."}  # of what stage 0 makes
ENDS = 2**16  # bytes at each end of a tensor that its fingerprint reads
WHAT = {
    "whisper": "weights of a Whisper encoder", "llada": "weights of LLaDA",
    "diffa2": "weights of DIFFA-2"}
FORMAT = "diffa2_mini 3"  # of a checkpoint
BEFORE = "diffa2_mini 2"  # had no settings and no fingerprints, and its runs drew other noise
BELONGS = {  # what a checkpoint has fingerprints of
    "whisper": "other weights than those of --whisper",
    "llada": "other weights than those of --llada",
    "start": "another start than these weights (--init, --diffa2 or the stage before)",
    "manifest": "another manifest (--data)"}


# ------------------------------------------------------------------------------------------ finding


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


def moved(path: str | Path) -> str:
    """Where a file that earlier versions shipped in data/ is now, to be added to an error."""
    names = {file.name for file in ASSETS.iterdir()}
    is_old = Path(path).name in names and Path(path).parent.name == "data"
    return f"; it is now {ASSETS / Path(path).name}" if is_old else ""


def files_in(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, in the order of preference; a file is itself."""
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            require_contents(index, "an index of shards")
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                shards = sorted(set(names))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{index}: expected a weight_map of shards, got {error!r}; download it again"
                ) from None
            missing = [shard for shard in shards if not (path / shard).is_file()]
            require(not missing, f"{path}: expected {len(shards)} shards, got none named "
                                 f"{', '.join(missing[:4])}; download them again")
            return [path / shard for shard in shards]
        if (path / name).is_file():
            return [path / name]
    others = sorted(path.glob("*.pt")) + sorted(path.glob("*.safetensors"))
    require(len(others) == 1,
            f"{path}: expected model.safetensors, pytorch_model.bin, an index of their shards, or "
            f"one other file of weights, got {len(others)}; name the file itself")
    return others


# ------------------------------------------------------------------------------------------ reading


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata. Raises UserError if it is
    missing or damaged; `what` names what was expected."""
    require(Path(path).is_file(), f"{path}: expected {what}, found no such file{moved(path)}")
    require_contents(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected {what}, got a file that is cut off or damaged ({error})") from None


def unpickle(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .pt or .bin file, memory-mapped. Such a file can hold code: it is refused,
    and nothing is run."""
    require(path.is_file(), f"{path}: expected {what}, found no such file")
    require_contents(path, what)
    with open(path, "rb") as file:
        first = file.read(1)
    require(first in (b"P", b"\x80"), f"{path}: expected {what}, got another kind of file "
                                      "(a web page?); download it again")
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        try:
            found = load(mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 cannot be mapped
            if out_of_memory(error):
                raise
            found = load(mmap=False)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: expected {what}, got a pickle with something else in it, perhaps "
                        "code; it was not run. Get the file from its source, or as safetensors"
                        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: expected {what}, got a file that is cut off or damaged "
                        f"({type(error).__name__}); download it again") from None
    found = found.get("model_state_dict", found) if isinstance(found, dict) else found
    is_named = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items())
    require(is_named, f"{path}: expected {what}, got a file without named tensors")
    return found


def read_weights(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a file or a folder under their own names, memory-mapped. Raises UserError."""
    found = {}
    for file in files_in(path):
        is_pickle = file.suffix in (".pt", ".bin", ".pth")
        tensors = unpickle(file, WHAT[part]) if is_pickle else read_tensors(file, WHAT[part])[0]
        twice = sorted(found.keys() & tensors.keys())
        require(not twice, f"{file}: expected each tensor once, got {', '.join(twice[:4])} twice; "
                           "download again")
        found |= tensors
    return found


def translate(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors that we need, under our names."""
    skip, rules = LAYOUTS[layout]
    return {translate(name, rules): tensor
            for name, tensor in tensors.items() if not re.match(skip, name)}


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of the encoder (`whisper`), the backbone (`llada`) or what the authors of DIFFA-2
    trained (`diffa2`), memory-mapped and under our names, from a file or folder in any layout."""
    tensors = read_weights(path, part)
    layout = {"llada": "LLaDA", "diffa2": "DIFFA-2", "whisper": "OpenAI's Whisper"}[part]
    if part == "whisper" and any(".layers." in name for name in tensors):
        layout = "Hugging Face's Whisper"
    return renamed(tensors, layout)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Tells weights apart by their contents: SHA-256 in hexadecimal over each tensor's name, shape,
    and first and last 64 KiB, in the order of names. Of 16 GB in memory-mapped files little is
    read, and a copied or renamed file has the fingerprint of the first."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, list(tensor.shape)]).encode())
        numbers = tensor.detach().reshape(-1)
        n = max(1, ENDS // numbers.element_size())
        for end in (numbers[:n], numbers[-n:]):
            found.update(end.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


# ------------------------------------------------------------------------------------------ loading


def check_fit(targets: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise UserError unless both have the same names and shapes; it lists what is wrong."""
    wrong = [f"missing {name}" for name in targets if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in targets]
    wrong += [f"{name} has shape {list(tensors[name].shape)}, expected {list(target.shape)}"
              for name, target in targets.items()
              if name in tensors and tensors[name].shape != target.shape]
    more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    require(not wrong,
            f"{source}: the weights do not fit this model: {'; '.join(wrong[:8])}{more}")


@torch.no_grad()
def copy_strictly(targets: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Copy `tensors` into `targets` of the same names and shapes, or raise UserError and copy
    nothing."""
    check_fit(targets, tensors, source)
    for name, target in targets.items():
        target.copy_(tensors[name])


def fill(module: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype,
         source: str) -> None:
    """Put `tensors` in the place of those of the module, on `device` and in `dtype`. Raises
    UserError unless names and shapes are the same; then nothing has changed."""
    check_fit(module.state_dict(), tensors, source)
    module.load_state_dict({name: tensor.to(device, dtype, copy=True)
                            for name, tensor in tensors.items()}, assign=True)


def load_part(module: nn.Module, part: str, path: Path, device: torch.device = CPU,
              dtype: torch.dtype = torch.float32) -> str:
    """Fill the encoder (`whisper`) or the backbone (`llada`) from a file or folder in any layout;
    returns the fingerprint of what was in it, whatever `device` and `dtype` are."""
    tensors = read_part(path, part)
    fill(module, tensors, device, dtype, str(path))
    return fingerprint(tensors)


def load_diffa2(model: Diffa2Model, path: Path) -> tuple[str, ...]:
    """Fill adapters, prompts and LoRA with what the authors published, or with part of it: stage 1
    has no LoRA and no acoustic adapter, or an untrained one, whose `layer_weights` are zero.
    Returns what the file's stage splices into the prompt."""
    tensors = read_part(path, "diffa2")
    modules = tuple(dict(model.named_children()))
    parts = {part_of(name) for name in tensors if name.startswith(modules)}
    require("semantic" in parts,
            f"{path}: expected {WHAT['diffa2']}, got a file without a semantic adapter")
    if "lora" in parts:
        model.add_lora()
    targets = {name: tensor for name, tensor in trained_tensors(model).items()
               if part_of(name) in parts}
    copy_strictly(targets, tensors, str(path))
    model.fingerprints["diffa2"] = fingerprint(tensors)
    is_joint = "acoustic" in parts and bool(model.acoustic_connector.layer_weights.any())
    return ACOUSTIC_AND_SEMANTIC if is_joint else PROMPTS_AND_SEMANTIC


def fill_at_random(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in place of a download: norms are the identity, biases zero, the rest has a
    deviation of 0.02. The same few million numbers serve all: drawing billions would take
    minutes."""
    pool = torch.empty(4_194_301, device=device, dtype=dtype)  # a prime: rows of a matrix differ
    pool.normal_(0, 0.02)
    filled = {}
    for name, tensor in module.state_dict().items():
        if tensor.dim() == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            filled[name] = torch.full(tensor.shape, value, device=device, dtype=dtype)
        else:
            n, times = tensor.numel(), tensor.numel() // len(pool) + 1
            filled[name] = pool.repeat(times)[:n].clone().view(tensor.shape)
    module.load_state_dict(filled, assign=True)


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
    tokenizer = Tokenizer.from_tokenizer_json(file)
    most = config.llada.vocab_size
    require(tokenizer.vocab_size <= most,
            f"{file}: expected ids below {most:,}, got up to {tokenizer.vocab_size - 1:,}; take "
            "the backbone's own")
    return tokenizer


def build(config: Config, whisper: str | Path | None = None, llada: str | Path | None = None,
          device: torch.device = CPU, dtype: torch.dtype = torch.float32,
          random_weights: bool = False, llada_class: type[Llada] = Llada) -> Diffa2Model:
    """The model with its frozen parts loaded, in `dtype`; adapters and prompts are new, and in
    float32 at least.

    Sources default to SOURCES. With `random_weights` nothing is read. Raises UserError before
    anything slow.
    """
    paths = {} if random_weights else locate_all({"whisper": whisper, "llada": llada}, config.size)
    model = Diffa2Model(config, "cpu" if config.size == "toy" else "meta", llada_class)
    for part in ("whisper", "llada"):
        if random_weights:
            fill_at_random(getattr(model, part), device, dtype)
            model.fingerprints[part] = "random"
        else:
            found = load_part(getattr(model, part), part, paths[part], device, dtype)
            model.fingerprints[part] = found
    ours = torch.promote_types(dtype, torch.float32)
    for module in (model.semantic_connector, model.acoustic_connector, model.trainable_prompts):
        module.to(ours)
    return model.requires_grad_(False).to(device)


# -------------------------------------------------------------------------------------- checkpoints


@dataclass
class Checkpoint:
    """What a file holds. `stage` is the stage that it belongs to and `step` how many of its steps
    are done. `settings` and `fingerprints` are empty where an earlier format had none."""

    config: Config
    stage: int
    step: int
    done: bool
    model: dict[str, Tensor]
    audio: tuple[str, ...] = ()  # what the stage splices into the prompt
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # what else decides the run, as JSON gives it back
    fingerprints: dict[str, str] = field(default_factory=dict)  # by the keys of BELONGS


def write_whole(path: Path, write_to: Callable[[Path], None], keep: Callable | None = None) -> None:
    """Have `write_to` write a file under a temporary name and then rename it, so that either all of
    it is there or nothing. `keep` is called with the path of a file that is about to be replaced.
    Raises UserError when the disk is full."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_to(temporary)
        with open(temporary, "r+b") as file:  # Windows can sync no file that is open for reading
            os.fsync(file.fileno())
        if keep and path.exists():
            keep(path)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: could not be written ({reason}); free some space or choose "
                        "another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str],
                 keep: Callable | None = None) -> None:
    """Write a safetensors file, or nothing, as `write_whole` does."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata), keep)


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 in hexadecimal over the metadata and every tensor's name, dtype, shape and bytes, in
    the order of names."""
    found = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_checkpoint(path: Path, checkpoint: Checkpoint, keep: Callable | None = None) -> None:
    """Write a checkpoint, or nothing, as `write_whole` does."""
    names = ("stage", "step", "done", "audio", "settings", "fingerprints")
    fields = {"config": to_dict(checkpoint.config)}
    fields |= {name: getattr(checkpoint, name) for name in names}
    tensors = checkpoint.model | {f"optimizer.{name}": tensor
                                  for name, tensor in checkpoint.optimizer.items()}
    metadata = {"format": FORMAT, "checkpoint": json.dumps(fields)}
    save_tensors(path, tensors, metadata | {"sha256": digest(tensors, metadata)}, keep)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint into memory: Windows replaces no file that is mapped, and the next save is
    to replace this one. Raises UserError if the file is missing, cut, or not one of ours."""
    tensors, metadata = read_tensors(path, "a checkpoint (python train.py makes one)")
    found = metadata.get("format", "another safetensors file")
    require(found in (FORMAT, BEFORE),
            f"{path}: expected a checkpoint of '{FORMAT}', got {found!r}")
    require(metadata.pop("sha256", None) == digest(tensors, metadata),
            f"{path}: expected a whole checkpoint, got one that is damaged (its checksum differs); "
            "copy or train it anew")
    model, optimizer = {}, {}
    for name, tensor in tensors.items():
        belongs = optimizer if name.startswith("optimizer.") else model
        belongs[name.removeprefix("optimizer.")] = tensor.clone()
    try:
        fields = json.loads(metadata["checkpoint"])
        config, audio = from_dict(fields.pop("config")), tuple(fields.pop("audio"))
        if metadata["format"] == BEFORE:
            fields = {name: fields[name] for name in ("stage", "step", "done")}
            fields |= {"settings": {}, "fingerprints": {}}
        for name in ("settings", "fingerprints"):
            require(isinstance(fields[name], dict),
                    f"{path}: expected {name} by name, got {type(fields[name]).__name__}")
        return Checkpoint(config, **fields, model=model, audio=audio, optimizer=optimizer)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: expected a checkpoint of '{FORMAT}', got one without {error}") from None


def trained_tensors(model: Diffa2Model) -> dict[str, Tensor]:
    """All that the four stages train: adapters, prompts and LoRA, by name."""
    return {name: p.detach() for name, p in model.named_parameters()
            if part_of(name) not in ("whisper", "llada")}


def restore(model: Diffa2Model, tensors: dict[str, Tensor], source: str) -> None:
    """Copy trained tensors into the model, which gets a LoRA if they have one. Raises UserError
    that lists every name that is missing, unexpected or of another shape."""
    has_lora = any("lora_" in name for name in tensors)
    if has_lora:
        model.add_lora()
    targets = {name: p for name, p in trained_tensors(model).items()
               if has_lora or part_of(name) != "lora"}
    copy_strictly(targets, tensors, source)


def differences(was: dict, now: dict, above: str = "") -> list[tuple[str, object, object]]:
    """What differs of the names that both have, with both values; in dictionaries likewise."""
    found = []
    for name in was.keys() & now.keys():
        if isinstance(was[name], dict) and isinstance(now[name], dict):
            found += differences(was[name], now[name], f"{above}{name}.")
        elif was[name] != now[name]:
            found.append((above + name, was[name], now[name]))
    return sorted(found)


def same_parts(path: Path, found: Checkpoint, fingerprints: dict[str, str]) -> None:
    """Raise UserError unless a checkpoint was trained on the parts of these `fingerprints`."""
    wrong = [BELONGS[name] for name, *_ in differences(found.fingerprints, fingerprints)]
    require(not wrong, f"{path}: was trained on {' and '.join(wrong)}; name those that it was "
                       "trained on, or take these all the same: --other-parts")


# ------------------------------------------------------------------------------------------ sharing


def save_part(module: nn.Module, part: str, path: Path, made_by: str) -> None:
    """Write a part in float16 under its published names, with the command that made it."""
    tensors = {PUBLISHED_PREFIX[part] + name: tensor.half()
               for name, tensor in module.state_dict().items()}
    save_tensors(path, tensors, {"format": "pt", "made_by": made_by})


def save_bin(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a .bin file. Raises OSError when the disk is full, of which torch makes a
    RuntimeError."""
    try:
        torch.save(tensors, path)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise OSError(str(error)) from None


def save_diffa2(trained: dict[str, Tensor], path: Path) -> None:
    """Write the `trained_tensors` of a model under the authors' names: a .bin, which their code
    reads, or safetensors. Reading it again gives the same bits."""
    tensors = {translate(name, TO_PUBLISHED): tensor.cpu().clone()
               for name, tensor in trained.items()}
    if Path(path).suffix == ".safetensors":
        save_tensors(path, tensors, {"format": "pt"})
    else:
        write_whole(path, lambda temporary: save_bin(tensors, temporary))


def export(checkpoint: Path, to: Path, half: bool = False) -> None:
    """Write what a checkpoint of ours trained in the authors' names; or with `half`, a copy of it
    in float16 and without the optimiser's state."""
    found = load_checkpoint(checkpoint)
    if half:
        model = {name: tensor.half() for name, tensor in found.model.items()}
        save_checkpoint(to, dataclasses.replace(found, done=True, model=model, optimizer={}))
        return
    is_first = found.audio == PROMPTS_AND_SEMANTIC  # stage 1, which trains these two alone
    save_diffa2({name: tensor for name, tensor in found.model.items()
                 if not is_first or part_of(name) in PROMPTS_AND_SEMANTIC}, to)


if __name__ == "__main__":
    from .command.script import Parser, run_script

    def main(argv: list[str]) -> None:
        parser = Parser(__doc__)
        parser.add_argument("checkpoint", type=Path, metavar="FROM", help="what train.py wrote")
        parser.add_argument("to", type=Path, metavar="TO", help="a .bin, or .safetensors")
        parser.add_argument("--half", action="store_true",
                            help="write a copy of the checkpoint in float16 instead")
        export(**vars(parser.parse_args(argv)))

    sys.exit(run_script(main, sys.argv[1:]))
