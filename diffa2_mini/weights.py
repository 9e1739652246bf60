"""Published weights in and out: Whisper's encoder, LLaDA, and what the authors of DIFFA-2 trained.

Three downloads make the model: the two frozen parts, and the authors' adapters with LoRA. They come
in several layouts; each has a map from its names to ours. Every tensor of a file must be accounted
for: those that it also holds and we do not need (Whisper's decoder, copies of the frozen parts) are
skipped by name, and anything else that is too much, too little or of another shape is an error. The
frozen parts are built on torch's `meta` device, which has shapes and no memory, and filled tensor
by tensor from memory-mapped files, in the dtype and on the device where they are to be.

    python -m diffa2_mini.weights runs/full/stage4.safetensors pytorch_model.bin  # in the authors' names, for their code
"""

from .command.script import begin, out_of_memory, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import hashlib
import json
import os
import pickle
import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import ACOUSTIC_AND_SEMANTIC, ASSETS, PROMPTS_AND_SEMANTIC, Config
from .errors import UserError, require, require_contents
from .llada import Llada
from .lora import merge_lora
from .model import Diffa2Model, part_of
from .tokenizer import Tokenizer
from .training.checkpoint import (
    complain,
    load,
    read_tensors,
    save_tensors,
    strictly,
    trained_tensors)
from .training.files import write

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

# Each layout: the names that we do not need, and patterns that turn the other names, one after the
# other, into ours.
LAYOUTS = {
    "OpenAI's Whisper": (r"decoder\.", [(r"^encoder\.", "")]),
    "Hugging Face's Whisper": (r"(model\.)?decoder\.|proj_out\.",
                               [(r"^(model\.)?encoder\.", ""), (r"^layers\.", "blocks."),
                                (r"^embed_positions\.weight$", "positional_embedding"),
                                (r"^layer_norm\.", "ln_post."),
                                (r"\.self_attn_layer_norm\.", ".attn_ln."),
                                (r"\.final_layer_norm\.", ".mlp_ln."),
                                (r"\.self_attn\.q_proj\.", ".attn.query."),
                                (r"\.self_attn\.k_proj\.", ".attn.key."),
                                (r"\.self_attn\.v_proj\.", ".attn.value."),
                                (r"\.self_attn\.out_proj\.", ".attn.out."), (r"\.fc1\.", ".mlp.0."),
                                (r"\.fc2\.", ".mlp.2.")]),
    "LLaDA": (r"(?!)", [(r"^model\.transformer\.", "")]),
    "DIFFA-2": (r"whisper_model\.|llm_model\.(?!.*\.lora_)",
                [(r"^acoustic_connector\.qformer\.layer\.", "acoustic_connector.qformer."),
                 (r"attention\.(self|output)\.", "attention."),
                 (r"\.intermediate\.dense\.", ".intermediate."),
                 (r"(\.qformer\.\d+)\.output\.dense\.", r"\1.output."),
                 (r"(\.qformer\.\d+)\.output\.LayerNorm\.", r"\1.LayerNorm."),
                 (r"^llm_model\.(base_model\.model\.)?model\.transformer\.", "llada."),
                 (r"\.(lora_[AB])(\.default)?\.weight$", r".\1")]),
}
OUT = [  # from our names to those of DIFFA-2
    (r"^acoustic_connector\.qformer\.", "acoustic_connector.qformer.layer."),
    (r"attention\.(query|key|value)\.", r"attention.self.\1."),
    (r"attention\.(dense|LayerNorm)\.", r"attention.output.\1."),
    (r"(layer\.\d+\.intermediate)\.", r"\1.dense."), (r"(layer\.\d+\.output)\.", r"\1.dense."),
    (r"(layer\.\d+)\.LayerNorm\.", r"\1.output.LayerNorm."),
    (r"^llada\.", "llm_model.base_model.model.model.transformer."),
    (r"\.(lora_[AB])$", r".\1.default.weight")]
# of the parts that stage 0 makes
PUBLISHED_PREFIX = {"whisper": "encoder.", "llada": "model.transformer."}
ENDS = 2**16  # bytes at each end of a tensor that its fingerprint reads
WHAT = {
    "whisper": "weights of a Whisper encoder", "llada": "weights of LLaDA",
    "diffa2": "weights of DIFFA-2"}


# ------------------------------------------------------------------------------------------ finding


