"""What the experiments of claims.py share: how much is done, the variants that are trained, and the
lab that trains and keeps them."""

import copy
import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import toy, toy_text
from data.pretraining.backbone import Paradigm, pretrain_backbone
from data.pretraining.config import PretrainConfig
from data.pretraining.stage0 import save_part
from diffa2_mini import weights
from diffa2_mini.audio import duration
from diffa2_mini.command.script import progress
from diffa2_mini.config import (
    ACOUSTIC_AND_SEMANTIC,
    FULL_STAGES,
    SIZES,
    DecodeConfig,
    LoraConfig,
    StageConfig,
)
from diffa2_mini.data import (
    AnswerBatch,
    BatchDataset,
    Entry,
    Example,
    PreferenceBatch,
    load_examples,
    read_manifest,
)
from diffa2_mini.errors import require
from diffa2_mini.evaluate import scoreboard
from diffa2_mini.evaluate.answers import AT_ONCE, Respondent
from diffa2_mini.evaluate.validation import Validator
from diffa2_mini.fast.generate import generate_responses
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of, stream
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.tokenizer import Tokenizer
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
from diffa2_mini.vrpo import elbo, preference_margin, vrpo_loss
from tutorials import autoregressive, claims_targets
from tutorials.autoregressive import answer_tokens
from tutorials.claims_targets import count_targets, gradient_spread, training_loss
from tutorials.score_variance import bounds_apart, score_variance

TOY, STAGES = SIZES["toy"]
CONFIG = dataclasses.replace(TOY, lora=LoraConfig())  # rank 8, as in full
LONG = 32  # tokens of a response to `long_questions`: 16, and the EOS behind them
CPU = torch.device("cpu")
BACKBONE = "autoregressive.safetensors"  # in the folder of the variants
LOW = dict(masking="low-variance")  # whatever the toy's own is
# stage 4 of the claims is the paper's, whatever the toy's own is: its masks, and its beta
PAIRS = dict(masking="published", vrpo_beta=FULL_STAGES[4].vrpo_beta, micro_batch=2, lr=3e-4,
             warmup=5)
PASSES = ((1, 4, 16, 64), (1, 4, 16))  # over few and more clips, where these are used again


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
    """How much of everything."""

    # of each stage; of stage 4 with four samples, whose steps cost more than the toy's own
    steps: dict[int, int] = field(
        default_factory=lambda: {n: STAGES[n].steps for n in STAGES} | {4: 60})
    batch_size: int | None = None  # None: the toy's
    n_clips: tuple[int, int] = (250, 1000)  # distinct training clips, beside all of them
    every: int = 1  # one question out of so many is asked
    n_pairs: int = 32  # whose score is estimated, under
    n_masks: int = 8  # masks of each number of tokens, which stand for all masks there are
    n_texts: int = 960  # that a pretrained backbone is asked
    n_draws: int = 32  # steps of which the gradient's variance is computed
    n_timed: int = 24  # questions whose answers are timed, at most
    pair_steps: int = STAGES[4].steps  # of the toy's own stage 4, in the whole curriculum
    long_steps: int = 2400  # that teach answers of 16 tokens
    pretrain: PretrainConfig = PretrainConfig()


