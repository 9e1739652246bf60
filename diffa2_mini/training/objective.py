"""What a stage minimises, with which optimiser, and how well stage 4 ranks: all put together."""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..config import StageConfig
from ..data import AnswerBatch, Batch, Collate, Example, PreferenceBatch
from ..diffusion import diffusion_loss
from ..fast.device import autocast
from ..fast.token_losses import token_losses
from ..model import Diffa2Model
from ..noise import seed_of
from ..tokenizer import Tokenizer
from ..vrpo import Pairs, pair_bounds, preference_margin, reference_of, vrpo_loss
from .features import FeatureCache


def adamw(trained: dict[str, Tensor], lr: float, betas: tuple[float, float], weight_decay: float
          ) -> torch.optim.AdamW:
    """AdamW on tensors by name. Vectors do not decay: they are biases, or what a norm multiplies
    by, which has no reason to be near 0. The release's trainer leaves them out likewise."""
    groups = [{"params": [(name, tensor) for name, tensor in trained.items()
                          if (tensor.dim() > 1) == decays],
               "weight_decay": weight_decay * decays} for decays in (True, False)]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def names_of(optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimiser's tensors, in its order."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def answer_loss(model: Diffa2Model, batch: AnswerBatch, stage: StageConfig,
                n_tokens: int) -> Tensor:
    """Stages 1 to 3: the masked diffusion loss of a batch that has, with the rest of its step,
    `n_tokens` in its answers."""
    hidden = predictor(model, batch, stage)(batch.noisy, batch.valid, batch.masked)  # [K, D]
    losses_of = token_losses(model.llada.logits)
    return diffusion_loss(hidden, batch.response, batch.masked, batch.t, n_tokens, losses_of)


def piece_loss(model: Diffa2Model, reference: dict[str, Tensor], batch: Batch, stage: StageConfig,
               tokenizer: Tokenizer, n_tokens: int) -> dict[str, Tensor]:
    """What a piece of a step's batch adds to the loss of the step, and to other figures. The whole
    batch has `n_tokens` in its answers, and `stage.batch_size` examples."""
    if not stage.preference:
        return {"loss": answer_loss(model, batch, stage, n_tokens)}
    policy, old = preference_bounds(model, reference, batch, stage, tokenizer)
    share, margins = len(batch.examples) / stage.batch_size, preference_margin(policy.detach(), old)
    return {
        "loss": vrpo_loss(policy, old, stage.vrpo_beta) * share, "margin": margins.mean() * share,
        "reward_accuracy": (margins > 0).float().mean() * share}


def predictor(call: Callable, batch: Batch, stage: StageConfig) -> Callable:
    """`call`, a model, as a function of noisy responses to the batch's clips and prompts."""
    return lambda *noisy: call(batch.audio, stage.audio, batch.prompts, *noisy)


def preference_bounds(model: Diffa2Model, reference: dict[str, Tensor], batch: PreferenceBatch,
                      stage: StageConfig, tokenizer: Tokenizer,
                      reference_masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Stage 4: the bounds [P, 2] by the policy and by the reference, whose trained tensors are
    given. Both see the same masks, unless others are given to show what sharing is good for."""
    pairs = Pairs(batch.response, batch.valid, batch.masks)
    losses_of = token_losses(model.llada.logits)  # the head is frozen, and so the same for both
    policy = pair_bounds(predictor(model, batch, stage), pairs, tokenizer.mask_id, losses_of)
    if reference_masks is not None:
        pairs = dataclasses.replace(pairs, masks=reference_masks)
    old = predictor(reference_of(model, reference), batch, stage)
    return policy, pair_bounds(old, pairs, tokenizer.mask_id, losses_of)


def reward_accuracy(margins_of: Callable, batches: Iterable[Batch]) -> dict[str, float]:
    """How often the implicit reward ranks the chosen answer first, and the mean margin.
    `margins_of` gives the margins [P] of a batch of pairs."""
    margins = torch.cat([margins_of(batch) for batch in batches])
    return {"reward_accuracy": float((margins > 0).float().mean()), "margin": float(margins.mean())}


def score_variance(margins_of: Callable, batch: PreferenceBatch, stage: StageConfig,
                   n_estimates: int = 4) -> tuple[float, float]:
    """Variance of the preference score over the draw of its masks, mean over pairs: with masks
    shared between policy and reference, and with independent ones. `margins_of` gives the margins
    [P] of a batch; its second argument is other masks for the reference."""
    generator = torch.Generator().manual_seed(seed_of("score", 0, stage.number))
    n_tokens = batch.valid.sum(1)[:, None, None]  # [2P, 1, 1]

    def draw():
        k = 1 + (torch.rand(len(n_tokens), stage.vrpo_samples, 1, generator=generator).to(
            n_tokens.device) * n_tokens).long()
        order = torch.rand(batch.masks.shape, generator=generator).to(n_tokens.device).masked_fill(
            ~batch.valid[:, None], 2)
        return order.argsort(-1).argsort(-1) < k

    margins = {True: [], False: []}
    for _ in range(n_estimates):
        drawn = dataclasses.replace(batch, masks=draw())
        for shared, others in ((True, None), (False, draw())):
            margins[shared].append(margins_of(drawn, others))
    return tuple(float(torch.stack(margins[shared]).var(0).mean()) for shared in (True, False))


@torch.no_grad()
def measure_pairs(model: Diffa2Model, reference: dict[str, Tensor], examples: list[Example],
                  stage: StageConfig, seed: int, tokenizer: Tokenizer,
                  features: FeatureCache) -> dict[str, float]:
    """Both of the above, on some of the examples that have a rejected answer; nothing if there are
    none. Measured in evaluation mode, whatever mode the model is in and stays in."""
    pairs = [example for example in examples if example.rejected]
    if not pairs:
        return {}

    def collated(some):
        collate = Collate(some, seed, stage, model.config, tokenizer, load=False,
                          held_out=True)
        for start in range(0, len(some), stage.micro_batch):
            numbers = [(0, i) for i in range(start, min(start + stage.micro_batch, len(some)))]
            yield collate[numbers].encoded(features, features.device)

    def margins_of(batch, reference_masks=None):
        with autocast(features.device, features.dtype):
            return preference_margin(*preference_bounds(model, reference, batch, stage, tokenizer,
                                                        reference_masks))

    was_training = model.training
    model.eval()
    try:
        figures = reward_accuracy(margins_of, collated(pairs[::6]))
        shared, independent = score_variance(margins_of, next(collated(pairs[::64])), stage)
    finally:
        model.train(was_training)
    return figures | {"variance_shared": shared, "variance_independent": independent}
