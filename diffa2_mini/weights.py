"""Weights in: what others published, under our names, and tensor by tensor.

Three downloads make the model: the two frozen parts, and the authors' adapters with LoRA. They come
in several layouts; each has a map from its names to ours. Every tensor of a file must be accounted
for: those that it also holds and we do not need (Whisper's decoder, copies of the frozen parts) are
skipped by name, and anything else that is too much, too little or of another shape is an error. The
frozen parts are built on torch's `meta` device, which has shapes and no memory, and filled tensor
by tensor from memory-mapped files, in the dtype and on the device where they are to be.

published/sources.py tells where the files are. What we train ourselves is written and read by
training/checkpoint.py, and given away by training/export.py:

    python -m diffa2_mini.weights runs/full/stage4.safetensors pytorch_model.bin  # authors' names
    python -m diffa2_mini.weights --half runs/toy/stage4.safetensors half.safetensors   # float16
"""

if __name__ == "__main__":
    from .command.script import begin

    begin(__name__)  # Ctrl-C while the rest is imported

import hashlib
import json
import pickle
import re
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import ACOUSTIC_AND_SEMANTIC, ASSETS, PROMPTS_AND_SEMANTIC, Config
from .errors import UserError, out_of_memory, require, require_contents
from .llada import Llada
from .model import Diffa2Model, part_of

CPU = torch.device("cpu")
SHIPPED = {part: ASSETS / f"toy_{part}.safetensors" for part in ("whisper", "llada", "diffa2")}

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
ENDS = 2**16  # bytes at each end of a tensor that its fingerprint reads
WHAT = {
    "whisper": "weights of a Whisper encoder", "llada": "weights of LLaDA",
    "diffa2": "weights of DIFFA-2"}


# ------------------------------------------------------------------------------------------ finding


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


def build(config: Config, paths: dict[str, Path] | None = SHIPPED, device: torch.device = CPU,
          dtype: torch.dtype = torch.float32, llada: type[Llada] = Llada) -> Diffa2Model:
    """The model with its frozen parts from `paths`, in `dtype`, or random where that is None. Its
    adapters and prompts are new, and in float32 at least. `llada` is the backbone's class. Raises
    UserError if a file does not fit."""
    model = Diffa2Model(config, "cpu" if config.size == "toy" else "meta", llada)
    for part in ("whisper", "llada"):
        module, model.fingerprints[part] = getattr(model, part), "random"
        if paths is None:
            fill_at_random(module, device, dtype)
        else:
            model.fingerprints[part] = load_part(module, part, paths[part], device, dtype)
    ours = torch.promote_types(dtype, torch.float32)
    for module in (model.semantic_connector, model.acoustic_connector, model.trainable_prompts):
        module.to(ours)
    return model.requires_grad_(False).to(device)


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


if __name__ == "__main__":
    from .command.script import run_script
    from .training.export import main

    sys.exit(run_script(main, sys.argv[1:]))
