"""How noisy VRPO's preference score is, with the masks of policy and reference shared or not.

The score of a pair is an estimate, from masks that are drawn at random. This draws them several
times and measures the variance of the score: what claims.py reports of its stage-4 models.
"""

import dataclasses

import torch
from torch import Tensor

from diffa2_mini.config import StageConfig
from diffa2_mini.data import Example, PreferenceBatch
from diffa2_mini.evaluate.validation import Validator
from diffa2_mini.fast.device import autocast
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.training.objective import predictor
from diffa2_mini.vrpo import elbo, preference_margin, reference_of


def bounds_apart(model: Diffa2Model, reference: dict[str, Tensor], batch: PreferenceBatch,
                 stage: StageConfig, tokenizer: Tokenizer, reference_masks: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """`preference_bounds`, with masks [2P, n, R] of its own for the reference."""
    losses_of = token_losses(model.llada.logits)

    def bounds(call, masks):
        return elbo(predictor(call, batch, stage), batch.response, batch.valid, masks,
                    tokenizer.mask_id, losses_of).view(-1, 2)  # [2B] -> [B, 2]

    return (bounds(model, batch.masked), bounds(reference_of(model, reference), reference_masks))


def redraw(batch: PreferenceBatch, generator: torch.Generator) -> Tensor:
    """Other masks for a batch, bool [2P, n, R]: each hides k valid tokens, k uniform."""
    n_tokens = batch.valid.sum(1)[:, None, None]  # [2P, 1, 1]
    n_samples, device = batch.masked.shape[1], n_tokens.device
    uniform = torch.rand(len(n_tokens), n_samples, 1, generator=generator).to(device)
    k = 1 + (uniform * n_tokens).long()  # [2P, n, 1]
    order = torch.rand(batch.masked.shape, generator=generator).to(device)
    ranks = order.masked_fill(~batch.valid[:, None], 2).argsort(-1).argsort(-1)  # padding last
    return ranks < k


@torch.no_grad()
def score_variance(validator: Validator, reference: dict[str, Tensor], stage: StageConfig,
                   examples: list[Example], n_estimates: int = 4) -> dict[str, float]:
    """Variance of the score over the draw of its masks, mean over some of the pairs among the
    examples: with masks that policy and reference share, and with independent ones. Nothing if
    there are no pairs. Measured in evaluation mode."""
    pairs = [example for example in examples if example.rejected][::64]
    if not pairs:
        return {}
    model, tokenizer = validator.model, validator.tokenizer
    generator = torch.Generator().manual_seed(seed_of("score", 0, stage.number))
    shared, independent = [], []
    with validator.evaluating():
        batch = next(validator.pair_batches(stage, pairs))
        for _ in range(n_estimates):
            masks = redraw(batch, generator)
            drawn = dataclasses.replace(batch, masked=masks)
            for margins, others in ((shared, masks), (independent, redraw(batch, generator))):
                with autocast(validator.features.device, validator.features.dtype):
                    bounds = bounds_apart(model, reference, drawn, stage, tokenizer, others)
                margins.append(preference_margin(*bounds))
    return {"variance_shared": float(torch.stack(shared).var(0).mean()),
            "variance_independent": float(torch.stack(independent).var(0).mean())}
