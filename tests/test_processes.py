"""Several processes train the model that one would: the same batches, the same loss over all of a
batch, the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from mini import ROOT, SECONDS, logged
from test_interrupted import processes, started, until

import train
from diffa2_mini.config import SIZES
from diffa2_mini.data import BatchDataset, load_examples, read_manifest
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.loader import batches
from diffa2_mini.training.objective import answer_loss
from diffa2_mini.training.processes import GRADIENT_TIMEOUT
from diffa2_mini.weights import build

CONFIG, STAGES = SIZES["toy"]
STEPS = ["--steps", "2", "--save-every", "1", "--batch-size", "6", "--warmup", "1",
         "--threads", "1", "--lora-dropout", "0", "--dtype", "float64"]


@pytest.fixture(scope="session")
def manifests(world):
    """The small world, with two questions to measure on."""
    rows = [{name: value
             for name, value in row.items()
             if name != "rejected"}
            for row in read_manifest(world / "validation.json")]
    (world / "few.json").write_text(json.dumps(rows[:2]))
    return world


def command(n, manifests, out, *extra):
    start = ["-m", "torch.distributed.run", "--standalone",
             f"--nproc_per_node={n}"] if n > 1 else []
    return [sys.executable, *start, str(ROOT / "train.py"), "--data", str(manifests),
            "--validation", str(manifests / "few.json"), "--out", str(out), *STEPS, *extra]


def run(n, manifests, out, *extra):
    """train.py in n processes, as a user starts it."""
    done = subprocess.run(command(n, manifests, out, *extra), capture_output=True, text=True,
                          timeout=SECONDS, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def torchrun(n, script, folder, *arguments):
    """A script in n processes; what became of it."""
    (folder / "script.py").write_text(script)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    return subprocess.run([*start, str(folder / "script.py"), *arguments], capture_output=True,
                          text=True, timeout=SECONDS,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def apart(out, other, stage, of=torch.max):
    """How far the weights of two runs are apart after a stage: at most, or by another statistic."""
    name = f"stage{stage}.safetensors"
    a, b = (load_checkpoint(folder / name) for folder in (out, other))
    assert a.done and b.done and a.model.keys() == b.model.keys()
    apart = [(tensor - a.model[name]).abs().flatten() for name, tensor in b.model.items()]
    return float(of(torch.cat(apart)))


TRAIN = """
import json, sys
from contextlib import ExitStack
import train
from diffa2_mini.training.options import parse_arguments
from diffa2_mini.training.processes import join_processes
runs = [parse_arguments(flags, "") for flags in json.loads(sys.argv[1])]
with join_processes(runs[0].processes) as world:
    for args in runs:
        with ExitStack() as held:
            train.train(args, world, held)
"""


def train_each(n, runs, manifests, folder):
    """Train into folders of these names with these flags, in n processes that start once, or in
    this one; what several print."""
    folder.mkdir(exist_ok=True)
    lines = [command(1, manifests, folder / name, *flags)[2:] for name, flags in runs.items()]
    if n > 1:
        done = torchrun(n, TRAIN, folder, json.dumps(lines))
        assert done.returncode == 0, done.stderr
        return done.stdout
    for line in lines:
        train.main(line)


def moments(out, stage):
    """AdamW's first moments after the first of two steps: the gradient, up to a factor."""
    state = load_checkpoint(out / f"stage{stage}.previous.safetensors").optimizer
    names = [name for name in sorted(state) if name.startswith("exp_avg.")]
    return torch.cat([state[name].flatten() for name in names])


@pytest.fixture(scope="session")
def alone(manifests, tmp_path_factory):
    """A run of one process: this one."""
    out = tmp_path_factory.mktemp("parallel") / "alone"
    train.main(command(1, manifests, out)[2:])
    return out


