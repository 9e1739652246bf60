"""Train DIFFA-2 through its curriculum: semantic alignment, joint alignment, backbone fine-tuning,
preferences.

    python train.py                          # all four stages of the toy size: minutes on a CPU
    python train.py --stage 2 --init runs/toy/stage1.safetensors --steps 1000 --out runs/mine
    python train.py --data FOLDER            # its stage1.json, sft.json, preference.json, ...
    python train.py --resume                 # go on where a run was stopped
    python train.py --stage 0                # make the toy's pretrained encoder and backbone anew
    python train.py --size small --data data/small    # on whisper-tiny.en; data/README.md has more

What the stages differ in is one table, `stages` in diffa2_mini/config.py. One loop below serves
them all: `train_stage`.
"""

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import argparse
import dataclasses
import shlex
import signal
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from data import librispeech, toy
from data.pretraining import fit, stage0
from diffa2_mini import weights
from diffa2_mini.config import DATA, SIZES, StageConfig
from diffa2_mini.data import BatchDataset
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate.validation import Validator, print_incomplete
from diffa2_mini.fast.compiling import compile_blocks
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.fast.measure import matmul_ceiling, peak_memory
from diffa2_mini.model import Diffa2Model
from diffa2_mini.noise import seed_of
from diffa2_mini.published.sources import load_tokenizer, locate_all
from diffa2_mini.training import checkpoint, dry_run, options
from diffa2_mini.training.checkpoint import Checkpoint
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.folder import RunFolder, finite
from diffa2_mini.training.loader import StageLoader, batches
from diffa2_mini.training.manifests import DataConfig, load_data
from diffa2_mini.training.objective import adamw, learning_rate, set_dropout
from diffa2_mini.training.options import stage_config
from diffa2_mini.training.processes import World, join_processes, shard
from diffa2_mini.training.random_weights import fill_at_random
from diffa2_mini.training.run import Run, StageParameters, StageProgress, Stopped, optimizer_step
from diffa2_mini.view import curves

# ------------------------------------------------------------------------------- data and the model


def build_model(args: argparse.Namespace, paths: dict[str, Path], device: torch.device,
                dtype: torch.dtype) -> Diffa2Model:
    """The model: frozen parts from `paths`, adapters from there too if they are among them. What is
    not there is random."""
    config = SIZES[args.size][0]
    torch.manual_seed(seed_of("weights", args.seed, 0))  # of the adapters and the prompts
    home = torch.device("cpu") if args.shard else device  # which it need not fit as a whole
    model = weights.build(config, None if args.random_weights else paths, home, dtype, FastLlada,
                          weights.Loading(args.quantize, print))
    if args.random_weights:
        fill_at_random(home, dtype, model.whisper, model.llada, quantize=args.quantize)
    model.llada.recompute = args.recompute
    if "diffa2" in paths:
        weights.load_diffa2(model, paths["diffa2"])
    return model


def set_up(args: argparse.Namespace, world: World, folder: RunFolder) -> Run:
    """What all stages share. Raises UserError where a user has something to mend."""
    if args.threads:
        torch.set_num_threads(args.threads)
    config = SIZES[args.size][0]
    device, dtype, why = choose_device(args.device, args.dtype, not config.from_scratch,
                                       trains=True)
    device = world.device(device)
    print(f"{why}, {world.size} processes of {torch.get_num_threads()} threads, "
          f"seed {args.seed}, size {args.size}")
    paths = locate_all({"diffa2": args.diffa2} if args.diffa2 else {}, args.size)
    path = args.data
    if not path and (config.from_scratch or args.random_weights):
        with world.main_first():  # which may have to make it
            path = toy.make_world(DATA / "toy")
    path = path or librispeech.prepared(args.size, args.stages)
    tokenizer = load_tokenizer(config, args.llada, args.random_weights)
    if not args.random_weights:
        paths |= locate_all({"whisper": args.whisper, "llada": args.llada}, args.size)
    taken = [f"{part}: {found}" for part, found in paths.items() if found != weights.SHIPPED[part]]
    print(*taken, sep=", ", end="\n" * bool(taken))  # all but what ships
    where = DataConfig(path, args.validation, args.test, args.skip_broken, not args.random_weights)
    data = load_data(where, args.size, args.stages, folder.unfinished, tokenizer)
    model = build_model(args, paths, device, dtype)
    folder.note_origins(checkpoint.fingerprints_of(paths), dtype, data.manifests, args.quantize)
    keep = config.from_scratch and not args.no_cache_audio
    features = FeatureCache(model, device, dtype, keep, args.cache_audio)
    if args.compile:
        compile_blocks(model.whisper.blocks, model.llada.blocks)
    return Run(world, device, dtype, data, tokenizer, model, features, folder,
               peak_flops=matmul_ceiling(device, dtype) * world.size)


