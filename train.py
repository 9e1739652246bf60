"""Train DIFFA-2 through its curriculum: semantic alignment, joint alignment, backbone fine-tuning,
preferences.

    python train.py                                    # all four stages, toy size, on the toy world: minutes on a CPU
    python train.py --stage 2 --init runs/toy/stage1.safetensors --steps 1000 --out runs/mine
    python train.py --data MANIFESTS --out runs/mine   # stage1.json, sft.json, preference.json, validation.json
    python train.py --resume                           # go on where a run was stopped
    python train.py --stage 0                          # make the toy's pretrained encoder and backbone anew

What the stages differ in is one table, `stages` in diffa2_mini/config.py. One loop below serves
them all.
"""

from diffa2_mini.command.script import begin, progress, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import dataclasses
import itertools
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data import toy
from diffa2_mini import weights
from diffa2_mini.command.table import listed
from diffa2_mini.config import DATA, SIZES, StageConfig, to_dict
from diffa2_mini.data import Batch, Collate, load_examples, what_is_cut
from diffa2_mini.errors import require
from diffa2_mini.evaluate import answers, scoreboard
from diffa2_mini.fast.compiling import compile_blocks
from diffa2_mini.fast.device import autocast, choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.measure import matmul_ceiling, peak_memory
from diffa2_mini.lora import set_dropout
from diffa2_mini.noise import seed_of
from diffa2_mini.pretraining import stage0
from diffa2_mini.training import checkpoint, dry_run, files, log, signals
from diffa2_mini.training.features import FeatureCache, InterruptibleFeatures
from diffa2_mini.training.loader import Loader, batches, count_workers
from diffa2_mini.training.objective import adamw, measure_pairs, names_of, piece_loss
from diffa2_mini.training.options import parse_arguments, pretrain_config, stage_config
from diffa2_mini.training.processes import World, shard, together
from diffa2_mini.view import curves
from diffa2_mini.weights import Checkpoint

# ---------------------------------------------------------------------------------------- one stage