@pytest.fixture(scope="session")
def brief(manifests, tmp_path_factory):
    """Three clips that are heard, and one of 60 ms, too short for a semantic embedding. It is the
    last piece of the second of two processes that take a clip at a time, and does not reach the
    semantic adapter."""
    folder = tmp_path_factory.mktemp("brief")
    samples, rate = soundfile.read(ROOT / "data" / "clips" / "three_one_four.wav")
    rows = [{"audio_filepath": f"{i}.wav", "transcription": "three one four"} for i in range(4)]
    for row, seconds in zip(rows, (1.5, 0.06, 1.2, 0.9)):
        soundfile.write(folder / row["audio_filepath"], samples[:round(seconds * rate)], rate)
    (folder / "stage1.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def runs(alone, brief):
    """Flags of runs by name. All begin with the same weights in any number of processes."""
    stages = {1: ["--stage", "1"]}
    for stage in (2, 3, 4):
        init = alone / f"stage{stage - 1}.safetensors"
        stages[stage] = ["--stage", str(stage), "--init", str(init)]
    flags = {"all": []} | {f"stage {stage}": line for stage, line in stages.items()}
    flags |= {f"split {stage}": [*line, "--shard"] for stage, line in stages.items()}
    flags["pieces, stage 4"] = [*stages[4], "--grad-accum", "3", "--recompute", "blocks"]
    flags["brief"] = [*stages[1], "--data", str(brief), "--batch-size", "4", "--grad-accum", "2"]
    return flags


@pytest.fixture(scope="session")
def alone_in_brief(runs, manifests, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train_each(1, {"brief": runs["brief"]}, manifests, folder)
    return folder / "brief"


def check_gradient(out, expected, stage):
    """In float64 rounding is 1.1e-16 of each number. Thousands of them, summed in another order,
    are apart by far less than 1e-12 of their size; seen are 3e-15."""
    found, wanted = moments(out, stage), moments(expected, stage)
    error = float((found - wanted).norm() / wanted.norm())
    print(f"{out.name}: relative error of the gradient {error:.2g}")
    assert error < 1e-12, out.name


@pytest.fixture(scope="session")
def two(runs, manifests, tmp_path_factory):
    """What two processes make of some runs, and what is printed."""
    folder = tmp_path_factory.mktemp("two")
    names = ("all", "stage 2", "stage 3", "stage 4", "split 3", "brief")
    return folder, train_each(2, {name: runs[name] for name in names}, manifests, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "stage 2", "stage 3", "stage 4", "split 3"])
def test_the_gradient_of_two_processes_is_that_of_one(name, two, alone):
    check_gradient(two[0] / name, alone, 1 if name == "all" else int(name[-1]))


@pytest.mark.slow
def test_clips_without_a_semantic_embedding_are_a_piece_like_others(two, alone_in_brief):
    check_gradient(two[0] / "brief", alone_in_brief, 1)


@pytest.mark.slow
def test_two_processes_train_as_one_does(two, alone):
    """AdamW divides small gradients by themselves, and so amplifies rounding: to 6e-9 at most on
    the machines that were tried. A step with another gradient moves weights by about the learning
    rate, 2e-4 or more."""
    out, printed = two[0] / "all", two[1]
    assert all(apart(alone, out, stage) < 1e-5 for stage in (1, 2, 3, 4))
    rows, wanted = (logged(folder) for folder in (out, alone))
    assert len(rows) == len(wanted)  # each is logged once
    for row, other in zip(rows, wanted):
        assert (row["stage"], row["step"]) == (other["stage"], other["step"])
        assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-5)
    assert printed.count("stage 1, semantic alignment") == 2  # of "all" and "brief", each once
    assert printed.count("2 processes") == 6
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("n, names", [
    (2, ["split 1", "split 2", "split 4", "pieces, stage 4"]),
    (3, [f"{kind} {stage}" for kind in ("stage", "split") for stage in (1, 2, 3, 4)]),
], ids=["two", "three"])
def test_split_backbones_pieces_and_more_processes_change_nothing(
        n, names, runs, alone, manifests, tmp_path):
    train_each(n, {name: runs[name] for name in names}, manifests, tmp_path)
    for name in names:
        check_gradient(tmp_path / name, alone, int(name[-1]))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(manifests, alone, tmp_path):
    """Saved by one, it goes on in three; saved by three, in two: the third step is the same."""
    flags = ["--stage", "3", "--init", str(alone / "stage2.safetensors"), "--steps", "3",
             "--save-every", "2"]

    def go_on(saved, name):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / saved / "stage3.previous.safetensors",
                    tmp_path / name / "stage3.safetensors")
        return {name: [*flags, "--resume"]}

    train_each(1, {"one": flags}, manifests, tmp_path)
    train_each(3, {"three": flags} | go_on("one", "one, three"), manifests, tmp_path)
    train_each(1, go_on("three", "three, one"), manifests, tmp_path)
    train_each(2, go_on("three", "three, two"), manifests, tmp_path)
    for name, same in (("one, three", "one"), ("three, two", "three, one")):
        row, wanted = ([row for row in logged(tmp_path / each) if "loss" in row][-1]
                       for each in (name, same))
        assert row["step"] == 3 and row == pytest.approx(wanted, rel=1e-12)
        assert apart(tmp_path / name, tmp_path / same, 3) < 1e-5