# ---------------------------------------------------------------------------------------- one stage


def start_stage(args: argparse.Namespace, run: Run, stage: StageConfig, init: Checkpoint | None,
                resumed: Checkpoint | None) -> StageParameters:
    """Freeze all but what the stage trains, which starts from `init` or goes on from `resumed`."""
    model = run.model
    torch.manual_seed(seed_of("weights", args.seed, stage.number))  # of a new LoRA
    if "lora" in stage.trains:
        model.add_lora()
    if init:
        weights.restore(model, init.model, "the stage before")
    trained = model.train_only(stage.trains)
    if args.shard:
        shard(model, model.llada.blocks, run.world, run.device)
    run.world.broadcast_parameters(list(trained.values()))
    tensors = weights.trained_tensors(model) if stage.preference else {}
    reference = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer = adamw(trained, stage.lr, stage.betas, stage.weight_decay)
    if resumed:
        weights.restore(model, resumed.model, "the checkpoint")
        checkpoint.restore_optimizer(optimizer, model, resumed.optimizer)
    set_dropout(model.llada, stage.lora_dropout)
    set_dropout(model.acoustic_connector, stage.adapter_dropout)
    model.train()
    return StageParameters(stage, trained, reference, optimizer)


def train_stage(args: argparse.Namespace, run: Run, validator: Validator, number: int,
                init: Checkpoint | None, resumed: Checkpoint | None) -> Checkpoint:
    """Train one stage, from the checkpoint of the stage before (`init`), or on from one of its own
    (`resumed`). Returns its last checkpoint. Raises Stopped, after saving, where a signal came."""
    world, folder, stage = run.world, run.folder, stage_config(args, number)
    parameters = start_stage(args, run, stage, init, resumed)
    examples = run.cache_features(number, args.skip_broken)
    fit.fit_new_adapters(run, examples)
    folder.note(number, {"examples": len(examples)})
    first_step = resumed.step if resumed else 0
    n_steps = dry_run.number_of_steps(stage, len(examples))
    # a short run warms up in its first half
    stage = dataclasses.replace(stage, warmup=min(stage.warmup, n_steps // 2))
    run.print_stage(stage, examples, n_steps, first_step)
    dataset = BatchDataset(examples, args.seed, stage, run.model.config, run.tokenizer,
                           not run.features.keeps_features, args.skip_broken)
    order = batches(len(examples), stage.batch_size, n_steps, first_step, args.seed, number)
    loader = StageLoader(dataset, order, stage.micro_batch, world, args.workers)
    progress = StageProgress(run, stage, loader, n_steps, first_step)
    with loader, progress.bar:
        for step, entries, pieces in loader:
            progress.begin_step()
            lr = learning_rate(step, n_steps, stage)
            for group in parameters.optimizer.param_groups:
                group["lr"] = lr
            lengths = [length for entry in entries for length in dataset.lengths(entry.number)]
            n_tokens = sum(own for _, own in lengths)  # in the answers of the whole batch
            torch.manual_seed(seed_of("dropout", args.seed, number, step, world.rank))
            figures = optimizer_step(run, parameters, n_tokens, pieces)
            n_masked, n_broken, n_signals = map(figures.pop, ("masked", "broken", "signals"))
            row = {"stage": number, "step": step + 1, "lr": lr} | figures
            if not finite(row):
                clips = [str(examples[entry.number].path) for entry in entries]
                run.log.note_nonfinite(row, clips, args.skip_nonfinite)
            row |= progress.end_step(row, lengths, n_masked, int(n_broken))
            with suppress(Stopped):  # a signal ends a measurement, and the step is saved below
                if args.eval_every and (step + 1) % args.eval_every == 0 and run.data.validation:
                    row |= validator.report(stage, run.data.validation[::8]).figures
            run.log.add(**row, time=time.time())
            with suppress(Stopped):
                if (step + 1) % args.sample_every == 0 and run.data.validation:
                    validator.print_sample(stage, run.data.validation, step // args.sample_every)
                if stage.preference and step + 1 == 5 and run.data.validation:
                    ranking = validator.rank_pairs(stage, parameters.reference, run.data.validation)
                    run.log.add(stage=number, step=5, **ranking)
            stops = n_signals or run.is_stopping
            if stops or (step + 1) % args.save_every == 0 and step + 1 < n_steps:
                folder.save(number, step + 1, run.model, parameters.optimizer)
            if stops:
                raise Stopped
    progress.print_skipped()
    validate_stage(run, validator, parameters, n_steps)
    print_incomplete(run.features, examples + run.data.validation, world)
    peak = peak_memory(run.device)
    print(f"  stage {number} took {progress.seconds:.0f} s; peak memory "
          + (f"{peak:.2f} GiB" if peak else "not known on Windows"))
    return folder.save(number, n_steps, run.model)


def validate_stage(run: Run, validator: Validator, parameters: StageParameters, step: int) -> None:
    """Measure the model at the end of a stage. Where a signal or an error cuts that short, what is
    saved is not done, and resuming measures anew."""
    stage, examples = parameters.stage, run.data.validation
    if not examples:
        return
    try:
        report, ranking = validator.report(stage, examples), {}
        if stage.preference:
            ranking = validator.rank_pairs(stage, parameters.reference, examples)
    except (Stopped, UserError) as error:
        if isinstance(error, Stopped) or run.world.size == 1:  # else the others wait elsewhere
            run.folder.save(stage.number, step, run.model, parameters.optimizer)
        raise
    run.log.add(stage=stage.number, step=step, **report.figures, **ranking, time=time.time())
    print(report.table)


# --------------------------------------------------------------------------------------- the script


def train_stages(args: argparse.Namespace, run: Run, init: Checkpoint | None) -> None:
    """Train the stages, each from the one before, and test what comes out of the last."""
    folder, validator = run.folder, Validator(run.model, run.tokenizer, run.features, args.seed,
                                              run.raise_if_stopped)
    for number in args.stages:
        folder.note_start(number, init)
        if (saved := folder.saved.get(number)) and saved.done:
            print(f"\nstage {number} is done: {folder.path(number)}")
            weights.restore(run.model, saved.model, str(folder.path(number)))  # for --test
            if args.shard:
                shard(run.model, run.model.llada.blocks, run.world, run.device)
            init = saved
            continue
        if run.world.is_main:
            run.log.forget_after(number, saved.step if saved else 0)
        init = train_stage(args, run, validator, number, init, saved)
    stage = stage_config(args, args.stages[-1])
    for path, examples in run.data.tests.items():
        print(f"\n{path}\n{validator.report(stage, examples).table}")
        print_incomplete(run.features, examples, run.world)
    run.raise_if_stopped()


def resume_command(args: argparse.Namespace, argv: list[str]) -> str:
    """How to go on with a run that was started as `argv`: a script and its flags."""
    again = shlex.join(["python", *argv, *([] if args.resume else ["--resume"])])
    return again if args.processes == 1 else "the same torchrun command and --resume"


def ask_command(args: argparse.Namespace, path: Path) -> str:
    """How to ask the checkpoint at `path`, on the frozen parts that it was trained on."""
    parts = {"--checkpoint": str(path), "--whisper": args.whisper, "--llada": args.llada,
             "--quantize": args.quantize}
    words = [word for flag, value in parts.items() if value for word in (flag, value)]
    return shlex.join(["python", "sample.py", "data/clips/three_one_four.wav", *words])


def train(args: argparse.Namespace, world: World, stack: ExitStack) -> None:
    """Stages 1 to 4, or one of them. `stack` closes the lock of the run's folder."""
    config, stages = SIZES[args.size][0], {n: stage_config(args, n) for n in args.stages}
    begun = {n: checkpoint.begin(config, stage, args.seed) for n, stage in stages.items()}
    folder = RunFolder(args.out, begun, args.resume, world, stack)
    start = args.init
    if args.stages[0] > 1 and not (args.init or args.diffa2 or args.random_weights):
        start = folder.path(args.stages[0] - 1)
    init = checkpoint.load_start(start, config, is_named=bool(args.init)) if start else None
    run = set_up(args, world, folder)
    if init and not args.other_parts:
        checkpoint.require_same_parts(start, init, folder.fingerprints)
    folder.note_start(args.stages[0], init)
    folder.claim({"arguments": {name: str(value) for name, value in vars(args).items()},
                  "config": dataclasses.asdict(config),
                  "stages": {n: dataclasses.asdict(stage) for n, stage in stages.items()}})
    run.signals.catch()
    try:
        train_stages(args, run, init)
    except Stopped:
        print("stopped; all steps made are saved; go on with:", resume_command(args, sys.argv))
        sys.exit(128 + (run.signals.received or signal.SIGTERM))
    if not world.is_main:
        return
    if curves.draw_curves(args.out / "log.jsonl", args.out / "curves.png"):
        print(f"curves: {args.out / 'curves.png'}")
    if not args.random_weights:  # nobody could load those again
        print(f"ask it something: {ask_command(args, folder.path(args.stages[-1]))}")


def main(argv: list[str]) -> None:
    args = options.parse_arguments(argv, __doc__)
    if args.stage == "0":
        with join_processes(args.processes) as world:
            stage0.run(args, world)
    elif args.dry_run:
        plan = dry_run.Plan(args.size, args.dtype, args.recompute, args.processes, args.shard,
                            args.data, args.quantize)
        dry_run.show(plan, [stage_config(args, n) for n in args.stages])
    else:
        with join_processes(args.processes, args.compile) as world, ExitStack() as stack:
            train(args, world, stack)


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
