"""Weights in: what others published, under our names, and tensor by tensor.

Three downloads make the model: the two frozen parts, and the authors' adapters with LoRA. They come
in several layouts; each has a map from its names to ours. Every tensor of a file must be accounted
for: those that we do not need (Whisper's decoder, copies of the frozen parts) are skipped by name,
and anything else that is too much, too little or of another shape is an error; but an encoder made
for longer clips than a size hears is cut to the positions of these. The frozen parts are built on
torch's `meta` device, which has shapes and no memory, and filled from memory-mapped files.

published/sources.py tells where the files are. What we train ourselves is written and read by
training/checkpoint.py, which gives it away too:

    python -m diffa2_mini.weights runs/full/stage4.safetensors pytorch_model.bin  # authors' names
    python -m diffa2_mini.weights --half runs/toy/stage4.safetensors half.safetensors   # float16
"""

if __name__ == "__main__":
    import sys

    from .command.script import begin, run_script

    begin(__name__)  # Ctrl-C while the rest is imported
    from .training.checkpoint import main

    sys.exit(run_script(main, sys.argv[1:]))

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import ACOUSTIC_AND_SEMANTIC, ASSETS, PROMPTS_AND_SEMANTIC, SIZES, Config
from .errors import UserError, out_of_memory, read_text, require, require_contents
from .llada import Llada
from .model import Diffa2Model, part_of
from .quantize import quantize_linears

SHIPPED = {part: ASSETS / f"toy_{part}.safetensors" for part in ("whisper", "llada", "diffa2")}
WHAT = {"whisper": "weights of a Whisper encoder", "llada": "weights of LLaDA",
        "diffa2": "weights of DIFFA-2"}
LAYOUTS = {  # patterns of the names that we do not need, and of those to be replaced by ours
    "whisper": (r"(model\.)?decoder\.|proj_out\.", [  # OpenAI's has our names, the rest is for
        (r"^(model\.)?encoder\.", ""), (r"^layers\.", "blocks."),  # Hugging Face's
        (r"^embed_positions\.weight$", "positional_embedding"), (r"^layer_norm\.", "ln_post."),
        (r"\.self_attn_layer_norm\.", ".attn_ln."), (r"\.final_layer_norm\.", ".mlp_ln."),
        (r"\.self_attn\.q_proj\.", ".attn.query."), (r"\.self_attn\.k_proj\.", ".attn.key."),
        (r"\.self_attn\.v_proj\.", ".attn.value."), (r"\.self_attn\.out_proj\.", ".attn.out."),
        (r"\.fc1\.", ".mlp.0."), (r"\.fc2\.", ".mlp.2.")]),
    "llada": (r"(?!)", [(r"^model\.transformer\.", "")]),
    "diffa2": (r"whisper_model\.|llm_model\.(?!.*\.lora_)", [
        (r"^acoustic_connector\.qformer\.layer\.", "acoustic_connector.qformer."),
        (r"attention\.(self|output)\.", "attention."),
        (r"\.intermediate\.dense\.", ".intermediate."),
        (r"(\.qformer\.\d+)\.output\.dense\.", r"\1.output."),
        (r"(\.qformer\.\d+)\.output\.LayerNorm\.", r"\1.LayerNorm."),
        (r"^llm_model\.(base_model\.model\.)?model\.transformer\.", "llada."),
        (r"\.(lora_[AB])(\.default)?\.weight$", r".\1")]),
}


@dataclass(frozen=True)
class Loading:
    """How weights are loaded."""

    quantize: str | None = None  # a kind of quantize.py: linear layers become so as they are read
    say: Callable[[str], None] = lambda line: None  # is told a line that a user should know


def files_in(path: Path) -> list[Path]:
    """The files that hold the weights of a folder, in the order of preference; a file is itself."""
    if not path.is_dir():
        return [path]
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if index.is_file():
            try:
                shards = json.loads(read_text(index, "an index of shards"))["weight_map"].values()
                return [path / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{index}: expected a weight_map of shards, got {error!r}; "
                                "download it again") from None
        if (path / name).is_file():
            return [path / name]
    others = [*path.glob("*.pt"), *path.glob("*.safetensors")]
    require(len(others) == 1, f"{path}: expected model.safetensors, pytorch_model.bin, an index "
                              f"or one other file of weights, got {len(others)}; name the file")
    return others


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, memory-mapped, and its metadata. Raises UserError if it is
    missing or damaged; `what` names what was expected."""
    require_contents(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: expected {what}, got a file that is cut off or damaged ({error})") from None


def unpickle(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .pt or .bin file, memory-mapped. With code in it, it is refused, not run."""
    require_contents(path, what)
    try:  # files older than torch 1.6 are no archives, and cannot be mapped
        found = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        if out_of_memory(error):
            raise
        raise UserError(f"{path}: expected {what}, got a damaged file, a web page, or code, which "
                        f"was not run ({type(error).__name__}); download it again") from None
    if isinstance(found, dict):
        found = found.get("model_state_dict", found)
    is_named = isinstance(found, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items())
    require(is_named, f"{path}: expected {what}, got a file without named tensors")
    return found


def read_weights(path: Path, part: str) -> dict[str, Tensor]:
    """All tensors of a file or a folder under their own names, memory-mapped. Raises UserError."""
    found = {}
    for file in files_in(path):
        is_pickle = file.suffix in (".pt", ".bin", ".pth")
        found |= unpickle(file, WHAT[part]) if is_pickle else read_tensors(file, WHAT[part])[0]
    return found


