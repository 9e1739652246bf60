"""Stage 0: pretrained parts for the sizes that are trained from scratch, in the place of
Whisper-large-v3 and LLaDA-8B.

Not part of DIFFA-2. The encoder has a file of its own, `pretrain_encoder.py`. The backbone learns
here, by masked diffusion on text alone: a description of a clip stands where the audio will be, and
the answer is to be found in it.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from .. import weights
from ..command.script import progress
from ..config import SIZES, LladaConfig, PretrainConfig, TextConfig
from ..errors import require
from ..evaluate.answers import fill_in
from ..evaluate.scoring import same
from ..fast.device import choose_device
from ..fast.llada import FastLlada
from ..llada import Block, Llada, rotary
from ..model import Diffa2Model
from ..noise import seed_of, stream
from ..tokenizer import Prompt, Tokenizer
from ..training.objective import adamw
from ..training.processes import World
from .encoder import LabelledClips, learning_rate, pretrain_encoder, update

LETTERS = ("A.", "B.", "C.", "D.")  # of lettered choices
N_EVALUATION = 1500  # held-out texts, for the last look; before that a fifth of them


@dataclass(frozen=True)
class TextExample:
    """A question about a clip that exists as text alone: `traits` and the items with their ordinals
    describe it."""

    traits: list[str]
    items: list[tuple[str, str]]
    type: str
    instruction: str
    answer: str

    def words(self) -> list[str]:
        """The description as a sentence: `speech high voice first three second one`."""
        return [*self.traits, *(word for pair in self.items for word in pair)]


@torch.no_grad()
def init_backbone(model: Llada, generator: torch.Generator) -> None:
    """Embeddings of standard deviation 1 around a direction that all share, weights of 1 /
    sqrt(inputs), less where a block adds to the residual stream. Two heads of the first block start
    by looking at the neighbours."""
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
        look_beside(model.blocks[0], config, head, offset, shared / shared.norm())


def look_beside(block: Block, config: LladaConfig, head: int, offset: int, shared: Tensor,
                sharpness: float = 0.8) -> None:
    """Let a head attend to the token at `offset`: its queries and keys read only the direction that
    all embeddings share, and the queries start turned by `offset`, so that the score is the sum
    over rotary frequencies f of cos(f (distance - offset)). What tells a word's neighbour is what
    copying and choosing are built on."""
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


def embed(model: Diffa2Model, tokenizer: Tokenizer, words: list[str]) -> Tensor:
    """Embeddings [A, D] of words in a row; the sentence that stands in the audio's place."""
    ids = [token for word in words for token in tokenizer.encode(f" {word}")]
    return model.llada.wte(torch.tensor(ids, device=model.llada.wte.weight.device))


def frames(model: Diffa2Model, tokenizer: Tokenizer, example: TextExample, silences: int,
           rng: np.random.Generator) -> Tensor:
    """Embeddings [A, D] as an adapter may give them: each trait, and each item summed with its
    ordinal, one to five times in a row, and then up to `silences` times the mean of all embeddings,
    which is no word."""
    pieces = embed(model, tokenizer, example.traits)
    if example.items:
        ordinals, items = zip(*example.items)
        pieces = torch.cat(
            [pieces, embed(model, tokenizer, items) + embed(model, tokenizer, ordinals)])
    silence = model.llada.wte.weight.detach().mean(0)
    return torch.cat([
        x for piece in pieces for x in (piece.expand(rng.integers(1, 6), -1),
                                        silence.expand(rng.integers(0, silences + 1), -1))])


