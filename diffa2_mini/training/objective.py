"""What a stage minimises, and with which optimiser."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import StageConfig
from ..data import AnswerBatch, Batch, PreferenceBatch
from ..diffusion import diffusion_loss
from ..fast.token_losses import token_losses
from ..model import Diffa2Model
from ..tokenizer import Tokenizer
from ..vrpo import elbo, preference_margin, reference_of, vrpo_loss


def set_dropout(part: nn.Module, p: float) -> None:
    """Set all dropout of a part: of LoRA in the backbone, or of the acoustic adapter."""
    for module in part.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def adamw(trained: dict[str, Tensor], lr: float, betas: tuple[float, float], weight_decay: float
          ) -> torch.optim.AdamW:
    """AdamW on parameters by name. Matrices decay; vectors do not: they are biases and the scales
    of norms, which have no reason to be near 0. The release's trainer does the same."""
    matrices = [tensor for tensor in trained.values() if tensor.dim() > 1]
    vectors = [tensor for tensor in trained.values() if tensor.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    fused = {tensor.device.type for tensor in trained.values()} <= {"cpu", "cuda"}
    return torch.optim.AdamW(groups, lr, betas, weight_decay=weight_decay, fused=fused or None)


def learning_rate(step: int, n_steps: int, stage: StageConfig) -> float:
    """The learning rate of a step: linear warm-up, then linear or cosine decay to zero."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, n_steps - stage.warmup)
    if stage.schedule == "linear":
        return stage.lr * (1 - done)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * done))


def answer_loss(model: Diffa2Model, batch: AnswerBatch, stage: StageConfig,
                n_tokens: int) -> Tensor:
    """Stages 1 to 3: the masked diffusion loss of a batch; the whole step has `n_tokens` tokens."""
    hidden = predictor(model, batch, stage)(batch.noisy, batch.valid, batch.masked)  # [K, D]
    losses_of = token_losses(model.llada.logits)
    return diffusion_loss(hidden, batch.response, batch.masked, batch.weight, n_tokens, losses_of)


def piece_loss(model: Diffa2Model, reference: dict[str, Tensor], batch: Batch, stage: StageConfig,
               tokenizer: Tokenizer, n_tokens: int) -> dict[str, Tensor]:
    """What one of a step's batches adds to its loss and other figures. The whole step has
    `stage.batch_size` examples, with `n_tokens` tokens in their answers."""
    if not stage.preference:
        return {"loss": answer_loss(model, batch, stage, n_tokens)}
    policy, old = preference_bounds(model, reference, batch, stage, tokenizer)
    margins = preference_margin(policy.detach(), old)  # [B]
    fraction = len(batch.examples) / stage.batch_size
    return {"loss": vrpo_loss(policy, old, stage.vrpo_beta) * fraction,
            "margin": margins.mean() * fraction,
            "reward_accuracy": (margins > 0).float().mean() * fraction}


def predictor(call: Callable, batch: Batch, stage: StageConfig) -> Callable:
    """The model `call` as a function of noisy responses to the clips and prompts of a batch."""
    return lambda *noisy: call(batch.audio, stage.audio, batch.prompts, *noisy)


def once_a_pair(predict: Callable) -> Callable:
    """`predict` for pairs whose answers are masked wholly: where both are as long they are the same
    rows [2B, R], of which it is given one a pair."""
    def call(*rows: Tensor) -> Tensor:
        pairs = [each.unflatten(0, (-1, 2)).unbind(1) for each in rows]  # [2B, R] -> [B, R] twice
        if not all(torch.equal(chosen, rejected) for chosen, rejected in pairs):
            return predict(*rows)
        hidden = predict(*(chosen for chosen, _ in pairs)).split(pairs[-1][0].sum(1).tolist())
        return torch.cat([each for each in hidden for _ in range(2)])  # [K / 2, D] -> [K, D]
    return call


def preference_bounds(model: Diffa2Model, reference: dict[str, Tensor], batch: PreferenceBatch,
                      stage: StageConfig, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Stage 4: the bounds [B, 2] by the policy and by the reference, which see the same masks.
    `reference` has the trained tensors of the latter."""
    losses_of = token_losses(model.llada.logits)  # the head is frozen, and so the same for both
    predicts = [predictor(call, batch, stage) for call in (model, reference_of(model, reference))]
    if stage.masking == "all-masked":
        predicts = map(once_a_pair, predicts)
    policy, old = (elbo(predict, batch.response, batch.valid, batch.masked, tokenizer.mask_id,
                        losses_of) for predict in predicts)
    return policy.view(-1, 2), old.view(-1, 2)  # [2B] -> [B, 2]
