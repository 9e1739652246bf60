"""Stage 0, second half: pretrain the backbone of the sizes that are trained from scratch, in the
place of LLaDA-8B.

Not part of DIFFA-2. It learns by masked diffusion on text alone: a description of a clip stands
where the audio will be, and the answer is to be found in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data.pretraining.config import PretrainConfig
from data.pretraining.optimization import REPORT_EVERY, learning_rate, running_mean, update
from data.pretraining.recall import learn_recall, recall_loss, words_to_recall
from data.pretraining.saves import NOT_SAVED, Saves
from data.pretraining.texts import (
    TextBatch,
    Texts,
    TextSource,
    as_sentence,
    embed,
    like_audio,
    pairs_of,
)
from data.toy import TextExample, text_example
from diffa2_mini.command.script import progress
from diffa2_mini.config import LladaConfig
from diffa2_mini.fast.device import DTYPES, autocast
from diffa2_mini.fast.generate import generate_responses
from diffa2_mini.llada import Block, Llada, rotary
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of, stream
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.training.objective import adamw


@torch.no_grad()
def init_backbone(model: Llada, generator: torch.Generator) -> None:
    """Embeddings of standard deviation 1 around a direction that all share, weights of
    1 / sqrt(inputs), less where a block adds to the residual stream. Two heads of the first block
    start by attending to the neighbours."""
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 1.0 if name.startswith("wte") else parameter.shape[1] ** -0.5
            if name.startswith("blocks") and name.endswith(("attn_out.weight", "ff_out.weight")):
                std /= math.sqrt(2 * config.n_layers)
            nn.init.normal_(parameter, std=std, generator=generator)
    shared = torch.randn(config.width, generator=generator)
    model.wte.weight += shared
    for head, offset in enumerate((-1, 1)):
        attend_to_neighbour(model.blocks[0], config, head, offset, shared / shared.norm())


def attend_to_neighbour(block: Block, config: LladaConfig, head: int, offset: int, shared: Tensor,
                        sharpness: float = 0.8) -> None:
    """Let a head attend to the token at `offset`, -1 or 1. Its queries and keys read only the
    direction `shared` [D] that all embeddings have, and the queries start turned by `offset`, so
    that the score is the sum over rotary frequencies f of cos(f (distance - offset)). Copying and
    choosing are built on knowing a word's neighbour."""
    width = config.width // config.n_heads
    # [2, width / 2]; row 1 is a turn by one position
    cos, sin = rotary(torch.arange(2), width, config.rope_theta)
    fast = torch.arange(width // 2) < 6  # the frequencies that tell neighbours apart
    zero = torch.zeros(width // 2)
    key = torch.cat([fast.float(), zero])
    query = torch.cat([cos[1] * fast, offset * sin[1] * fast])
    rows = slice(head * width, (head + 1) * width)
    block.q_proj.weight[rows] = sharpness * torch.outer(query, shared)
    block.k_proj.weight[rows] = sharpness * torch.outer(key, shared)


def text_loss(model: Diffa2Model, tokenizer: Tokenizer, batch: TextBatch, config: PretrainConfig,
              rng: np.random.Generator) -> Tensor:
    """Mean cross-entropy of the masked tokens of a batch, without the weight 1/t."""
    B = len(batch.response)
    t = torch.from_numpy(rng.uniform(config.shortest_time, 1, size=(B, 1)))
    masked = torch.from_numpy(rng.random(batch.response.shape)) < t  # [B, R]
    masked = masked.to(batch.valid.device) & batch.valid
    noisy = batch.response.masked_fill(masked, tokenizer.mask_id)
    hidden = model.hidden_states(batch.audio_embeddings(model), batch.prompts, noisy, batch.valid)
    logits = model.llada.logits(hidden[masked])  # [K, V]
    losses = F.cross_entropy(logits, batch.response[masked], reduction="none")
    weight = batch.weight[masked]
    return (losses * weight).sum() / weight.sum()


@dataclass(frozen=True)
class Paradigm:
    """How a backbone learns from texts, learns to recall, and generates an answer; and what draws
    the texts."""

    text_loss: Callable[..., Tensor]
    recall_loss: Callable[..., Tensor]
    generate: Callable[..., tuple[Tensor, int]]
    draw: TextSource = text_example


MASKED_DIFFUSION = Paradigm(text_loss, recall_loss, generate_responses)


@torch.no_grad()
def accuracy_by_type(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample],
                     max_silences: int | None = None,
                     generate: Callable = generate_responses) -> dict[str, float]:
    """How many answers of each type of question are right, decoded with the defaults. The
    descriptions are sentences; or, with `max_silences`, in the form that resembles audio."""
    right, rng = {}, np.random.default_rng(0)
    for start in range(0, len(examples), 100):
        batch = examples[start:start + 100]
        descriptions = [as_sentence(tokenizer, each) if max_silences is None
                        else like_audio(tokenizer, each, max_silences, rng) for each in batch]
        pairs = pairs_of(descriptions, model.config.llada.vocab_size)
        audio_embeddings = embed(model, pairs, [len(each) for each in descriptions])
        prompts = [tokenizer.prompt(model.config.text.system, each.instruction) for each in batch]
        tokens, _ = generate(model, tokenizer, audio_embeddings, prompts, model.config.decode)
        for example, row in zip(batch, tokens.tolist()):
            is_right = tokenizer.decode(row).strip() == example.answer.strip()
            right.setdefault(example.type, []).append(is_right)
    return {type: float(np.mean(found)) for type, found in sorted(right.items())}


def open_and_lettered(accuracy: dict[str, float]) -> tuple[float, float]:
    """Mean over the open types, mean over the lettered types; not a number where there are none."""
    lettered = [value for type, value in accuracy.items() if type.endswith("+abcd")]
    plain = [value for type, value in accuracy.items() if not type.endswith("+abcd")]
    return tuple(sum(some) / len(some) if some else math.nan for some in (plain, lettered))


def report(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample], silences: int,
           generate: Callable) -> str:
    """Two lines: how many answers are right if descriptions are sentences, or resemble audio."""
    lines = []
    for form, max_silences in (("sentences", None), ("audio-like", silences)):
        accuracy = accuracy_by_type(model, tokenizer, examples, max_silences, generate)
        plain, lettered = open_and_lettered(accuracy)
        by_type = ", ".join(f"{type} {value:.2f}" for type, value in accuracy.items())
        lines.append(f"  on {form}: open {plain:.3f}, lettered {lettered:.3f} ({by_type})")
    return "\n".join(lines)


