"""Weights out, for others: in the published names, or as a smaller copy of a checkpoint."""

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..command.script import Parser
from ..config import PROMPTS_AND_SEMANTIC
from ..model import part_of
from ..weights import translate
from .checkpoint import load_checkpoint, save_checkpoint
from .files import save_tensors, write_whole

TO_PUBLISHED = [  # from our names to those of DIFFA-2
    (r"^acoustic_connector\.qformer\.", "acoustic_connector.qformer.layer."),
    (r"attention\.(query|key|value)\.", r"attention.self.\1."),
    (r"attention\.(dense|LayerNorm)\.", r"attention.output.\1."),
    (r"(layer\.\d+\.intermediate)\.", r"\1.dense."), (r"(layer\.\d+\.output)\.", r"\1.dense."),
    (r"(layer\.\d+)\.LayerNorm\.", r"\1.output.LayerNorm."),
    (r"^llada\.", "llm_model.base_model.model.model.transformer."),
    (r"\.(lora_[AB])$", r".\1.default.weight")]


def save_diffa2(trained: dict[str, Tensor], path: Path) -> None:
    """Write the `trained_tensors` of a model under the authors' names: a .bin, which their code
    reads, or safetensors. Reading it again gives the same bits."""
    tensors = {translate(name, TO_PUBLISHED): tensor.cpu().clone()
               for name, tensor in trained.items()}
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, {"format": "pt"})
    else:
        write_whole(path, partial(torch.save, tensors))


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


def main(argv: list[str]) -> None:
    """`python -m diffa2_mini.weights`"""
    from .. import weights

    parser = Parser(weights.__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="FROM", help="what train.py wrote")
    parser.add_argument("to", type=Path, metavar="TO", help="a .bin, or .safetensors")
    parser.add_argument("--half", action="store_true",
                        help="write a copy of the checkpoint in float16 instead")
    export(**vars(parser.parse_args(argv)))