@pytest.mark.slow
def test_in_float32_rounding_is_amplified_this_far(manifests, tmp_path):
    """In its first steps AdamW moves a weight by the learning rate at most, whatever the gradient,
    so that two runs are never further apart than twice the sum of the rates. Half of the weights
    stay a hundred times closer: 2e-5 was seen, and a step with another gradient moves them by the
    rate, 2e-4 or more."""
    flags = ["--steps", "5", "--save-every", "3", "--dtype", "float32"]
    train_each(1, {"1": flags}, manifests, tmp_path)
    run(2, manifests, tmp_path / "2", *flags)
    drifts, typical = ([apart(tmp_path / "1", tmp_path / "2", stage, of) for stage in (1, 2, 3, 4)]
                       for of in (torch.max, torch.median))
    print("float32, one process against two, 5 steps of each stage:", drifts, "medians", typical)
    rates = [row["lr"] for row in logged(tmp_path / "1") if "loss" in row]
    assert 0 < drifts[0] and max(drifts) < 2 * sum(rates) and max(typical) < sum(rates) / 100


@pytest.mark.slow
def test_stage_0_shares_out_its_parts(world, tmp_path):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *start, str(ROOT / "train.py"), "--stage", "0", "--data", str(world),
               "--out", str(tmp_path), "--steps", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy_whisper.safetensors").exists() and done.stdout.count("device cpu") == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(manifests, tmp_path):
    many = command(2, manifests, tmp_path, "--stage", "1", "--steps", "100000", "--sample-every",
                   "100000")
    running = subprocess.Popen(many, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (second, ) = [
        int(pid)
        for pid in children
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)
    start = time.monotonic()
    _, printed = running.communicate(timeout=SECONDS)
    assert running.returncode != 0
    # a minute, on a free machine
    assert time.monotonic() - start < 2 * GRADIENT_TIMEOUT.total_seconds()
    assert "process 0 of 2 has lost another" in printed and "--resume" in printed


SPLIT = """
import sys, torch
from diffa2_mini.training import processes
from diffa2_mini.config import LladaConfig, LoraConfig
from diffa2_mini.llada import Llada
from diffa2_mini.lora import add_lora
with processes.join_processes(2) as world:
    model = Llada(LladaConfig(vocab_size=23, width=12, n_layers=3, n_heads=3, hidden=20))
    add_lora(model, LoraConfig(rank=1, alpha=1.0, targets=("q_proj",)))
    model.requires_grad_(False)
    x = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    held = lambda: sum(getattr(p, "to_local", lambda p=p: p)().untyped_storage().nbytes()
                       for p in model.blocks.parameters())
    for p in model.parameters():
        torch.distributed.broadcast(p.data, 0)
    whole, expected = held(), model(x)
    processes.shard(model, model.blocks, world, torch.device("cpu"))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.detach().numpy()  # whole, though it is frozen
    before, y = held(), model(x)
    after = held()
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    print(whole, before, after, held())
"""


@pytest.mark.slow
def test_split_blocks_hold_half_and_come_together_one_at_a_time(tmp_path):
    done = torchrun(2, SPLIT, tmp_path)
    assert done.returncode == 0, done.stderr
    whole, *held = map(int, done.stdout.split())
    # before, after the forward pass, after the backward pass
    assert all(each < 0.6 * whole for each in held)


PATIENT = """
import sys, time
from datetime import timedelta
from diffa2_mini.training import processes
from diffa2_mini.command.script import run_script
processes.GRADIENT_TIMEOUT = timedelta(seconds=5)
def main(argv):
    with processes.join_processes(2) as world:
        time.sleep(0 if world.is_main else 8)
        world.wait()
        assert world.gather([world.rank]) == [0, 1] and world.sum_figures({"a": 1.0}) == {"a": 2.0}
        print("waited", flush=True)
        time.sleep(0 if world.is_main else 60)
        world.sum_figures({"a": 1.0})
start = time.monotonic()
code = run_script(main, [])
print("after", time.monotonic() - start, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_processes_wait_for_one_another_but_not_within_a_step(tmp_path):
    done = torchrun(2, PATIENT, tmp_path)
    assert done.returncode != 0 and done.stdout == "waited\n"
    (line, ) = [
        line for line in done.stderr.splitlines()
        if line.startswith("error: process 0 of 2 has lost another")]
    assert "hangs" in line and "Timed out" in line  # what torch says of it


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "one that trains"])
def test_a_signal_to_torchrun_or_to_one_process_saves_and_leaves_nobody_behind(
        manifests, tmp_path, to):
    many = command(2, manifests, tmp_path, "--stage", "1", "--steps", "100000", "--sample-every",
                   "100000", "--save-every", "100000", "--workers", "1", "--no-cache-audio")
    running = started(many, tmp_path)
    assert len(processes(tmp_path)) == 5  # torchrun, two that train, two that load audio
    of = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(running.pid if to == "torchrun" else int(of[-1]), signal.SIGTERM)
    printed, error = running.communicate(timeout=SECONDS)
    last = printed.splitlines()[-1]
    assert last == ("stopped; all steps made are saved; go on with: the same torchrun command and "
                    "--resume")
    assert "DataLoader" not in error and running.returncode != 0
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert load_checkpoint(tmp_path / "stage1.safetensors").step == len(rows)
    assert until(lambda: not processes(tmp_path), SECONDS)


@pytest.fixture(scope="module")
def dataset(world):
    examples = load_examples(world / "sft.json", STAGES[2], CONFIG)
    return BatchDataset(examples, 0, STAGES[2], CONFIG, load_tokenizer(CONFIG))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_example_is_dealt_out_exactly_once_an_epoch(dataset, size):
    n, batch_size = len(dataset.data), 7
    assert n % batch_size and batch_size % 2
    n_epochs = 3
    dealt = [
        entry[:2] for _, entries in batches(n, batch_size, n * n_epochs // batch_size + 1, 0, 0, 2)
        for rank in range(size) for piece in dataset.micro_batches(entries, 2, rank, size)
        for entry in piece]
    counts = {entry: dealt.count(entry) for entry in dealt}
    assert {*counts.values()} == {1}
    assert {(e, i) for e in range(n_epochs) for i in range(n)} <= counts.keys()


@torch.no_grad()
def test_the_loss_is_normalised_over_the_whole_batch(dataset):
    """An average of the processes' averages is another number, as they have different numbers of
    tokens."""
    model = build(CONFIG, dtype=torch.float64)
    features = FeatureCache(model, torch.device("cpu"), torch.float64, keep=True)
    ((_, entries),) = batches(len(dataset.data), 9, 1, 0, 0, 2)

    def loss(entries, n_tokens):
        return float(answer_loss(model, dataset[entries].encoded(features, features.device),
                                 STAGES[2], n_tokens))

    def tokens(entries):
        return sum(own for _, i, _ in entries for _, own in dataset.lengths(i))

    shares = [[entry
               for piece in dataset.micro_batches(entries, 9, rank, 2)
               for entry in piece]
              for rank in range(2)]
    whole = loss(entries, tokens(entries))
    assert tokens(shares[0]) != tokens(shares[1])
    assert sum(loss(share, tokens(entries)) for share in shares) == pytest.approx(whole, rel=1e-12)
    assert sum(loss(share, tokens(share)) for share in shares) / 2 != pytest.approx(whole, rel=1e-3)
