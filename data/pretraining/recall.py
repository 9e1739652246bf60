"""Associative recall, an exercise for the backbone (as in arXiv 2312.04927): pairs of words, then
the same pairs in another order, of which one word has to be recalled.

To find the letter that stands before a choice is the same task, and learned from texts alone it
takes many times longer.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from data.pretraining.config import PretrainConfig
from data.pretraining.optimization import REPORT_EVERY, running_mean, update
from data.pretraining.texts import LETTERS
from data.toy import TextExample
from diffa2_mini.command.script import progress
from diffa2_mini.llada import Llada
from diffa2_mini.tokenizer import Tokenizer


def words_to_recall(examples: Iterable[TextExample], tokenizer: Tokenizer) -> Tensor:
    """All words that describe some examples, and the letters of choices, as token ids [n]."""
    words = {word for example in examples for word in example.words()}
    ids = {token for word in words for token in tokenizer.encode(f" {word}")}
    return torch.tensor(sorted(ids | {tokenizer.encode(letter)[0] for letter in LETTERS}))


def draw_pairs(words: Tensor, config: PretrainConfig, generator: torch.Generator
               ) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of words [B, n, 2], the same pairs in another order [B, n, 2], and which word of these
    to recall, 0 or 1 [B, n]. There must be 2 n words or more."""
    B, n = config.backbone_batch, config.recall_pairs
    # random orders of all words and of the pairs: [B, len(words)], [B, n]
    order, again = (torch.rand(B, k, generator=generator).argsort(1).to(words.device)
                    for k in (len(words), n))
    pairs = words[order[:, :2 * n]].view(B, n, 2)
    asked = pairs.gather(1, again[:, :, None].expand(-1, -1, 2))  # [B, n, 2]
    which = torch.randint(0, 2, (B, n), generator=generator)
    return pairs, asked, which.to(words.device)


def recall_loss(model: Llada, words: Tensor, tokenizer: Tokenizer, config: PretrainConfig,
                generator: torch.Generator) -> Tensor:
    """Cross-entropy of the words to recall: of each repeated pair one word is masked."""
    pairs, asked, which = draw_pairs(words, config, generator)
    hidden = F.one_hot(which, 2).bool()  # [B, n, 2]
    both = torch.cat([pairs, asked.masked_fill(hidden, tokenizer.mask_id)], dim=1)  # [B, 2n, 2]
    masked = torch.cat([torch.zeros_like(hidden), hidden], dim=1)  # [B, 2n, 2]
    # word, word, separator, ...: [B, 2n, 3], flattened to [B, 6n]
    tokens = F.pad(both, (0, 1), value=tokenizer.encode("\n")[0]).flatten(1)
    states = model(model.wte(tokens))[F.pad(masked, (0, 1)).flatten(1)]  # [B n, D]
    return F.cross_entropy(model.logits(states), asked[hidden])


def learn_recall(exercise: Callable[[], Tensor], optimizer: torch.optim.Optimizer,
                 parameters: Iterable[Tensor], config: PretrainConfig, say: Callable) -> float:
    """The exercise alone, until the mean of its loss is below `config.recall_loss`; returns that
    mean."""
    guessing = mean = math.log(config.recall_pairs)
    for step in progress(range(config.recall_steps), desc="recall"):
        loss = exercise()
        lr = config.backbone_lr * min(1, (step + 1) / max(1, config.warmup))
        update(optimizer, parameters, loss, lr)
        mean = running_mean(mean, loss.item())
        learned = mean < config.recall_loss
        if step % REPORT_EVERY == REPORT_EVERY - 1 or learned:
            say(f"recall step {step + 1}: loss {mean:.3f}, where guessing gives {guessing:.3f}")
        if learned:
            break
    return mean
