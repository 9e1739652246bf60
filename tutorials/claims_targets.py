"""What a training step of claims.py learns from: losses beside those of a stage's `masking`, what
they have as targets, and how much a step's gradient varies.

A *target* is a token whose cross-entropy is part of the loss.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffa2_mini.config import StageConfig
from diffa2_mini.data import AnswerBatch
from diffa2_mini.diffusion import diffusion_loss
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.model import Diffa2Model
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.training.objective import predictor
from tutorials import autoregressive
from tutorials.autoregressive import answer_tokens

LIGHT_EOS = "late EOS lighter"  # every EOS but the first counts a tenth, as in stage 0; biased
FEW_TARGETS = "few targets"  # of the autoregressive twin: what diffusion's noise masks, no more
LATE_EOS = 0.1


def training_loss(model: Diffa2Model, batch: AnswerBatch, stage: StageConfig, tokenizer: Tokenizer,
                  causal: bool, kind: str | None = None) -> Tensor:
    """What stages 1 to 3 minimise: the stage's own loss, or that of a `kind` above."""
    if causal:
        counted = batch.masked if kind == FEW_TARGETS else batch.valid
        return autoregressive.answer_loss(model, batch, stage, tokenizer, counted)
    counts = batch.valid.float()  # [B, R], how much each token counts
    if kind == LIGHT_EOS:
        counts[(batch.response == tokenizer.eos_id).long().cumsum(1) > 1] *= LATE_EOS
    hidden = predictor(model, batch, stage)(batch.noisy, batch.valid, batch.masked)  # [K, D]
    losses_of = token_losses(model.llada.logits)

    def weighted(states: Tensor, tokens: Tensor) -> Tensor:
        return losses_of(states, tokens) * counts[batch.masked]

    return diffusion_loss(hidden, batch.response, batch.masked, batch.weight, counts.sum(),
                          weighted)


def count_targets(batch: AnswerBatch, tokenizer: Tokenizer, causal: bool, kind: str | None
                  ) -> dict[str, int]:
    """How many targets a batch has; how many of them are no EOS that fills the response; and how
    many of these are predicted while no token of the answer is in view, from the audio alone."""
    answer = answer_tokens(batch.response, tokenizer)  # [B, R]
    if causal:
        counted = answer & batch.masked if kind == FEW_TARGETS else answer
        alone = counted[:, :1]
    else:
        counted = batch.masked
        hidden = (counted | ~answer).all(1, keepdim=True)  # [B, 1], the answer is
        alone = counted & answer & hidden
    return {"targets": int(counted.sum()), "answer_targets": int((counted & answer).sum()),
            "targets_from_audio_alone": int(alone.sum())}


def gradient_spread(losses: Iterable[Tensor], trained: list[Tensor]) -> tuple[float, float]:
    """The variance of the gradient of some losses with respect to all that is trained, as one
    vector: the mean squared distance from its mean. And the squared norm of the mean, of which the
    part that is noise is taken off, so that it may come out below zero."""
    total, squares, n = torch.zeros(()), 0.0, 0
    for loss in losses:
        g = torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)])
        total, squares, n = total.to(g) + g, squares + float(g.square().sum()), n + 1
    square_of_mean = float(total.square().sum()) / n**2
    variance = (squares - n * square_of_mean) / (n - 1)
    return variance, square_of_mean - variance / n