def hub_folders(name: str) -> list[Path]:
    """Where the files of a repository on the Hugging Face hub are, if they were downloaded:
    weights/NAME, then the cache."""
    def folder(default: Path, *variables: str) -> Path:
        """That of the first variable that is set; ~ and $NAME in it are what they are for hf."""
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
    stage = 1 if part == "diffa2" else 0
    how = f"python train.py --stage {stage} --size {size} makes some" if size in (
        "toy", "small") else f"check --{part}"
    raise UserError(f"{source}: expected {WHAT[part]}, found no such file or folder; {how}")


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


def files_in(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, in the order of preference; a file is itself."""
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            require_contents(index, "an index of shards")
            try:
                shards = sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{index}: expected a weight_map of shards, got {error!r}; download it again"
                ) from None
            missing = [shard for shard in shards if not (path / shard).is_file()]
            require(
                not missing,
                f"{path}: expected {len(shards)} shards, got none named {', '.join(missing[:4])}; "
                "download them again")
            return [path / shard for shard in shards]
        if (path / name).is_file():
            return [path / name]
    others = sorted(path.glob("*.pt")) + sorted(path.glob("*.safetensors"))
    require(
        len(others) == 1,
        f"{path}: expected model.safetensors, pytorch_model.bin, an index of their shards, or one "
        f"other file of weights, got {len(others)}; name the file itself")
    return others


# ------------------------------------------------------------------------------------------ reading


def unpickle(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .pt or .bin file, memory-mapped. Such a file can hold code: it is refused,
    and nothing is run."""
    require(path.is_file(), f"{path}: expected {what}, found no such file")
    require_contents(path, what)
    with open(path, "rb") as file:
        first = file.read(1)
    require(first in (b"P", b"\x80"), f"{path}: expected {what}, got another kind of file "
                                      "(a web page?); download it again")

    def read(mmap):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            found = read(mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 cannot be mapped
            if out_of_memory(error):
                raise
            found = read(mmap=False)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: expected {what}, got a pickle with something else in it, perhaps code; it was not run. "
            "Get the file from its source, or as safetensors") from None
    except Exception as error:  # a damaged pickle can raise anything
        if out_of_memory(error):
            raise
        raise UserError(
            f"{path}: expected {what}, got a file that is cut off or damaged ({type(error).__name__}); "
            "download it again") from None
    found = found.get("model_state_dict", found) if isinstance(found, dict) else found
    plain = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(found[name], Tensor) for name in found)
    require(plain, f"{path}: expected {what}, got a file without named tensors")
    return found