def responses(tokenizer: Tokenizer, examples: list, multiple: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, R] of the answers, and which of them are not padding."""
    rows = [torch.tensor(tokenizer.response(example.answer, multiple)) for example in examples]
    return (pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_id),
            pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows],
                         batch_first=True))


def read_texts(
        model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample], system: str,
        silences: int, config: PretrainConfig,
        rng: np.random.Generator) -> tuple[list[Tensor], list[Prompt], Tensor, Tensor, Tensor]:
    """What is learned from a batch: embeddings [A, D] in the audio's place, prompts, responses [B,
    R], which of their tokens are real [B, R], and how much each counts [B, R]: an EOS after the
    first less, the letter of a choice more."""
    prompts = [tokenizer.prompt(system, example.instruction) for example in examples]
    audio_embeddings = [frames(model, tokenizer, example, silences, rng) if rng.random() < 0.5 else
             embed(model, tokenizer, example.words()) for example in examples]
    audio_embeddings = [
        x + config.noise * torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)).to(x)
        for x in audio_embeddings]
    response, valid = (x.to(audio_embeddings[0].device)
                       for x in responses(tokenizer, examples, model.config.text.response_multiple))
    late = (response == tokenizer.eos_id).long().cumsum(1) > 1
    letter = torch.isin(
        response,
        torch.tensor([tokenizer.encode(letter)[0] for letter in LETTERS], device=response.device))
    return audio_embeddings, prompts, response, valid, torch.where(
        late, config.eos_weight, torch.where(letter, config.letter_weight, 1.0))


def backbone_loss(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample],
                  system: str, silences: int, config: PretrainConfig,
                  rng: np.random.Generator) -> Tensor:
    """Mean cross-entropy of the masked tokens of a batch, without the weight 1/t."""
    audio_embeddings, prompts, response, valid, weight = read_texts(model, tokenizer, examples,
                                                                    system, silences, config, rng)
    t = torch.from_numpy(rng.uniform(config.shortest_time, 1, size=(len(examples), 1)))
    masked = (torch.from_numpy(rng.random(response.shape)) < t).to(valid.device) & valid
    hidden = model.hidden_states(audio_embeddings, prompts,
                                 response.masked_fill(masked, tokenizer.mask_id), valid)[masked]
    losses = F.cross_entropy(model.llada.logits(hidden), response[masked], reduction="none")  # [K]
    return (losses * weight[masked]).sum() / weight[masked].sum()


def draw_recall(words: Tensor, config: PretrainConfig,
                generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of words [B, n, 2], the same pairs in another order [B, n, 2], and which word of these
    to recall [B, n]."""
    B, n = config.backbone_batch, config.recall_pairs

    def shuffled(k):
        return torch.rand(B, k, generator=generator).argsort(1).to(words.device)

    pairs = words[shuffled(len(words))[:, :2 * n]].view(B, n, 2)
    asked = pairs.gather(1, shuffled(n)[:, :, None].expand(-1, -1, 2))
    return pairs, asked, torch.randint(0, 2, (B, n), generator=generator).to(words.device)


def recall_loss(model: Llada, words: Tensor, separator: int, mask_id: int, config: PretrainConfig,
                generator: torch.Generator) -> Tensor:
    """An exercise in recall (as in arXiv 2312.04927): pairs of words, then the same pairs in
    another order with one word of each hidden. To find the letter of a choice is the same, and
    learned from texts alone it takes many times longer."""
    pairs, asked, which = draw_recall(words, config, generator)
    hidden = F.one_hot(which, 2).bool()  # of each pair
    both = torch.cat([pairs, asked.masked_fill(hidden, mask_id)], dim=1)  # [B, 2n, 2]
    tokens = F.pad(both, (0, 1), value=separator).flatten(1)  # [B, 6n]: word, word, separator, ...
    mask_positions = F.pad(torch.cat([torch.zeros_like(hidden), hidden], dim=1), (0, 1)).flatten(1)
    return F.cross_entropy(model.logits(model(model.wte(tokens))[mask_positions]), asked[hidden])


@dataclass(frozen=True)
class Method:
    """How a backbone learns and answers. Masked diffusion by default; autoregressive.py has
    another."""

    loss: Callable = backbone_loss
    recall: Callable = recall_loss
    write: Callable = fill_in