def rate_at(step: int, config: PretrainConfig) -> float:
    """The learning rate of a step on texts: up and down twice, without silences and with them."""
    if step < config.backbone_steps:
        return config.backbone_lr * learning_rate(step, config.backbone_steps, config.warmup)
    return config.silence_lr * learning_rate(step - config.backbone_steps, config.silence_steps,
                                             config.warmup)


def pretrain_backbone(model: Diffa2Model, config: PretrainConfig, seed: int,
                      say: Callable = tqdm.write, goes_on: bool = False,
                      paradigm: Paradigm = MASKED_DIFFUSION, saves: Saves = NOT_SAVED) -> float:
    """Train the backbone in place, from its start or what `saves` has; or, if it `goes_on`, the
    last part alone, with silences. Says now and then how many held-out texts it answers right; of
    these no more are asked than it learns from. Returns the mean loss at the end."""
    llada, tokenizer = model.llada, load_tokenizer(model.config)
    device, held_out = llada.wte.weight.device, stream("held-out texts", seed)
    evaluation = [paradigm.draw(held_out, True) for _ in range(config.n_held_out)]
    if not goes_on:
        init_backbone(llada.cpu(),
                      torch.Generator().manual_seed(seed_of("backbone", seed, "weights")))
        llada.to(device)
    named = dict(llada.requires_grad_(True).named_parameters())
    optimizer = adamw(named, config.backbone_lr, (0.9, 0.98), weight_decay=0.01)
    words = words_to_recall(evaluation, tokenizer).to(device)
    generator = torch.Generator().manual_seed(seed_of("backbone", seed, "recall"))
    exercise = partial(paradigm.recall_loss, llada, words, tokenizer, config, generator)
    means = torch.tensor([0, math.log(config.recall_pairs)], device=device)  # of both losses
    first = saves.restore(llada, optimizer, means, generator) or config.backbone_steps * goes_on
    if not first:
        means[1] = learn_recall(exercise, optimizer, named.values(), config, say)
    n_steps = config.backbone_steps + config.silence_steps
    asked = evaluation[:config.backbone_steps * config.backbone_batch]
    steps = range(first, n_steps)
    texts = Texts(model.config, config, tokenizer, seed, paradigm.draw)
    for step, batch in zip(progress(steps, desc="backbone"), texts.batches(steps, device)):
        masks = stream("texts", seed, step, "masks")
        with autocast(device, DTYPES[config.dtype]):
            loss, recalled = paradigm.text_loss(model, tokenizer, batch, config, masks), exercise()
        update(optimizer, named.values(), loss + recalled, rate_at(step, config))
        means.copy_(running_mean(means, torch.stack([loss.detach(), recalled.detach()])))
        saves.save(step + 1, llada, optimizer, means, generator)
        is_last = step + 1 == n_steps
        if step % REPORT_EVERY == REPORT_EVERY - 1 or is_last:
            say("backbone step {}: loss {:.3f}, recall {:.3f}".format(step + 1, *means.tolist()))
            some = asked if is_last else asked[:max(1, len(asked) // 5)]
            say(report(model, tokenizer, some, config.silences, paradigm.generate))
    llada.requires_grad_(False)
    return float(means[0])
