"""What the experiments of claims.py share: how much is done, the variants that are trained, and the
lab that trains and keeps them."""

import copy
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.pretraining.backbone import Paradigm, pretrain_backbone
from data.pretraining.config import PretrainConfig
from data.pretraining.stage0 import save_part
from diffa2_mini import weights
from diffa2_mini.command.script import progress
from diffa2_mini.config import (
    ACOUSTIC_AND_SEMANTIC,
    SIZES,
    DecodeConfig,
    StageConfig,
)
from diffa2_mini.data import BatchDataset, Entry, Example, PreferenceBatch, load_examples
from diffa2_mini.errors import require
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.evaluate.validation import Validator
from diffa2_mini.fast.generate import generate_responses
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of, stream
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.checkpoint import (
    Checkpoint,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.files import save_tensors, write_whole
from diffa2_mini.training.loader import batches
from diffa2_mini.training.objective import adamw, learning_rate, piece_loss, predictor, set_dropout
from diffa2_mini.vrpo import elbo, vrpo_loss
from tutorials import autoregressive
from tutorials.score_variance import bounds_apart, score_variance

CONFIG, STAGES = SIZES["toy"]
CPU = torch.device("cpu")


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def generator_of(causal: bool) -> Callable:
    """How a model generates answers, as `generate_responses`."""
    return autoregressive.generate_greedily if causal else generate_responses


def write_json(path: Path, value) -> None:
    """Write all of it, or nothing."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


@dataclass(frozen=True)
class Scale:
    """How much of everything. The default is what the results were made with."""

    # of each stage
    steps: dict[int, int] = field(default_factory=lambda: {1: 200, 2: 800, 3: 400, 4: 40})
    batch_size: int | None = None  # None: the toy's
    n_clips: tuple[int, int] = (250, 1000)  # distinct training clips, beside all of them
    every: int = 1  # one question out of so many is asked
    n_pairs: int = 32  # whose score is estimated, under
    n_masks: int = 8  # masks of each number of tokens, which stand for all masks there are
    n_texts: int = 960  # that a pretrained backbone is asked
    pretrain: PretrainConfig = PretrainConfig()


QUICK = Scale(
    steps={1: 2, 2: 2, 3: 2, 4: 2}, batch_size=2, n_clips=(3, 6), every=8, n_pairs=1, n_masks=2,
    n_texts=10,
    pretrain=PretrainConfig(recall_steps=2, backbone_steps=1, silence_steps=1, backbone_batch=4,
                            n_held_out=10))


# ------------------------------------------------------------------------------------- the variants


@dataclass(frozen=True)
class Variant:
    """One way to train a model: a stage of the curriculum with some changes, from what another
    variant left."""

    start: str | None  # a variant; None: new adapters
    number: int  # of the stage
    changes: dict = field(default_factory=dict)  # of the stage's row
    lora: dict = field(default_factory=dict)  # changes of its config
    n_clips: int | None = None  # distinct training clips; None: all
    independent: bool = False  # masks that policy and reference do not share
    causal: bool = False  # the autoregressive backbone and its loss
    watched: bool = False  # measure on the way too


def variants(scale: Scale) -> dict[str, Variant]:
    """Every way to train, by name."""
    # as many examples as stages 1 and 2: a step of stage 1 has 32, not 16
    alone = dict(steps=2 * scale.steps[1] + scale.steps[2])
    found = {
        "stage 1": Variant(None, 1),
        "stage 2": Variant("stage 1", 2),
        "stage 3": Variant("stage 2", 3),
        "stage 4": Variant("stage 3", 4, dict(vrpo_samples=4)),
        "semantic": Variant("stage 1", 2, dict(trains=("semantic",), audio=("semantic",))),
        "acoustic": Variant("stage 1", 2, dict(trains=("acoustic",), audio=("acoustic",))),
        "2": Variant(None, 2, alone),
        "1, 2, 2": Variant("stage 2", 3, dict(trains=ACOUSTIC_AND_SEMANTIC)),
        "1, 2, 3, 3": Variant("stage 3", 3, dict(number=5, steps=scale.steps[4], lr=STAGES[4].lr,
                                                warmup=STAGES[4].warmup)),  # 5: noise of its own
        "attention": Variant("stage 2", 3, lora=dict(targets=("q_proj", "k_proj", "v_proj"))),
        "feed-forward": Variant("stage 2", 3, lora=dict(targets=("ff_proj", "up_proj"))),
    }
    for rank in (2, 32):
        # a scale of 2, as for rank 8
        found[f"rank {rank}"] = Variant("stage 2", 3, lora=dict(rank=rank, alpha=2.0 * rank))
    for n, independent in ((1, False), (1, True), (4, True)):
        found[f"{n}, {'independent' if independent else 'shared'}"] = Variant(
            "stage 3", 4, dict(vrpo_samples=n), independent=independent)
    for n in (*scale.n_clips, None):
        found[f"diffusion, {n}"] = Variant(None, 2, n_clips=n, watched=True)
        found[f"causal, {n}"] = Variant(None, 2, n_clips=n, causal=True, watched=True)
    return found


def adapt(lab: "Lab", model: Diffa2Model, variant: Variant, stage: StageConfig,
          examples: list[Example], seed: int, reference: dict[str, Tensor], watch: Callable
          ) -> None:
    """Train the parts that the stage names, in place, as train.py does. `watch` is called with the
    number of each step."""
    trained = model.train_only(stage.trains)
    optimizer = adamw(trained, stage.lr, stage.betas, stage.weight_decay)
    set_dropout(model.llada, stage.lora_dropout)
    set_dropout(model.acoustic_connector, stage.adapter_dropout)
    lab.features.prepare([example.path for example in examples],
                         partial(progress, desc="encoding", leave=False))
    dataset, other = (BatchDataset(examples, s, stage, CONFIG, lab.tokenizer)
                      for s in (seed, seed + 1000))
    for step, pairs in batches(len(examples), stage.batch_size, stage.steps, 0, seed, stage.number):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage)
        batch = dataset[pairs].encoded(lab.features, CPU)
        if variant.causal:
            loss = autoregressive.answer_loss(model, batch, stage, lab.tokenizer)
        elif variant.independent:
            policy, old = bounds_apart(model, reference, batch, stage, lab.tokenizer,
                                       other[pairs].masked)
            loss = vrpo_loss(policy, old, stage.vrpo_beta)
        else:
            loss = piece_loss(model, reference, batch, stage, lab.tokenizer,
                              int(batch.valid.sum()))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), stage.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch(step + 1)


def made_of(data: Path, scale: Scale) -> str:
    """Tells apart what all figures depend on: settings, the shipped encoder and backbone, and the
    manifests of the world in `data`; SHA-256 in hexadecimal."""
    found = hashlib.sha256(repr((scale, CONFIG, STAGES, variants(scale))).encode())
    for part in ("whisper", "llada"):
        tensors = weights.read_part(weights.SHIPPED[part], part)
        found.update(fingerprint(tensors).encode())
    for name in sorted({stage.data for stage in STAGES.values()} | {"validation"}):
        found.update((data / f"{name}.json").read_bytes())
    return found.hexdigest()


class Lab:
    """What all cells share: the encoder's hidden states, the questions, and the variants made so
    far, in the folder `work`. Raises UserError if those were made of other things."""

    def __init__(self, data: Path, work: Path, scale: Scale):
        self.data, self.work, self.scale, self.variants = data, work, scale, variants(scale)
        self.made_of, note = made_of(data, scale), work / "made_of"
        found = note.read_text().strip() if note.exists() else None
        require(found == self.made_of or not found and not any(work.glob("*.safetensors")),
                f"{work}: holds models of another version, world or scale; choose another --work")
        write_whole(note, lambda temporary: temporary.write_text(self.made_of + "\n"))
        self.tokenizer = load_tokenizer(CONFIG)
        self.features = FeatureCache(weights.build(CONFIG), CPU, torch.float32, keep=True)
        self.questions = load_examples(data / "validation.json", STAGES[2],
                                       CONFIG)[::scale.every]
        self.features.prepare([example.path for example in self.questions], iter)
        self.loaded: dict[str, list[Example]] = {}  # manifests by name

    @cached_property
    def causal_backbone(self) -> Path:
        """The autoregressive backbone: as many steps as the shipped one had, of the same texts."""
        path = self.work / "autoregressive.safetensors"
        if not path.exists():
            torch.manual_seed(seed_of("weights", 1, 0))
            model = Diffa2Model(CONFIG, llada=FastLlada)
            pretrain_backbone(
                model, self.tokenizer, self.scale.pretrain, 1,
                paradigm=Paradigm(autoregressive.text_loss, autoregressive.recall_loss,
                                  autoregressive.generate_greedily))
            save_part(model.llada, "llada", path, "python tutorials/claims.py")
        return path

    def build(self, variant: Variant) -> Diffa2Model:
        """The model of a variant with new adapters."""
        config = dataclasses.replace(CONFIG, lora=dataclasses.replace(CONFIG.lora, **variant.lora))
        paths = weights.SHIPPED | ({"llada": self.causal_backbone} if variant.causal else {})
        return weights.build(config, paths).eval()

    def stage(self, variant: Variant) -> StageConfig:
        """The row of the table for a variant."""
        stage = STAGES[variant.number]
        changes = dict(steps=self.scale.steps[variant.number], batch_size=self.scale.batch_size or
                       stage.batch_size)
        stage = dataclasses.replace(stage, **changes | variant.changes)
        return dataclasses.replace(stage, warmup=min(stage.warmup, stage.steps // 2),
                                   micro_batch=stage.batch_size)

    def path(self, name: str, seed: int, suffix: str) -> Path:
        return self.work / f"{slug(name)}-{seed}.{suffix}"

    def restored(self, name: str, seed: int) -> Diffa2Model:
        """A variant that was kept, trained if need be."""
        self.figures(name, seed)
        model = self.build(self.variants[name])
        kept = load_checkpoint(self.path(name, seed, "safetensors"))
        weights.restore(model, kept.model, name)
        return model

    def examples(self, variant: Variant, stage: StageConfig, seed: int) -> list[Example]:
        """What a variant learns from."""
        if stage.data not in self.loaded:
            self.loaded[stage.data] = load_examples(self.data / f"{stage.data}.json", stage,
                                                    CONFIG)
        examples = self.loaded[stage.data]
        paths = sorted({example.path for example in examples})
        chosen = {paths[i] for i in stream("clips", seed).permutation(len(paths))[:variant.n_clips]}
        return [example for example in examples if example.path in chosen]

    def figures(self, name: str, seed: int) -> dict:
        """What was measured on a variant, which is trained if need be; what others start from is
        kept."""
        path = self.path(name, seed, "json")
        if not path.exists():
            variant = self.variants[name]
            stage = self.stage(variant)
            model, figures = self.train(variant, stage, seed)
            if name.startswith("stage"):
                kept = Checkpoint(model.config, variant.number, stage.steps, True,
                                  weights.trained_tensors(model), stage.audio)
                save_checkpoint(self.path(name, seed, "safetensors"), kept)
            write_json(path, figures)
        return json.loads(path.read_text())

    def train(self, variant: Variant, stage: StageConfig, seed: int) -> tuple[Diffa2Model, dict]:
        """Train a variant and measure it."""
        start = variant.start and self.restored(variant.start, seed)
        examples, on_the_way = self.examples(variant, stage, seed), []
        torch.manual_seed(seed_of("weights", seed, variant.number))  # new adapters, LoRA, dropout
        model = self.build(variant)
        if "lora" in stage.trains:
            model.add_lora()
        if start:
            weights.restore(model, weights.trained_tensors(start), variant.start)
        reference = {
            name: tensor.clone()
            for name, tensor in weights.trained_tensors(model).items()
        } if stage.preference else {}

        def watch(step: int) -> None:
            if variant.watched and step in {stage.steps * i // 4 for i in (1, 2, 3, 4)}:
                right = self.accuracy(model, variant, stage, self.questions[::4])["overall"]
                on_the_way.append([step * stage.batch_size / len(examples), right])

        began = time.perf_counter()
        adapt(self, model, variant, stage, examples, seed, reference, watch)
        seconds, sizes = time.perf_counter() - began, [p.numel() for p in model.parameters()]
        n_trained = sum(p.numel() for p in model.train_only(stage.trains).values())
        figures = self.accuracy(model, variant, stage, self.questions)
        figures |= {"train_seconds": seconds, "clips": len({example.path for example in examples}),
                    "passes_over_data": stage.steps * stage.batch_size / len(examples),
                    "trained": n_trained, "share_trained": n_trained / sum(sizes)}
        if stage.preference:
            same = dataclasses.replace(stage, vrpo_samples=4)  # however many it was trained with
            validator = Validator(model, self.tokenizer, self.features, seed)
            figures |= validator.rank_pairs(same, reference, self.questions)
            figures |= score_variance(validator, reference, same, self.questions)
        if variant.watched:
            alone = self.accuracy(model, variant, stage, self.questions[::8], batch_size=1)
            figures |= {
                "on_the_way": on_the_way, "forward_passes": alone["forward_passes"],
                "seconds": alone["seconds"]}
        return model, figures

    def accuracy(self, model: Diffa2Model, variant: Variant, stage: StageConfig,
                 questions: list[Example], batch_size: int = 64,
                 decode: DecodeConfig = CONFIG.decode) -> dict:
        """Share of right answers, by type too; and what an answer took, if they are given one at a
        time."""
        began = time.perf_counter()
        features = copy.copy(self.features)  # of the encoder, which all variants share
        features.model = model.eval()
        respondent = Respondent(features, self.tokenizer, stage.audio, decode,
                                generator_of(variant.causal))
        texts, n_steps = respondent.answer(questions, batch_size)
        seconds, result = time.perf_counter() - began, scoreboard.report(questions, texts)
        figures = dict(result.figures)
        if batch_size == 1:
            figures |= {"forward_passes": n_steps / len(texts), "seconds": seconds / len(texts)}
        types = {f"{domain}: {type}": value for (domain, type), value in result.accuracy.items()}
        return figures | {"types": types}

    def short_pairs(self, stage: StageConfig, seed: int) -> PreferenceBatch:
        """Some held-out pairs whose answers are both as short as answers can be."""
        pairs = [example for example in self.questions if example.rejected]
        dataset = BatchDataset(pairs, seed, stage, CONFIG, self.tokenizer)
        length = CONFIG.text.response_multiple
        short = [i for i in range(len(pairs))
                 if all(own == length for _, own in dataset.lengths(i))]
        chosen = short[::max(1, len(short) // self.scale.n_pairs)][:self.scale.n_pairs]
        return dataset[[Entry(0, i) for i in chosen]].encoded(self.features, CPU)

    def pool(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of the lower bounds of some pairs, by stage 4 and by stage 3: [B, 2, k, masks of
        k tokens] each. All draws that follow are from these: their mean is the bound itself."""
        path = self.path("pool", seed, "safetensors")
        if not path.exists():
            stage, length = self.stage(self.variants["stage 4"]), CONFIG.text.response_multiple
            batch = self.short_pairs(stage, seed)
            shape = (self.scale.n_masks, *batch.response.shape)
            orders = stream("score", seed).random(shape).argsort(-1).argsort(-1)
            # [2B, 1, R] each, with k masks
            masks = [torch.from_numpy(order < k)[:, None] for k in range(1, length + 1)
                     for order in orders]
            tensors = {}
            for name in ("stage 4", "stage 3"):
                model = self.restored(name, seed)
                predict = predictor(model, batch, stage)
                losses_of = token_losses(model.llada.logits)
                with torch.no_grad():
                    samples = [elbo(predict, batch.response, batch.valid, each,
                                    self.tokenizer.mask_id, losses_of).view(-1, 2)
                               for each in masks]
                tensors[name] = torch.stack(samples, dim=-1).unflatten(-1, (length, -1))
            save_tensors(path, tensors, {})
        tensors, _ = weights.read_tensors(path, "samples of lower bounds")
        return tensors["stage 4"].double().numpy(), tensors["stage 3"].double().numpy()