@torch.no_grad()
def gate(model: Diffa2Model, tokenizer: Tokenizer, examples: list[TextExample],
         silences: int | None = None, write: Callable = fill_in) -> dict[str, float]:
    """Share of right answers, decoded with the defaults, by type of question on text alone; with
    `silences`, on frames."""
    right, rng = {}, np.random.default_rng(0)
    for start in range(0, len(examples), 100):
        batch = examples[start:start + 100]
        audio_embeddings = [embed(model, tokenizer, example.words()) if silences is None else
                 frames(model, tokenizer, example, silences, rng) for example in batch]
        prompts = [
            tokenizer.prompt(model.config.text.system, example.instruction) for example in batch]
        tokens, _ = write(model, tokenizer, audio_embeddings, prompts, model.config.decode)
        for example, row in zip(batch, tokens.tolist()):
            hits = right.setdefault(example.type, [])
            hits.append(same(tokenizer.decode(row), example.answer))
    return {type: float(np.mean(hits)) for type, hits in sorted(right.items())}


def summarize(accuracy: dict[str, float]) -> tuple[float, float]:
    """Mean over the open types, mean over the lettered types; not a number where there are none."""
    lettered = [a for type, a in accuracy.items() if type.endswith("+abcd")]
    plain = [a for type, a in accuracy.items() if not type.endswith("+abcd")]
    return tuple(sum(some) / len(some) if some else math.nan for some in (plain, lettered))


