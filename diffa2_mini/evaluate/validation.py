"""How good a model is while it trains: its answers to held-out questions, how it ranks pairs."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ..command.table import listed
from ..config import StageConfig
from ..data import BatchDataset, Entry, Example, PreferenceBatch
from ..fast.device import autocast
from ..model import Diffa2Model
from ..tokenizer import Tokenizer
from ..training.features import FeatureCache
from ..training.objective import preference_bounds
from ..training.processes import World
from ..vrpo import preference_margin
from . import scoreboard
from .answers import Respondent

RANKING_SAMPLES = 8  # of each answer of a held-out pair


@dataclass(frozen=True)
class Validator:
    """Measures a model on held-out examples, in evaluation mode, and restores its mode."""

    model: Diffa2Model
    tokenizer: Tokenizer
    features: FeatureCache
    seed: int  # of the masks of held-out pairs
    after_batch: Callable[[], None] = lambda: None  # may raise, to end a long measurement

    @contextmanager
    def evaluating(self) -> Iterator[Diffa2Model]:
        was_training = self.model.training
        try:
            yield self.model.eval()
        finally:
            self.model.train(was_training)

    def answers(self, stage: StageConfig, examples: list[Example]) -> list[str]:
        """What the model answers, decoded with the default settings."""
        config = self.model.config
        respondent = Respondent(self.features, self.tokenizer, stage.audio, config.decode,
                                after_batch=self.after_batch)
        with self.evaluating():
            return respondent.answer(examples, stage.micro_batch)[0]

    def report(self, stage: StageConfig, examples: list[Example]) -> scoreboard.Report:
        """How good the answers are."""
        return scoreboard.report(examples, self.answers(stage, examples))

    def print_sample(self, stage: StageConfig, examples: list[Example], number: int) -> None:
        """Answer one of the examples, for each number another until all have been, and print it."""
        example = examples[number * 7919 % len(examples)]  # a prime stride, through all types
        tqdm.write(f"  {example.path.name}: {' / '.join(example.instruction.splitlines())}\n"
                   f"    target {example.answer!r}, answer {self.answers(stage, [example])[0]!r}")

    def pair_batches(self, stage: StageConfig, pairs: list[Example]) -> Iterator[PreferenceBatch]:
        """Held-out pairs in batches of `stage.micro_batch`, on the device."""
        dataset = BatchDataset(pairs, self.seed, stage, self.model.config, self.tokenizer,
                               noise="held-out answers")
        for numbers in torch.arange(len(pairs)).split(stage.micro_batch):
            batch = dataset[[Entry(0, number) for number in numbers.tolist()]]
            yield batch.encoded(self.features, self.features.device)

    @torch.no_grad()
    def margins(self, stage: StageConfig, reference: dict[str, Tensor], pairs: list[Example]
                ) -> Tensor:
        """How much likelier than by the `reference` the chosen answer of each pair has become,
        against the rejected one, in nats [n]. Of each answer there are RANKING_SAMPLES, more than
        in training: the noise of few hides which pairs are ranked right. Masked wholly, all samples
        are the same, and there is one."""
        n = 1 if stage.masking == "all-masked" else RANKING_SAMPLES
        stage, found = dataclasses.replace(stage, vrpo_samples=n), []  # [B] each
        with self.evaluating():
            for batch in self.pair_batches(stage, pairs):
                with autocast(self.features.device, self.features.dtype):
                    bounds = preference_bounds(self.model, reference, batch, stage, self.tokenizer)
                found.append(preference_margin(*bounds))
                self.after_batch()
        return torch.cat(found)

    def rank_pairs(self, stage: StageConfig, reference: dict[str, Tensor],
                   examples: list[Example]) -> dict[str, float]:
        """Print how often the implicit reward ranks the chosen answer first, and the mean margin,
        over every twelfth pair among the examples. Nothing if there are no pairs."""
        pairs = [example for example in examples if example.rejected][::12]
        if not pairs:
            tqdm.write("  no held-out example has a rejected answer: how pairs are ranked is not "
                       "measured")
            return {}
        margins = self.margins(stage, reference, pairs)
        right, margin = float((margins > 0).float().mean()), float(margins.mean())
        tqdm.write(f"  held-out pairs: {right:.3f} ranked right, margin {margin:.2f}")
        return {"reward_accuracy": right, "margin": margin}


def print_incomplete(features: FeatureCache, examples: list[Example], world: World) -> None:
    """Count and name the clips of these examples that end early and were used all the same."""
    found = dict(world.gather([*features.incomplete.items()]))
    paths = dict.fromkeys(example.path for example in examples)
    if lines := [found[path] for path in paths if path in found]:
        print("\n".join(f"  {line}" for line in listed(scoreboard.INCOMPLETE, lines)))