def schedule(step: int, n_steps: int, stage: StageConfig) -> float:
    """The learning rate: up in a line over the warm-up, then down to zero in a line or along half a
    cosine."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, n_steps - stage.warmup)
    return stage.lr * (1 - done if stage.schedule == "linear" else 0.5 *
                       (1 + math.cos(math.pi * done)))


def default_data(args: argparse.Namespace) -> Path:
    """Where the data is if the user does not say: the toy world, made if it is missing, or the
    prepared LibriSpeech. Raises UserError."""
    config = SIZES[args.size][0]
    if config.from_scratch or args.random_weights:
        return toy.make_world(DATA / "toy")
    return dry_run.prepared_data(config, args.stages)


class Stopped(Exception):
    """One of `signals.Signals` came; raised between two steps, or two batches of a measurement."""


class Run:
    """What all stages of a run share. Each process of `world` has one."""

    def __init__(self, args: argparse.Namespace, world: World, begun: dict[int, Checkpoint],
                 left: list[int]):
        """`begun` are the stages as checkpoints before their first step; `left` has the numbers of
        those to train."""
        self.args, self.world, self.begun = args, world, begun
        self.config, self.stages = SIZES[args.size]
        if args.threads:
            torch.set_num_threads(args.threads)
        device, self.dtype, why = choose_device(args.device, args.dtype,
                                                large=not self.config.from_scratch)
        self.device = world.device(device)
        print(
            f"{why}, {world.size} processes of {torch.get_num_threads()} threads, seed {args.seed}, size {args.size}"
        )
        diffa2 = args.diffa2 and weights.locate(args.diffa2, "diffa2", args.size)
        with world.main_first():  # which may have to make the toy world
            self.data = args.data or default_data(args)
        require(self.data.exists(),
                f"--data {self.data}: expected a manifest or a folder of manifests, found nothing")
        self.tokenizer = weights.load_tokenizer(self.config, args.llada, args.random_weights)
        if not args.random_weights:
            weights.locate_all({"whisper": args.whisper, "llada": args.llada}, args.size)
        self.manifests = {number: self.data / f"{self.stages[number].data}.json"
                          if self.data.is_dir() else self.data for number in begun}
        self.examples = self.load_manifests(left)  # all of them before anything is trained
        self.validation = self.load_validation()
        self.tests = {path: load_examples(path, self.stages[2], self.config, args.skip_broken,
                                          print) for path in args.test}
        torch.manual_seed(seed_of("weights", args.seed, 0))  # adapters and prompts start at random
        # what is split need not fit the device
        home = torch.device("cpu") if args.shard else self.device
        self.model = weights.build(self.config, args.whisper, args.llada, home, self.dtype,
                                   args.random_weights, FastLlada)
        self.model.llada.recompute = args.recompute or dry_run.recompute(self.config)
        if diffa2:
            weights.load_diffa2(self.model, diffa2)
        keep = args.size == "toy" and not args.no_cache_audio
        self.features = FeatureCache(self.model, self.device, self.dtype, keep, args.cache_audio)
        self.interruptible = InterruptibleFeatures(self.features, self.look_for_stop)
        if args.compile:
            compile_blocks(self.model.whisper.blocks, self.model.llada.blocks)
        self.log = log.Log(args.out / "log.jsonl", world.is_main)
        self.ceiling = matmul_ceiling(self.device, self.dtype) * world.size
        self.note_origins()
        # torchrun repeats a signal
        self.signals, self.stopping = signals.Signals(patient=world.size > 1), False

    def look_for_stop(self) -> None:
        """Raise Stopped, in all processes, if one of them has had a signal."""
        self.stopping = any(self.world.gather([self.signals.came is not None]))
        if self.stopping:
            raise Stopped

    def load_manifests(self, numbers: list[int]) -> dict[int, list]:
        """The examples of these stages; what two of them read in the same way is read once."""
        loaded, examples = {}, {}
        for number in numbers:
            path, stage = self.manifests[number], self.stages[number]
            kind = path, stage.data, stage.preference
            if kind not in loaded:
                loaded[kind] = load_examples(path, stage, self.config, self.args.skip_broken, print,
                                             self.tokenizer)
            examples[number] = loaded[kind]
        return examples

    def note_origins(self) -> None:
        """Note in the stages to come what they are trained on."""
        for number, state in self.begun.items():
            state.settings["dtype"] = str(self.dtype).removeprefix("torch.")
            state.fingerprints |= {part: self.model.fingerprints[part]
                                   for part in ("whisper", "llada")}
            if self.manifests[number].is_file():  # of a stage that is done it may be gone
                state.fingerprints["manifest"] = files.digest_of(self.manifests[number])

    def starts(self, number: int, init: Checkpoint | None) -> Checkpoint:
        """A stage as a checkpoint before its first step, which notes its starting weights."""
        start = self.model.fingerprints.get("diffa2", "random")
        start = weights.fingerprint(init.model) if init else start
        self.begun[number].fingerprints["start"] = start
        return self.begun[number]

    def load_validation(self) -> list:
        folder = self.data if self.data.is_dir() else self.data.parent
        path = self.args.validation or folder / "validation.json"
        if self.args.random_weights:
            return []
        if not path.exists() and not self.args.validation:
            print(f"no {path}: nothing will be measured")
            return []
        return load_examples(path, self.stages[2], self.config, self.args.skip_broken, print)

    def answers(self, stage: StageConfig, examples: list) -> list[str]:
        """What the model answers now, decoded with the defaults."""
        self.model.eval()
        batch_size = 64 if self.config.from_scratch else stage.micro_batch
        texts, _ = answers.answer(self.model, self.tokenizer, self.interruptible, examples,
                                  stage.audio, self.config.decode, batch_size)
        self.model.train()
        self.world.wait()
        return texts

    def report(self, stage: StageConfig, examples: list) -> scoreboard.Report:
        """How good the answers are now."""
        return scoreboard.report(examples, self.answers(stage, examples))

    def tell_incomplete(self, examples: list) -> None:
        """Name and count the clips of these examples that were heard and are incomplete."""
        found = dict(self.world.gather([*self.features.incomplete.items()]))
        lines = [found[path] for path in {example.path: 0 for example in examples} if path in found]
        for line in listed(scoreboard.INCOMPLETE, lines) if lines else []:
            print(f"  {line}")

    def measure_preferences(self, stage: StageConfig, reference: dict) -> dict[str, float]:
        """Are held-out pairs ranked right, and how much does sharing the masks reduce the noise of
        the score?"""
        figures = measure_pairs(self.model, reference, self.validation, stage, self.args.seed,
                                self.tokenizer, self.interruptible)
        self.world.wait()
        tqdm.write(
            "  held-out pairs: {reward_accuracy:.3f} ranked right, margin {margin:.2f}; variance of the score "
            "{variance_shared:.3g} with shared masks, {variance_independent:.3g} with independent ones"
            .format(**figures) if figures else
            "  no held-out example has a rejected answer: how pairs are ranked is not measured")
        return figures


def step_on(run: Run, stage: StageConfig, reference: dict, optimizer: torch.optim.Optimizer,
            parameters: list, n_tokens: int, batches: Iterator[Batch]) -> dict[str, float]:
    """One step of the optimiser on a batch that has `n_tokens` in its answers, and of which this
    process has its share, in pieces. Returns figures of the whole batch: those to log, `masked`
    (tokens predicted), `broken` (clips), `stop` (signals)."""
    figures = {"masked": 0, "broken": 0, "stop": run.signals.came is not None}
    for batch in batches:
        audio_embeddings = batch.encoded(run.features, run.device)
        with autocast(run.device, run.dtype):
            piece = piece_loss(run.model, reference, audio_embeddings, stage, run.tokenizer,
                               n_tokens)
        piece["loss"].backward()
        figures |= {name: figures.get(name, 0) + value.detach() for name, value in piece.items()}
        figures |= {
            "masked": figures["masked"] + batch.n_masked,
            "broken": figures["broken"] + len(batch.broken)}
        run.features.incomplete |= batch.incomplete
        for complaint in batch.broken:
            tqdm.write(f"  left out: {complaint}", file=sys.stderr)
    figures = run.world.total({name: float(value) for name, value in figures.items()})
    run.world.add_up(parameters)
    figures["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, stage.grad_clip))
    if files.finite(figures):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures


def train_stage(run: Run, number: int, init: Checkpoint | None,
                resumed: Checkpoint | None) -> Checkpoint:
    """Train one stage, from the checkpoint of the stage before (`init`), or on from one of its own
    (`resumed`)."""
    args, world, model, stage = run.args, run.world, run.model, stage_config(run.args, number)
    manifest, examples, begun = run.manifests[number], run.examples[number], run.begun[number]

    torch.manual_seed(seed_of("weights", args.seed, number))  # new parts
    if "lora" in stage.trains:
        model.add_lora()
    if init:
        weights.restore(model, init.model, "the stage before")
    trained = model.train_only(stage.trains)
    if args.shard:
        shard(model.llada.blocks, world, run.device)
        model.to(run.device)
    world.start_alike(list(trained.values()))
    reference = {}
    if stage.preference:
        reference = {
            name: tensor.clone()
            for name, tensor in weights.trained_tensors(model).items()}
    optimizer = adamw(trained, stage.lr, stage.betas, stage.weight_decay)
    first_step = 0
    if resumed:
        weights.restore(model, resumed.model, "the checkpoint")
        checkpoint.restore_optimizer(optimizer, names_of(optimizer), resumed.optimizer)
        first_step = resumed.step
    set_dropout(model.llada, stage.lora_dropout)
    set_dropout(model.acoustic_connector, stage.adapter_dropout)
    model.train()

    def listening(paths: list) -> Iterator:
        bar = progress(paths, desc="  listening", leave=False, disable=not world.is_main)
        return itertools.takewhile(lambda path: not run.signals.came, bar)

    unreadable = run.features.prepare([example.path for example in examples + run.validation],
                                      listening, args.skip_broken, world)
    run.look_for_stop()
    for complaint in unreadable.values():
        print(f"  left out: {complaint}")
    examples, run.validation = ([each
                                 for each in some
                                 if each.path not in unreadable]
                                for some in (examples, run.validation))
    require(examples, f"{manifest}: not one of its clips can be heard")
    world.agree(
        len(examples),
        f"{manifest}: the processes see different examples; give all machines the same data")
    begun.settings["examples"] = len(examples)
    if resumed:
        checkpoint.same_run(args.out / f"stage{number}.safetensors", resumed, begun)
    n_steps = dry_run.number_of_steps(stage, len(examples))
    # a short run warms up in its first half
    stage = dataclasses.replace(stage, warmup=min(stage.warmup, n_steps // 2))
    n_all, n_trained = sum(p.numel() for p in model.parameters()), sum(
        p.numel() for p in trained.values())
    print(f"\nstage {number}, {stage.title}: trains {' + '.join(stage.trains)}\n"
          f"  trainable parameters: {n_trained:,} of {n_all:,} ({n_trained / n_all:.2%})\n"
          f"  {len(examples):,} examples of {manifest}, {n_steps:,} steps of {stage.batch_size} "
          f"({stage.micro_batch} at once), learning rate {stage.lr:g}, "
          f"{stage.warmup} steps of warm-up, {stage.schedule}")
    cut = what_is_cut(examples, stage, run.config, run.tokenizer)
    if cut:
        print(f"  not learnt whole: {cut}")

    def save(step: int, done: bool) -> Checkpoint:
        state = dataclasses.replace(begun, step=step, done=done,
                                    model=weights.trained_tensors(model))
        if not done:
            state.optimizer = checkpoint.optimizer_tensors(optimizer, names_of(optimizer))
        if world.is_main:
            weights.save_checkpoint(args.out / f"stage{number}.safetensors", state,
                                    keep=files.keep_previous)
        world.wait()
        return state

    collate = Collate(examples, args.seed, stage, run.config, run.tokenizer,
                      not run.features.keeps_features, args.skip_broken)
    every_step = batches(len(examples), stage.batch_size, n_steps, first_step, args.seed, number)
    steps, ahead = itertools.tee(
        (step, pairs, collate.cut(pairs, stage.micro_batch, world.rank, world.size))
        for step, pairs in every_step)
    loader = Loader(collate, (piece for *_, pieces in ahead for piece in pieces),
                    count_workers(args.workers, collate.load, world.local_size))

    start, n_skipped = time.perf_counter(), {
        "steps whose loss or gradient was not finite": 0, "clips that were broken": 0}
    with loader, progress(total=n_steps, initial=first_step, desc=f"  stage {number}", unit="step",
                          disable=not world.is_main) as bar:
        for step, pairs, pieces in steps:
            lr = schedule(step, n_steps, stage)
            for group in optimizer.param_groups:
                group["lr"] = lr
            began, waited = time.perf_counter(), loader.waited + run.features.waited
            # before and in each answer
            lengths = [length for _, i in pairs for length in collate.lengths(i)]
            torch.manual_seed(seed_of("dropout", args.seed, number, step, world.rank))
            figures = step_on(run, stage, reference, optimizer, list(trained.values()),
                              sum(own for _, own in lengths), loader.take(len(pieces)))
            n_masked, n_broken, stop = (figures.pop(name) for name in ("masked", "broken", "stop"))
            if not files.finite(figures):
                clips = [str(examples[i].path) for _, i in pairs]
                files.note_nonfinite(args.out, number, step + 1, figures, clips,
                                     args.skip_nonfinite, world.is_main)
                n_skipped["steps whose loss or gradient was not finite"] += 1
            n_skipped["clips that were broken"] += int(n_broken)
            shape = dry_run.shape_of_step(stage, lengths, n_masked, collate.load)
            speed = dry_run.throughput(run.config, stage, shape,
                                       time.perf_counter() - began, run.ceiling)
            rate = stage.batch_size * (step + 1 - first_step) / (time.perf_counter() - start)
            bar.set_postfix(loss=f"{figures['loss']:.3f}", lr=f"{lr:.1e}", examples_s=f"{rate:.0f}",
                            tokens_s=f"{speed['tokens_per_second']:.0f}", mfu=f"{speed['mfu']:.0%}",
                            refresh=False)
            bar.update()
            row = {
                "stage": number, "step": step + 1, "lr": lr, **figures,
                **speed, "data_wait": loader.waited + run.features.waited - waited}
            row |= {} if files.finite(figures) else {"skipped": 1}
            # a measurement that is cut short is left out, and the step saved below
            with suppress(Stopped):
                if args.eval_every and (step + 1) % args.eval_every == 0 and run.validation:
                    row |= run.report(stage, run.validation[::8]).figures
            run.log.add(**row, examples_per_second=rate, time=time.time())
            with suppress(Stopped):
                if (step + 1) % args.sample_every == 0 and run.validation:
                    example = run.validation[step * 7 % len(run.validation)]
                    tqdm.write(
                        f"  {example.path.name}: {' / '.join(example.instruction.splitlines())}\n"
                        f"    target {example.answer!r}, answer {run.answers(stage, [example])[0]!r}"
                    )
                if stage.preference and step + 1 == 5 and run.validation:
                    run.log.add(stage=number, step=5, **run.measure_preferences(stage, reference))
            if stop or run.stopping:
                save(step + 1, done=False)
                raise Stopped
            if (step + 1) % args.save_every == 0 and step + 1 < n_steps:
                save(step + 1, done=False)
    for what, n in n_skipped.items():
        if n:
            print(f"  skipped {n} {what}")
    if run.validation:
        try:
            result = run.report(stage, run.validation)
            figures = result.figures | (run.measure_preferences(stage, reference)
                                        if stage.preference else {})
        except Stopped:
            save(n_steps, done=False)  # resumed, it measures anew
            raise
        run.log.add(stage=number, step=n_steps, **figures, time=time.time())
        print(scoreboard.table(result))
    run.tell_incomplete(examples + run.validation)
    print(
        f"  stage {number} took {time.perf_counter() - start:.0f} s; peak memory {peak_memory(run.device)}"
    )
    return save(n_steps, done=True)


# --------------------------------------------------------------------------------------- the script


def ask_command(args: argparse.Namespace, path: Path) -> str:
    """The command that asks what was trained, on the parts that it was trained on."""
    parts = {"--checkpoint": str(path), "--whisper": args.whisper, "--llada": args.llada}
    words = [word for flag, value in parts.items() if value for word in (flag, value)]
    return shlex.join(["python", "sample.py", "data/clips/three_one_four.wav", *words])


def train(args: argparse.Namespace, world: World, held: ExitStack) -> None:
    """Stages 1 to 4, or one of them. Of several processes the first checks and writes the folder,
    and it is `held` meanwhile."""
    numbers = args.stages
    paths = {number: args.out / f"stage{number}.safetensors" for number in SIZES[args.size][1]}

    def check_free() -> None:
        require(args.resume or not any(paths[number].exists() for number in numbers),
                f"{args.out}: holds a run already; go on with --resume, or choose another --out")

    is_new = not args.out.exists()
    with world.main_first():
        if world.is_main:
            if not is_new:
                held.enter_context(files.lock(args.out))
            check_free()
        found = {number: files.load_last(paths[number], weights.load_checkpoint)
                 for number in numbers if paths[number].exists() and args.resume}
    world.agree([
        (number, state.step, state.done) for number, state in found.items()
    ], f"{args.out}: the processes see different checkpoints; give an --out that all machines share"
                )
    config, begins_at = SIZES[args.size][0], args.init
    begun = {number: checkpoint.begin(config, number, stage_config(args, number), args.seed)
             for number in numbers}
    for number, state in found.items():
        checkpoint.same_run(paths[number], state, begun[number])
    if numbers[0] > 1 and not (args.init or args.diffa2 or args.random_weights):
        begins_at = paths[numbers[0] - 1]
    init = checkpoint.load_start(begins_at, config, is_named=bool(args.init)) if begins_at else None
    left = [number for number in numbers if not (number in found and found[number].done)]
    run = Run(args, world, begun, left)
    if init and not args.other_parts:
        weights.same_parts(begins_at, init, run.model.fingerprints)
    run.starts(numbers[0], init)  # where the others start is known when they do
    for number, state in found.items():
        checkpoint.same_run(paths[number], state, begun[number])
    if world.is_main:
        if is_new:
            # not before: a run that is refused leaves no folder behind
            held.enter_context(files.lock(args.out))
        check_free()
    if world.is_main and left:
        about = {
            "arguments": {name: str(value)
                          for name, value in vars(args).items()}, "config": to_dict(run.config),
            "stages": {
                number: dataclasses.asdict(stage_config(args, number))
                for number in numbers}}
        files.write(args.out / "config.json",
                    lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))

    run.signals.catch()
    try:
        for number in numbers:
            resumed, state = found.get(number), run.starts(number, init)
            if resumed:
                checkpoint.same_run(paths[number], resumed, state)
            if resumed and resumed.done:
                print(f"\nstage {number} is done: {paths[number]}")
                weights.restore(run.model, resumed.model, str(paths[number]))  # for --test
                init = resumed
                continue
            if world.is_main:
                run.log.forget_after(number, resumed.step if resumed else 0)
            init = train_stage(run, number, init, resumed)
        for path, examples in run.tests.items():
            print(f"\n{path}\n{scoreboard.table(run.report(run.stages[numbers[-1]], examples))}")
            run.tell_incomplete(examples)
        run.look_for_stop()
    except Stopped:
        again = shlex.join(
            ["python", "train.py", *sys.argv[1:], *([] if args.resume else ["--resume"])])
        print("stopped and saved; go on with: " +
              (again if world.size == 1 else "the same torchrun command and --resume"))
        sys.exit(128 + (run.signals.came or signal.SIGTERM))
    if not world.is_main:
        return
    if curves.draw_curves(args.out / "log.jsonl", args.out / "curves.png"):
        print(f"curves: {args.out / 'curves.png'}")
    if not args.random_weights:  # which nobody could name
        print("ask it something: " + ask_command(args, paths[numbers[-1]]))


def stage0_options(args: argparse.Namespace) -> stage0.Options:
    """What stage 0 is to make."""
    return stage0.Options(args.size, args.parts, args.out, args.data, args.whisper, args.llada,
                          args.device, args.threads, args.seed, pretrain_config(args))


def main(argv: list[str]) -> None:
    args = parse_arguments(argv, __doc__)
    if args.stage == "0":
        with together(args.processes) as world:
            stage0.run(stage0_options(args), world, lambda: toy.make_stage0(DATA / "toy"),
                       toy.text_example)
    elif args.dry_run:
        dry_run.show(args, {number: stage_config(args, number) for number in args.stages})
    else:
        with together(args.processes, args.compile) as world, ExitStack() as held:
            train(args, world, held)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
