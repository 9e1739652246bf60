"""How noisy the gradient of the masked diffusion loss is, with the published noise and with less
variance.

    python train.py --out runs/toy      # minutes; its stages 1 and 2 are measured
    python tutorials/loss_variance.py

For 16 examples of stage 2 the noise is drawn many times. The gradient's variance is the mean
squared distance of the drawn gradients from their mean; all rows estimate the same one.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from diffa2_mini import weights
from diffa2_mini.command.script import Parser
from diffa2_mini.command.table import columns
from diffa2_mini.config import SIZES
from diffa2_mini.data import AnswerBatch, BatchDataset, Entry, load_examples
from diffa2_mini.diffusion import forward_exactly, forward_process, stratified
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.objective import answer_loss

CONFIG = SIZES["toy"][0]
STAGE = dataclasses.replace(SIZES["toy"][1][2], batch_size=16)  # the toy's own 4 say little
TOKENIZER, CPU = load_tokenizer(CONFIG), torch.device("cpu")
Noise = Callable[[AnswerBatch, torch.Generator], tuple[Tensor, Tensor, Tensor]]


def noise_of(exact: bool, spread: bool, power: float = 0.0) -> Noise:
    """The forward process: exactly k masks or each with probability t; times that are `spread` over
    the batch or not; p(k) in proportion to k^power. Returns noisy, masked, weight."""
    def draw(batch: AnswerBatch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        B, R = batch.response.shape
        t = torch.rand(B, generator=generator)
        uniforms = torch.rand(B, R, generator=generator).masked_fill(~batch.valid, 2)
        if spread:
            t = stratified(t, torch.randperm(B, generator=generator), B)
        if exact:
            return forward_exactly(batch.response, t, uniforms, batch.valid.sum(1),
                                   TOKENIZER.mask_id, power)
        return forward_process(batch.response, t, uniforms, TOKENIZER.mask_id)
    return draw


NOISES = {
    "as published": noise_of(False, False), "times spread": noise_of(False, True),
    "exactly k": noise_of(True, False), "exactly k, spread": noise_of(True, True),
    "exactly k, p(k) ~ k^-0.5": noise_of(True, False, -0.5),
    "exactly k, p(k) ~ k^0.5": noise_of(True, False, 0.5),
    "all three, k^-0.5": noise_of(True, True, -0.5),
    "all three, k^0.25": noise_of(True, True, 0.25),
    "all three, k^0.5": noise_of(True, True, 0.5),
}


def gradient(model: Diffa2Model, batch: AnswerBatch, trained: list[Tensor]) -> Tensor:
    """Of the loss of the batch, with respect to all that is trained, as one vector."""
    loss = answer_loss(model, batch, STAGE, int(batch.valid.sum()))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def variance(model: Diffa2Model, batch: AnswerBatch, noise: Noise, n_draws: int) -> float:
    """Of the gradient, over draws of the noise."""
    generator = torch.Generator().manual_seed(seed_of("score", 0, STAGE.number))
    trained, total, squares = [p for p in model.parameters() if p.requires_grad], 0, 0.0
    for _ in range(n_draws):
        batch.noisy, batch.masked, batch.weight = noise(batch, generator)
        g = gradient(model, batch, trained)
        total, squares = total + g, squares + float(g.square().sum())
    return (squares - float(total.square().sum()) / n_draws) / (n_draws - 1)


def measure(checkpoint: Path, n_draws: int) -> dict[str, float]:
    """The variance of each noise, at the weights of a checkpoint, on one batch of stage 2."""
    model = weights.build(CONFIG, llada=FastLlada)
    weights.restore(model, load_checkpoint(checkpoint).model, str(checkpoint))
    model.train_only(STAGE.trains)
    examples = load_examples(ROOT / "data" / "toy" / "sft.json", STAGE, CONFIG)
    step = len(examples) // STAGE.batch_size
    dataset = BatchDataset(examples[::step], 0, STAGE, CONFIG, TOKENIZER)
    batch = dataset[[Entry(0, i) for i in range(STAGE.batch_size)]]
    batch = batch.encoded(FeatureCache(model, CPU, torch.float32), CPU)
    return {name: variance(model, batch, noise, n_draws) for name, noise in NOISES.items()}


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "toy")
    parser.add_argument("--draws", type=int, default=400)
    args = parser.parse_args(argv)
    found = [measure(args.run / f"stage{n}.safetensors", args.draws) for n in (1, 2)]
    rows = [("noise", "start of stage 2", "its end", "of the published")]
    for name in NOISES:
        first, last = (each[name] / each["as published"] for each in found)
        rows.append((name, *(f"{each[name]:.3g}" for each in found), f"{first:.2f}, {last:.2f}"))
    print(columns(rows))


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