def read_weights(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a file or a folder under their own names, memory-mapped. Raises UserError."""
    found = {}
    for file in files_in(path):
        pickled = file.suffix in (".pt", ".bin", ".pth")
        tensors = unpickle(file, WHAT[part]) if pickled else read_tensors(file, WHAT[part])[0]
        twice = found.keys() & tensors.keys()
        require(
            not twice,
            f"{file}: expected each tensor once, got {', '.join(sorted(twice)[:4])} twice; download again"
        )
        found |= tensors
    return found


def translate(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(tensors: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors that we need, under our names."""
    skip, rules = LAYOUTS[layout]
    return {
        translate(name, rules): tensor
        for name, tensor in tensors.items()
        if not re.match(skip, name)}


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


def fill(module: nn.Module, tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype,
         source: str) -> None:
    """Put `tensors` in the place of those of the module, on `device` and in `dtype`. Raises
    UserError unless names and shapes are the same; then nothing has changed."""
    complain(module.state_dict(), tensors, source)
    module.load_state_dict({name: tensor.to(device, dtype, copy=True)
                            for name, tensor in tensors.items()}, assign=True)


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of the encoder (`whisper`), the backbone (`llada`) or what the authors of DIFFA-2
    trained (`diffa2`), memory-mapped and under our names, from a file or folder in any layout."""
    tensors = read_weights(path, part)
    layout = {"llada": "LLaDA", "diffa2": "DIFFA-2", "whisper": "OpenAI's Whisper"}[part]
    if part == "whisper" and any(".layers." in name for name in tensors):
        layout = "Hugging Face's Whisper"
    return renamed(tensors, layout)


def load_part(module: nn.Module, part: str, path: Path, device: torch.device = torch.device("cpu"),
              dtype: torch.dtype = torch.float32) -> str:
    """Fill the encoder (`whisper`) or the backbone (`llada`) from a file or folder in any layout;
    returns the fingerprint of what was in it, whatever `device` and `dtype` are."""
    tensors = read_part(path, part)
    fill(module, tensors, device, dtype, str(path))
    return fingerprint(tensors)


def load_diffa2(model: Diffa2Model, path: Path) -> tuple[str, ...]:
    """Fill adapters, prompts and LoRA with what the authors published, or with part of it: stage 1
    has no LoRA and no acoustic adapter, or an untrained one, whose `layer_weights` are zero.
    Returns what the file's stage splices in."""
    tensors = read_part(path, "diffa2")
    parts = {
        part_of(name)
        for name in tensors
        if name.startswith(tuple(dict(model.named_children())))}
    require("semantic" in parts,
            f"{path}: expected {WHAT['diffa2']}, got a file without a semantic adapter")
    if "lora" in parts:
        model.add_lora()
    targets = {
        name: tensor
        for name, tensor in trained_tensors(model).items()
        if part_of(name) in parts}
    strictly(targets, tensors, str(path))
    model.fingerprints["diffa2"] = fingerprint(tensors)
    hears_more = "acoustic" in parts and bool(model.acoustic_connector.layer_weights.any())
    return ACOUSTIC_AND_SEMANTIC if hears_more else PROMPTS_AND_SEMANTIC


def fill_at_random(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in place of a download: norms are the identity, biases zero, the rest has a
    deviation of 0.02. The same few million numbers serve all: drawing billions would take
    minutes."""
    # a prime: rows of a matrix differ
    pool = torch.empty(4_194_301, device=device, dtype=dtype).normal_(0, 0.02)
    filled = {}
    for name, tensor in module.state_dict().items():
        if tensor.dim() == 1:
            filled[name] = torch.full(tensor.shape, 0.0 if name.endswith("bias") else 1.0,
                                      device=device, dtype=dtype)
        else:
            filled[name] = pool.repeat(tensor.numel() // len(pool) +
                                       1)[:tensor.numel()].clone().view(tensor.shape)
    module.load_state_dict(filled, assign=True)


# ------------------------------------------------------------------------------- all of it together


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
    require(
        tokenizer.vocab_size <= config.llada.vocab_size,
        f"{file}: expected ids below {config.llada.vocab_size:,}, got up to {tokenizer.vocab_size - 1:,}; take the backbone's own"
    )
    return tokenizer


def build(config: Config, whisper: str | Path | None = None, llada: str | Path | None = None,
          device: torch.device = torch.device("cpu"), dtype: torch.dtype = torch.float32,
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


def load_pretrained(config: Config, whisper: str | Path | None = None,
                    llada: str | Path | None = None, diffa2: str | Path | None = None,
                    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                    merge: bool = False) -> Diffa2Model:
    """DIFFA-2 of any size with published weights: files, folders or hub names; None is the size's
    own. With `merge` LoRA is folded into the backbone, which then cannot train it, and in bfloat16
    loses some of it. Raises UserError."""
    paths = locate_all({"whisper": whisper, "llada": llada, "diffa2": diffa2}, config.size)
    model = build(config, paths["whisper"], paths["llada"], torch.device(device), dtype)
    load_diffa2(model, paths["diffa2"])
    if merge:
        merge_lora(model)
    return model.eval().requires_grad_(False).to(device)


def save_part(module: nn.Module, part: str, path: Path, made_by: str) -> None:
    """Write a part in float16 under its published names, with the command that made it."""
    prefix = PUBLISHED_PREFIX[part]
    save_tensors(path,
                 {prefix + name: tensor.half()
                  for name, tensor in module.state_dict().items()},
                 {"format": "pt", "made_by": made_by})


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
    """Write trained tensors (`checkpoint.trained_tensors` of a model) under the authors' names: a
    .bin, which their code reads, or safetensors. Reading it again gives the same bits."""
    tensors = {translate(name, OUT): tensor.cpu().clone() for name, tensor in trained.items()}
    if Path(path).suffix == ".safetensors":
        save_tensors(path, tensors, {"format": "pt"})
    else:
        write(path, lambda temporary: save_bin(tensors, temporary))


def export(argv: list[str]) -> None:
    """The command: a checkpoint of ours to a file in the authors' names."""
    require(
        len(argv) == 2, f"expected a checkpoint and the file to write, got {len(argv)} arguments")
    found = load(Path(argv[0]))
    save_diffa2({
                    name: tensor
                    for name, tensor in found.model.items()
                    if found.audio != PROMPTS_AND_SEMANTIC or part_of(name) in PROMPTS_AND_SEMANTIC
                }, Path(argv[1]))


if __name__ == "__main__":
    sys.exit(run_script(export, sys.argv[1:]))