QUICK = Scale(
    steps={1: 2, 2: 2, 3: 2, 4: 2}, batch_size=2, n_clips=(2, 4), every=8, n_pairs=1, n_masks=2,
    n_texts=10, n_draws=2, n_timed=2, pair_steps=2, long_steps=2,
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
    adapter: dict = field(default_factory=dict)  # the same
    n_clips: int | None = None  # distinct training clips; None: all
    one_each: bool = False  # one question a clip, and not all
    independent: bool = False  # masks that policy and reference do not share
    causal: bool = False  # the autoregressive backbone and its loss
    long: bool = False  # trained on `long_questions` alone
    loss: str | None = None  # one of claims_targets.py, in place of the stage's
    watched: tuple[str, ...] = ()  # measured on the way: "accuracy", "gradient", "loss"


def variants(scale: Scale) -> dict[str, Variant]:
    """Every way to train, by name."""
    alone = dict(steps=scale.steps[1] + scale.steps[2])  # as many examples as stages 1 and 2
    found = {
        "stage 1": Variant(None, 1),
        "stage 2": Variant("stage 1", 2),
        "stage 3": Variant("stage 2", 3),
        "stage 4": Variant("stage 3", 4, dict(PAIRS, vrpo_samples=4)),
        "semantic": Variant("stage 1", 2, dict(trains=("semantic",), audio=("semantic",))),
        "acoustic": Variant("stage 1", 2, dict(trains=("acoustic",), audio=("acoustic",))),
        "2": Variant(None, 2, alone),
        "1, 2, 2": Variant("stage 2", 3, dict(trains=ACOUSTIC_AND_SEMANTIC)),
        "1, 2, 3, 3": Variant("stage 3", 3, dict(  # 5: noise of its own
            number=5, steps=scale.steps[4], batch_size=scale.batch_size or STAGES[4].batch_size,
            lr=PAIRS["lr"], warmup=PAIRS["warmup"])),
        "attention": Variant("stage 2", 3, lora=dict(targets=("q_proj", "k_proj", "v_proj"))),
        "feed-forward": Variant("stage 2", 3, lora=dict(targets=("ff_proj", "up_proj"))),
    }
    for rank in (2, 32):
        # a scale of 2, as for rank 8
        found[f"rank {rank}"] = Variant("stage 2", 3, lora=dict(rank=rank, alpha=2.0 * rank))
    for n, independent in ((1, False), (1, True), (4, True)):  # as many samples in all
        found[f"{n}, {'independent' if independent else 'shared'}"] = Variant(
            "stage 3", 4, dict(PAIRS, vrpo_samples=n, steps=4 // n * scale.steps[4]),
            independent=independent)
    for n in (*scale.n_clips, None):
        found[f"diffusion, {n}"] = Variant(None, 2, n_clips=n, watched=("accuracy",))
        found[f"causal, {n}"] = Variant(None, 2, n_clips=n, causal=True, watched=("accuracy",))
    return found | learning() | whole(scale) | repeated(scale) | {
        "no prompts": Variant(None, 1, LOW | dict(trains=("semantic",), audio=("semantic",))),
        "no prompts, 2": Variant("no prompts", 2, LOW),
        "1 query": Variant(None, 2, LOW, adapter=dict(n_queries=1)),
        "12 queries": Variant(None, 2, LOW, adapter=dict(n_queries=12))}


def learning() -> dict[str, Variant]:
    """What may explain how fast stage 2 alone learns."""
    watched = ("accuracy", "gradient")
    return {
        "published": Variant(None, 2, dict(masking="published"), watched=watched),
        "low variance": Variant(None, 2, LOW, watched=watched),
        "half masked": Variant(None, 2, dict(masking="half-masked"), watched=watched),
        "all masked": Variant(None, 2, dict(masking="all-masked"), watched=watched),
        "light EOS": Variant(None, 2, LOW, loss=claims_targets.LIGHT_EOS, watched=watched),
        "twin": Variant(None, 2, LOW, causal=True, watched=watched),
        "twin, few targets": Variant(None, 2, LOW, causal=True, loss=claims_targets.FEW_TARGETS,
                                     watched=watched)}


def whole(scale: Scale) -> dict[str, Variant]:
    """The curriculum of both models, stage 4 as the toy's own; and what comes of its stage 3 where
    it goes on with long answers."""
    found = {}
    for kind, causal in (("low", False), ("causal", True)):
        for n, changes in enumerate((LOW, LOW, LOW, dict(steps=scale.pair_steps)), start=1):
            start = f"{kind} stage {n - 1}" if n > 1 else None
            found[f"{kind} stage {n}"] = Variant(start, n, changes, causal=causal)
        found[f"{kind} long"] = Variant(  # 5: noise of its own
            f"{kind} stage 3", 3, LOW | dict(number=5, steps=scale.long_steps), causal=causal,
            long=True)
    return found


def repeated(scale: Scale) -> dict[str, Variant]:
    """Stage 2 alone, on few clips with one question each, that are used again."""
    batch_size = scale.batch_size or STAGES[2].batch_size
    return {
        f"{'causal' if causal else 'diffusion'}, {n} x {passes}": Variant(
            None, 2, LOW | dict(steps=math.ceil(passes * n / batch_size)), n_clips=n,
            one_each=True, causal=causal, watched=("loss",))
        for n, some in zip(scale.n_clips, PASSES) for passes in some for causal in (False, True)}


def chain(found: dict[str, Variant], name: str | None) -> list[str]:
    """A variant and all that it starts from, the first training last."""
    return [name, *chain(found, found[name].start)] if name else []


def stage_of(variant: Variant, scale: Scale) -> StageConfig:
    """The row of the table for a variant."""
    stage = STAGES[variant.number]
    changes = dict(steps=scale.steps[variant.number], batch_size=scale.batch_size or
                   stage.batch_size)
    stage = dataclasses.replace(stage, **changes | variant.changes)
    return dataclasses.replace(stage, warmup=min(stage.warmup, stage.steps // 2),
                               micro_batch=stage.batch_size)


@dataclass(frozen=True)
class Training:
    """What is trained, and on what."""

    model: Diffa2Model
    variant: Variant
    stage: StageConfig
    examples: list[Example]
    seed: int
    reference: dict[str, Tensor]  # of a preference stage
    start: Diffa2Model | None = None  # what it starts from, which stays as it is


def adapt(lab: "Lab", training: Training, watch: Callable[[int], None]) -> None:
    """Train the parts that the stage names, in place, as train.py does. `watch` is called with the
    number of steps that are done, from 0 on."""
    model, variant, stage = training.model, training.variant, training.stage
    examples, seed = training.examples, training.seed
    trained = model.train_only(stage.trains)
    optimizer = adamw(trained, stage.lr, stage.betas, stage.weight_decay)
    set_dropout(model.llada, stage.lora_dropout)
    set_dropout(model.acoustic_connector, stage.adapter_dropout)
    lab.features.prepare([example.path for example in examples],
                         partial(progress, desc="encoding", leave=False))
    dataset, other = (BatchDataset(examples, s, stage, model.config, lab.tokenizer)
                      for s in (seed, seed + 1000))
    for step, pairs in batches(len(examples), stage.batch_size, stage.steps, 0, seed, stage.number):
        watch(step)
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage.steps, stage)
        batch = dataset[pairs].encoded(lab.features, lab.device)
        if not stage.preference:
            loss = lab.loss(model, variant, stage, batch)
        elif variant.causal:
            policy, old = twin_bounds(training, batch, lab.tokenizer)
            loss = vrpo_loss(policy, old, stage.vrpo_beta)
        elif variant.independent:
            policy, old = bounds_apart(model, training.reference, batch, stage, lab.tokenizer,
                                       other[pairs].masked.to(lab.device))
            loss = vrpo_loss(policy, old, stage.vrpo_beta)
        else:
            loss = piece_loss(model, training.reference, batch, stage, lab.tokenizer,
                              int(batch.valid.sum()))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), stage.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    watch(stage.steps)


def twin_bounds(training: Training, batch: PreferenceBatch, tokenizer: Tokenizer
                ) -> tuple[Tensor, Tensor]:
    """log p [B, 2] of pairs by the autoregressive twin, and as it was before stage 4."""
    policy = autoregressive.log_probabilities(training.model, batch, training.stage, tokenizer)
    with torch.no_grad():
        old = autoregressive.log_probabilities(training.start, batch, training.stage, tokenizer)
    return policy, old


def long_questions(data: Path, split: str) -> list[Example]:
    """For each clip of speech in the toy world `data` a question that asks for all there is. The
    answer has 16 tokens, the last one included, if there are four digits. Raises UserError if the
    clips are not those that `toy.make_world` makes."""
    said = {row["audio_filepath"]: row["transcription"]
            for name in ("sft", "validation") for row in read_manifest(data / f"{name}.json")
            if row["domain"] == "speech"}
    found = []
    for i, (scene, _) in enumerate(toy.random_scenes(split, seed=0)):
        name, items = toy.clip_name(split, i), scene.items
        if name in said:
            require(said[name] == " ".join(items),
                    f"{data}: expected the toy world as `python data/toy.py` makes it, got another "
                    f"{name}; make it anew, or choose another --data")
            found.append(Example(
                data / name, "Describe the audio. Count the digits. Which come first and last?",
                f"{toy_text.caption(scene)} {len(items)} digits first {items[0]} last {items[-1]}",
                rejected="", type="long", domain="speech", seconds=duration(data / name)))
    return found


def made_of(settings: object, parts: dict[str, Path], manifests: list[Path]) -> str:
    """Tells apart what figures depend on: settings, the encoder's and the backbone's files, and
    the manifests; SHA-256 in hexadecimal."""
    found = hashlib.sha256(repr(settings).encode())
    for part, path in parts.items():
        found.update(fingerprint(weights.read_part(path, part)).encode())
    for path in manifests:
        found.update(path.read_bytes())
    return found.hexdigest()


def pretrain_autoregressive(path: Path, config: PretrainConfig, device: torch.device) -> None:
    """Make the autoregressive backbone: as many steps as the shipped one had, of the same texts."""
    torch.manual_seed(seed_of("weights", 1, 0))
    model = Diffa2Model(CONFIG, llada=FastLlada).to(device)
    pretrain_backbone(model, config, 1, paradigm=Paradigm(
        autoregressive.text_loss, autoregressive.recall_loss, autoregressive.generate_greedily))
    save_part(model.llada, "llada", path, "python tutorials/claims.py --backbone")


class Lab:
    """What all cells share: the encoder's hidden states, the questions, and the variants made so
    far, in the folder `work`. Raises UserError if those were made of other things."""

    def __init__(self, data: Path, work: Path, scale: Scale, device: torch.device = CPU):
        self.data, self.work, self.scale, self.variants = data, work, scale, variants(scale)
        self.device, self.backbone = device, work / BACKBONE
        names = sorted({stage.data for stage in STAGES.values()} | {"validation"})
        self.made_of, note = made_of((scale, CONFIG, STAGES, variants(scale)), {
            part: weights.SHIPPED[part] for part in ("whisper", "llada")
        }, [data / f"{name}.json" for name in names]), work / "made_of"
        found = note.read_text().strip() if note.exists() else None
        require(found == self.made_of or not found and not any(work.glob("*-*.safetensors")),
                f"{work}: holds models of another version, world or scale; choose another --work")
        write_whole(note, lambda temporary: temporary.write_text(self.made_of + "\n"))
        self.tokenizer = load_tokenizer(CONFIG)
        self.features = FeatureCache(weights.build(CONFIG, device=device), device, torch.float32,
                                     keep=True)
        self.questions = load_examples(data / "validation.json", STAGES[2],
                                       CONFIG)[::scale.every]
        self.features.prepare([example.path for example in self.questions], iter)
        self.loaded: dict[str, list[Example]] = {}  # manifests by name

    def build(self, variant: Variant) -> Diffa2Model:
        """The model of a variant with new adapters."""
        config = dataclasses.replace(
            CONFIG, lora=dataclasses.replace(CONFIG.lora, **variant.lora),
            adapter=dataclasses.replace(CONFIG.adapter, **variant.adapter))
        if variant.long:
            config = dataclasses.replace(
                config, text=dataclasses.replace(CONFIG.text, response_multiple=LONG),
                decode=dataclasses.replace(CONFIG.decode, gen_length=LONG, block_length=LONG,
                                           steps=LONG))
        if variant.causal and not self.backbone.exists():
            pretrain_autoregressive(self.backbone, self.scale.pretrain, self.device)
        paths = weights.SHIPPED | ({"llada": self.backbone} if variant.causal else {})
        return weights.build(config, paths, self.device, llada=FastLlada).eval()

    def path(self, name: str, seed: int, suffix: str) -> Path:
        return self.work / f"{slug(name)}-{seed}.{suffix}"

    def restored(self, name: str, seed: int) -> Diffa2Model:
        """A variant that was kept, trained if need be."""
        self.figures(name, seed)
        model = self.build(self.variants[name])
        kept = load_checkpoint(self.path(name, seed, "safetensors"))
        weights.restore(model, kept.model, name)
        return model.eval()

    def asked(self, variant: Variant) -> list[Example]:
        """What a variant is asked."""
        return long_questions(self.data, "evaluation") if variant.long else self.questions

    def examples(self, variant: Variant, stage: StageConfig, seed: int) -> list[Example]:
        """What a variant learns from."""
        if variant.long:
            return long_questions(self.data, "train")
        if stage.data not in self.loaded:
            self.loaded[stage.data] = load_examples(self.data / f"{stage.data}.json", stage,
                                                    CONFIG)
        examples = self.loaded[stage.data]
        paths, rng = sorted({example.path for example in examples}), stream("clips", seed)
        chosen = {paths[i] for i in rng.permutation(len(paths))[:variant.n_clips]}
        examples = [example for example in examples if example.path in chosen]
        if variant.one_each:
            mixed = [examples[i] for i in rng.permutation(len(examples))]
            examples = [*{example.path: example for example in mixed}.values()]
        return examples

    def loss(self, model: Diffa2Model, variant: Variant, stage: StageConfig, batch: AnswerBatch
             ) -> Tensor:
        """Of a batch, in stages 1 to 3."""
        return training_loss(model, batch, stage, self.tokenizer, variant.causal, variant.loss)

    def figures(self, name: str, seed: int) -> dict:
        """What was measured on a variant, which is trained if need be; what others start from is
        kept."""
        path = self.path(name, seed, "json")
        if not path.exists():
            variant = self.variants[name]
            stage = stage_of(variant, self.scale)
            model, figures = self.train(variant, stage, seed)
            starts = {variant.start for variant in self.variants.values()}
            if name in starts | {"stage 4", "low long", "causal long"}:
                kept = Checkpoint(model.config, variant.number, stage.steps, True,
                                  weights.trained_tensors(model), stage.audio)
                save_checkpoint(self.path(name, seed, "safetensors"), kept)
            write_json(path, figures)
        return json.loads(path.read_text())

    def train(self, variant: Variant, stage: StageConfig, seed: int) -> tuple[Diffa2Model, dict]:
        """Train a variant and measure it."""
        start = variant.start and self.restored(variant.start, seed)
        examples = self.examples(variant, stage, seed)
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
        found, began = {}, time.perf_counter()
        training = Training(model, variant, stage, examples, seed, reference, start)
        adapt(self, training, partial(self.watch, found, training))
        seconds, sizes = time.perf_counter() - began, [p.numel() for p in model.parameters()]
        n_trained = sum(p.numel() for p in model.train_only(stage.trains).values())
        figures = self.accuracy(model, variant, stage, self.asked(variant)) | found
        figures |= {"train_seconds": seconds, "clips": len({example.path for example in examples}),
                    "passes_over_data": stage.steps * stage.batch_size / len(examples),
                    "trained": n_trained, "share_trained": n_trained / sum(sizes)}
        if stage.preference and variant.causal:
            figures |= self.rank_pairs(training)
        elif stage.preference:
            same = dataclasses.replace(stage, vrpo_samples=4)  # however many it was trained with
            validator = Validator(model, self.tokenizer, self.features, seed)
            figures |= validator.rank_pairs(same, reference, self.questions)
            figures |= score_variance(validator, reference, same, self.questions)
        if "accuracy" in variant.watched:
            alone = self.accuracy(model, variant, stage, self.questions[::8], at_once=1)
            figures |= {name: alone[name] for name in ("forward_passes", "seconds")}
        return model, figures

    @torch.no_grad()
    def rank_pairs(self, training: Training) -> dict[str, float]:
        """`Validator.rank_pairs` for the autoregressive twin."""
        pairs = [example for example in self.questions if example.rejected][::12]
        validator = Validator(training.model.eval(), self.tokenizer, self.features, training.seed)
        margins = torch.cat([
            preference_margin(*twin_bounds(training, batch, self.tokenizer))
            for batch in validator.pair_batches(training.stage, pairs)])
        return {"reward_accuracy": float((margins > 0).float().mean()),
                "margin": float(margins.mean())}

    def watch(self, found: dict, training: Training, step: int) -> None:
        """Add to `found` what is watched of a variant, after some of its steps."""
        model, variant, stage = training.model, training.variant, training.stage
        examples = training.examples
        passes = step * stage.batch_size / len(examples)
        if "accuracy" in variant.watched and step in {stage.steps * i // 4 for i in range(1, 5)}:
            right = self.accuracy(model, variant, stage, self.questions[::4])["overall"]
            found.setdefault("on_the_way", []).append([passes, right])
        if "loss" in variant.watched and step in {stage.steps >> i for i in range(6)} - {0}:
            found.setdefault("curve", []).append({"passes": passes} | {
                f"{figure}_{name}": value
                for name, some in (("trained_on", examples), ("held_out", self.questions[::4]))
                for figure, value in self.measured(model, variant, stage, some[:240]).items()})
        if "gradient" in variant.watched and step in (0, stage.steps):
            spread, counts = self.gradient(training)
            when = "end" if step else "start"
            found |= counts | {f"{name}_{when}": value for name, value in spread.items()}

    def measured(self, model: Diffa2Model, variant: Variant, stage: StageConfig,
                 examples: list[Example]) -> dict[str, float]:
        """Accuracy; and -log p of an answer in nats, with the same noise each time: exact for the
        autoregressive twin, a bound for diffusion."""
        some = examples[::max(1, len(examples) // 64)][:64]
        n = 1 if variant.causal else 4  # draws of the noise
        stage = dataclasses.replace(stage, masking="low-variance", batch_size=n * len(some))
        dataset = BatchDataset(some, 0, stage, CONFIG, self.tokenizer, noise="held-out answers")
        places = stream("held-out answers", 0).permutation(stage.batch_size)
        batch = dataset[[Entry(*divmod(i, len(some)), int(place))
                         for i, place in enumerate(places)]].encoded(self.features, self.device)
        with torch.no_grad():
            loss = float(self.loss(model.eval(), variant, stage, batch))
        answers = answer_tokens(batch.response, self.tokenizer) if variant.causal else batch.valid
        return {"accuracy": self.accuracy(model, variant, stage, examples)["overall"],
                "nats": loss * int(answers.sum()) / len(batch.response)}

    def gradient(self, training: Training) -> tuple[dict[str, float], dict[str, float]]:
        """Variance of a step's gradient, over steps and over the noise of one step, and the squared
        norm of its mean divided by the former, the signal-to-noise ratio. And targets a step."""
        model, variant, stage = training.model, training.variant, training.stage
        examples, seed = training.examples, training.seed
        n, B = self.scale.n_draws, stage.batch_size
        dataset = BatchDataset(examples, seed + 1000, stage, CONFIG, self.tokenizer)
        steps = [entries for _, entries in batches(len(examples), B, n, 0, seed + 1000,
                                                   stage.number)]
        again = [[Entry(1 + draw, entry.number, int(place)) for entry, place in
                  zip(steps[0], stream("order", seed, "draw", draw).permutation(B))]
                 for draw in range(n)]
        trained = [*model.eval().train_only(stage.trains).values()]
        counts = []

        def losses(all_entries: list[list[Entry]]) -> Iterator[Tensor]:
            for entries in all_entries:
                batch = dataset[entries].encoded(self.features, self.device)
                counts.append(count_targets(batch, self.tokenizer, variant.causal, variant.loss))
                yield self.loss(model, variant, stage, batch)

        variance, square_of_mean = gradient_spread(losses(steps), trained)
        means = {name: float(np.mean([each[name] for each in counts])) for name in counts[0]}
        of_noise, _ = gradient_spread(losses(again), trained)
        return {"variance": variance, "variance_of_noise": of_noise,
                "signal_to_noise": square_of_mean / variance}, means

    def accuracy(self, model: Diffa2Model, variant: Variant, stage: StageConfig,
                 questions: list[Example], at_once: int | None = None,
                 decode: DecodeConfig | None = None) -> dict:
        """Share of right answers, by type too; and, if so many answers are given `at_once`, how
        many forward passes that took, and how many seconds each answer. `decode`: not the
        model's."""
        began = time.perf_counter()
        features = copy.copy(self.features)  # of the encoder, which all variants share
        features.model = model.eval()
        respondent = Respondent(features, self.tokenizer, stage.audio,
                                decode or model.config.decode, generator_of(variant.causal))
        texts, n_steps = respondent.answer(questions, at_once or AT_ONCE)
        seconds, result = time.perf_counter() - began, scoreboard.report(questions, texts)
        figures = dict(result.figures)
        if at_once:
            figures |= {"forward_passes": n_steps / math.ceil(len(texts) / at_once),
                        "seconds": seconds / len(texts)}
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
        return dataset[[Entry(0, i) for i in chosen]].encoded(self.features, self.device)

    def pool(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of the lower bounds of some pairs, by stage 4 and by stage 3: [B, 2, k, masks of
        k tokens] each. All draws that follow are from these: their mean is the bound itself."""
        path = self.path("pool", seed, "safetensors")
        if not path.exists():
            stage = stage_of(self.variants["stage 4"], self.scale)
            length = CONFIG.text.response_multiple
            batch = self.short_pairs(stage, seed)
            shape = (self.scale.n_masks, *batch.response.shape)
            orders = stream("score", seed).random(shape).argsort(-1).argsort(-1)
            # [2B, 1, R] each, with k masks
            masks = [torch.from_numpy(order < k)[:, None].to(self.device)
                     for k in range(1, length + 1) for order in orders]
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