def translate(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors that we need of a part, under our names."""
    skip, rules = LAYOUTS[part]
    needed = [name for name in tensors if not re.match(skip, name)]
    found = {translate(name, rules): tensors[name] for name in needed}
    require(len(found) == len(needed), f"expected {WHAT[part]}, got some of them twice")
    return found


def read_part(path: Path, part: str) -> dict[str, Tensor]:
    """The tensors of a part, `whisper`, `llada` or `diffa2` (what the authors trained), under our
    names and memory-mapped, from a file or folder in any layout."""
    return renamed(read_weights(path, part), part)


def check_fit(targets: dict[str, Tensor], tensors: dict[str, Tensor], source: str) -> None:
    """Raise UserError unless both have the same names and shapes; it lists what is wrong."""
    wrong = [f"missing {name}" for name in targets if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in targets]
    wrong += [f"{name} has shape {list(tensors[name].shape)}, expected {list(target.shape)}"
              for name, target in targets.items()
              if name in tensors and tensors[name].shape != target.shape]
    listed = "; ".join(wrong[:8]) + f"; and {len(wrong) - 8} more" * (len(wrong) > 8)
    require(not wrong, f"{source}: the weights do not fit this model: {listed}")


def cut_positions(tensors: dict[str, Tensor], encoder: nn.Module, source: Path,
                  say: Callable[[str], None]) -> None:
    """Keep as many of an encoder's positions as `encoder` hears: they count from the start of a
    clip, so the first ones. Raises UserError if it is an encoder of another width."""
    table, ours = tensors.get("positional_embedding"), encoder.positional_embedding
    if table is None or table.dim() != 2:
        return  # not an encoder, and `check_fit` says what is missing
    width, n = table.shape[1], ours.shape[0]
    sizes = {size: config.whisper.width for size, (config, _) in SIZES.items()}
    fits = " or ".join(f"--size {size}" for size in sizes if sizes[size] == width) or "no size"
    require(width == ours.shape[1],
            f"{source}: expected an encoder of width {ours.shape[1]}, got one of {width}, which "
            f"fits {fits} ({', '.join(f'{size} has {w}' for size, w in sizes.items())})")
    if len(table) > n:
        tensors["positional_embedding"] = table[:n]
        say(f"{source}: the first {n} of {len(table):,} positions are used, as many as this size "
            "hears; the others are cut")


def load_part(module: nn.Module, part: str, path: Path, device: torch.device | str = "cpu",
              dtype: torch.dtype = torch.float32, how: Loading = Loading()) -> None:
    """Fill the encoder (`whisper`) or the backbone (`llada`), from any layout. Raises UserError."""
    tensors = read_part(path, part)
    if part == "whisper":
        cut_positions(tensors, module, path, how.say)
    check_fit(module.state_dict(), tensors, str(path))
    if how.quantize:
        quantize_linears(module, how.quantize, lambda name: tensors.pop(name).to(device))
    module.load_state_dict({name: tensor.to(device, dtype, copy=True)
                            for name, tensor in tensors.items()},
                           strict=not how.quantize, assign=True)


def build(config: Config, paths: dict[str, Path] | None = SHIPPED,
          device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
          llada: type[Llada] = Llada, how: Loading = Loading()) -> Diffa2Model:
    """The model with its frozen parts from `paths`, in `dtype`, or without contents if None.
    Adapters and prompts are new, in float32 at least. `llada` is its class. Raises UserError."""
    model = Diffa2Model(config, "cpu" if config.size == "toy" else "meta", llada)
    for part in ("whisper", "llada") if paths else ():
        load_part(getattr(model, part), part, paths[part], device, dtype, how)
    for module in (model.semantic_connector, model.acoustic_connector, model.trainable_prompts):
        module.to(device, torch.promote_types(dtype, torch.float32))
    return model.requires_grad_(False)


def trained_tensors(model: Diffa2Model) -> dict[str, Tensor]:
    """All that the four stages train: adapters, prompts and LoRA, by name; and what is fitted."""
    return {name: tensor for name, tensor in model.state_dict().items()
            if part_of(name) not in ("whisper", "llada")}


def restore(model: Diffa2Model, tensors: dict[str, Tensor], source: str,
            optional: tuple[str, ...] = ("lora",)) -> None:
    """Copy trained tensors into the model, which gets a LoRA if they have one. They may lack the
    parts that are `optional`, which then stay as they are. Raises UserError that lists every name
    that is missing, unexpected or of another shape; nothing is copied then."""
    if any("lora_" in name for name in tensors):
        model.add_lora()
    ours = trained_tensors(model)
    found = {part_of(name) for name in ours if name in tensors}
    targets = {name: p for name, p in ours.items()
               if part_of(name) in found or part_of(name) not in optional}
    check_fit(targets, tensors, source)
    for name, target in targets.items():
        target.copy_(tensors[name])


def load_diffa2(model: Diffa2Model, path: Path) -> tuple[str, ...]:
    """Fill adapters, prompts and LoRA with what the authors published; their stage 1 has no LoRA,
    and no or an untrained acoustic adapter, of zero `layer_weights`. Returns what it splices in."""
    tensors = read_part(path, "diffa2")
    restore(model, tensors, str(path), optional=("prompts", "acoustic", "lora"))
    is_joint = bool(model.acoustic_connector.layer_weights.any())
    return ACOUSTIC_AND_SEMANTIC if is_joint else PROMPTS_AND_SEMANTIC