def pretrain_backbone(model: Diffa2Model, tokenizer: Tokenizer, sample: Callable,
                      config: PretrainConfig, seed: int, first_step: int, progress: Callable,
                      method: Method = Method(), n_evaluation: int | None = None):
    """Train the backbone in place, from its start or on from `first_step`. `sample(rng,
    evaluation)` gives a TextExample. Yields (step, loss, accuracy by type on held-out sentences and
    on held-out frames) now and then; of the held-out texts no more are asked than it learns
    from."""
    text: TextConfig = model.config.text
    device = model.llada.wte.weight.device
    rng, held_out = stream("texts", seed), stream("held-out texts", seed)
    evaluation = [sample(held_out, True) for _ in range(n_evaluation or N_EVALUATION)]
    if first_step == 0:
        init_backbone(model.llada.cpu(),
                      torch.Generator().manual_seed(seed_of("backbone", seed, "weights")))
        model.llada.to(device)
    parameters = dict(model.llada.requires_grad_(True).named_parameters())
    optimizer = adamw(parameters, config.backbone_lr, (0.9, 0.98), weight_decay=0.01)
    parameters = list(parameters.values())
    mean = math.log(config.recall_pairs)
    generator = torch.Generator().manual_seed(seed_of("backbone", seed, "recall"))
    words = {
        token
        for example in evaluation
        for word in example.words()
        for token in tokenizer.encode(f" {word}")}
    words = torch.tensor(sorted(words | {tokenizer.encode(letter)[0]
                                         for letter in LETTERS}), device=device)
    separator = tokenizer.encode("\n")[0]
    for step in progress(range(0 if first_step else config.recall_steps), desc="recall"):
        loss = method.recall(model.llada, words, separator, tokenizer.mask_id, config, generator)
        update(optimizer, parameters, loss,
               config.backbone_lr * min(1, (step + 1) / max(1, config.warmup)))
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 500 == 499 or mean < config.recall_loss:
            tqdm.write(
                f"recall step {step + 1}: loss {mean:.3f}, where guessing gives {math.log(config.recall_pairs):.3f}"
            )
        if mean < config.recall_loss:
            break
    mean, recall = 0.0, mean
    n_steps = config.backbone_steps + config.silence_steps
    n_asked = min(len(evaluation), config.backbone_steps * config.backbone_batch)
    for step in progress(range(first_step, n_steps), desc="backbone"):
        # short ones are faster
        system = str(rng.choice(["", text.system, text.train_system], p=[0.5, 0.3, 0.2]))
        examples = [sample(rng, False) for _ in range(config.backbone_batch)]
        if step < config.backbone_steps:
            silences, lr = 0, config.backbone_lr * learning_rate(step, config.backbone_steps,
                                                                 config.warmup)
        else:
            silences = config.silences
            lr = config.silence_lr * learning_rate(step - config.backbone_steps,
                                                   config.silence_steps, config.warmup)
        loss = method.loss(model, tokenizer, examples, system, silences, config, rng)
        exercise = method.recall(model.llada, words, separator, tokenizer.mask_id, config,
                                 generator)
        recall = 0.98 * recall + 0.02 * exercise.item()
        update(optimizer, parameters, loss + exercise, lr)
        mean = 0.98 * mean + 0.02 * loss.item()
        last = step + 1 == n_steps
        if step % 500 == 499 or last:
            tqdm.write(f"recall {recall:.3f}")
            asked = evaluation[:n_asked] if last else evaluation[:max(1, n_asked // 5)]
            yield step + 1, mean, {
                "sentences": gate(model, tokenizer, asked, None, method.write), "frames": gate(
                    model, tokenizer, asked, config.silences, method.write)}
    model.llada.requires_grad_(False)


# -------------------------------------------------------------------------------------- the command


def run(args, world: World, make_clips: Callable[[], Path], text_example: Callable) -> None:
    """`train.py --stage 0`: pretrain the parts that `args.parts` names and write them to
    `args.out`. With `args.data`, a folder with a stage0.json, the encoder alone. The parts do not
    need each other: of several processes the first makes the encoder and the second the
    backbone. Without `args.data`, `make_clips()` makes its folder; `text_example` is that of
    `pretrain_backbone`."""
    config = SIZES[args.size][0]
    require(config.from_scratch,
            f"--stage 0 makes parts of --size toy or small; for {args.size} they are published")
    require(args.data is None or args.parts != "llada",
            "--parts llada learns from texts; leave out --data")
    device, _, why = choose_device(args.device, "float32")
    device = world.device(device)
    print(why)
    say = tqdm.write if world.is_main else partial(tqdm.write, file=sys.stderr)
    whisper = args.whisper and weights.locate(args.whisper, "whisper", args.size)
    llada = args.llada and weights.locate(args.llada, "llada", args.size)
    if args.threads:
        torch.set_num_threads(args.threads)
    changes = {
        name: args.steps
        for name in ("encoder_steps", "recall_steps", "backbone_steps", "silence_steps")}
    changes |= {name: args.batch_size for name in ("encoder_batch", "backbone_batch")}
    changes |= {name: args.lr
                for name in ("encoder_lr", "backbone_lr", "silence_lr")} | {"warmup": args.warmup}
    pre = PretrainConfig(**{name: value for name, value in changes.items() if value is not None})
    made_by = f"python train.py --stage 0 --size {args.size} --seed {args.seed}"
    torch.manual_seed(seed_of("weights", args.seed, 0))
    model, tokenizer = Diffa2Model(config, llada=FastLlada), weights.load_tokenizer(config)
    model.to(device)
    if args.parts != "llada" and world.is_main:
        folder = args.data or make_clips()
        if whisper:
            weights.load_part(model.whisper, "whisper", whisper, device)
        clips = LabelledClips.load(folder / "stage0.json", config.audio,
                                   partial(progress, desc="reading clips"),
                                   most=pre.encoder_steps * pre.encoder_batch)
        steps = pretrain_encoder(model.whisper, clips, pre, args.seed,
                                 partial(progress, desc="encoder"))
        for step, loss, right in steps:
            say(f"encoder step {step}: loss {loss:.3f}, frames right {right:.3f}")
        weights.save_part(model.whisper, "whisper", args.out / f"{args.size}_whisper.safetensors",
                          made_by)
    if args.parts != "whisper" and args.data is None and world.rank == min(1, world.size - 1):
        if llada:
            weights.load_part(model.llada, "llada", llada, device)
        first_step = pre.backbone_steps if llada else 0
        steps = pretrain_backbone(model, tokenizer, text_example, pre, args.seed, first_step,
                                  progress)
        for step, loss, accuracy in steps:
            say(f"backbone step {step}: loss {loss:.3f}")
            for form, by_type in accuracy.items():
                plain, lettered = summarize(by_type)
                say(f"  on {form}: open {plain:.3f}, lettered {lettered:.3f}")
        for form, by_type in accuracy.items():
            say(f"{form}: " + "  ".join(f"{type} {value:.2f}" for type, value in by_type.items()))
        weights.save_part(model.llada, "llada", args.out / f"{args.size}_llada.safetensors",
                          made_by)
