"""Several processes train the model that one would: the same batches, the same loss over all of a batch, the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from diffa2_mini import checkpoint
from diffa2_mini.config import SIZES
from diffa2_mini.data import Collate, read_manifest, load_examples
from diffa2_mini.ears import Ears
from diffa2_mini.loader import batches
from diffa2_mini.objective import answer_loss
from diffa2_mini.weights import build, load_tokenizer
from mini import ROOT
from test_interrupted import processes, started, until

CONFIG, STAGES = SIZES["toy"]
STEPS = ["--steps", "5", "--batch-size", "6", "--warmup", "1", "--threads", "1", "--lora-dropout", "0", "--save-every", "3"]


@pytest.fixture(scope="session")
def manifests(world):
    """The small world, with two questions to measure on."""
    rows = [{name: value for name, value in row.items() if name != "rejected"} for row in read_manifest(world / "validation.json")]
    (world / "few.json").write_text(json.dumps(rows[:2]))
    return world


def command(n, manifests, out, *extra, dtype="float64"):
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
    return [sys.executable, *start, str(ROOT / "train.py"), "--data", str(manifests), "--validation", str(manifests / "few.json"),
            "--out", str(out), *STEPS, "--dtype", dtype, *extra]


def run(n, manifests, out, *extra, **dtype):
    """train.py in n processes; what it prints."""
    done = subprocess.run(command(n, manifests, out, *extra, **dtype), capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def apart(out, other, stage):
    """How far the weights of two runs are apart after a stage, at most."""
    a, b = (checkpoint.load(folder / f"stage{stage}.safetensors") for folder in (out, other))
    assert a.done and b.done and a.model.keys() == b.model.keys()
    return max(float((a.model[name] - b.model[name]).abs().max()) for name in a.model)


@pytest.fixture(scope="session")
def alone(manifests, tmp_path_factory):
    """A run of one process: this one."""
    out = tmp_path_factory.mktemp("parallel") / "alone"
    train.main(command(1, manifests, out)[2:])
    return out


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_end_at_the_weights_of_one(n, manifests, alone, tmp_path):
    printed = run(n, manifests, tmp_path)
    assert all(apart(alone, tmp_path, stage) < 1e-9 for stage in (1, 2, 3, 4))
    rows, expected = ([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (tmp_path, alone))
    assert [(row["stage"], row["step"]) for row in rows] == [(row["stage"], row["step"]) for row in expected]  # each once
    assert [row.get("loss", 0.0) for row in rows] == pytest.approx([row.get("loss", 0.0) for row in expected], rel=1e-9)
    assert printed.count("stage 1, semantic alignment") == 1 and f"{n} processes" in printed
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_split_backbone_changes_nothing(n, stage, manifests, alone, tmp_path):
    start = ["--init", str(alone / f"stage{stage - 1}.safetensors")] if stage > 1 else []
    run(n, manifests, tmp_path, "--shard", "--stage", str(stage), *start)
    assert apart(alone, tmp_path, stage) < 1e-9


@pytest.mark.slow
def test_in_float32_rounding_is_amplified_this_far(manifests, tmp_path, record_property):
    for n in (1, 2):
        run(n, manifests, tmp_path / str(n), dtype="float32")
    drifts = [apart(tmp_path / "1", tmp_path / "2", stage) for stage in (1, 2, 3, 4)]
    print("float32, one process against two, after 5 steps of each stage:", drifts)
    assert 0 < drifts[0] < 1e-3 and max(drifts) < 0.02


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(manifests, alone, tmp_path):
    before = alone / "stage1.previous.safetensors"
    assert checkpoint.load(before).step == 3
    shutil.copy(before, tmp_path / "stage1.safetensors")
    run(3, manifests, tmp_path, "--stage", "1", "--resume")
    assert apart(alone, tmp_path, 1) < 1e-9


@pytest.mark.slow
def test_stage_0_shares_out_its_parts(world, tmp_path):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), "--stage", "0"]
    done = subprocess.run([sys.executable, *start, "--data", str(world), "--out", str(tmp_path), "--steps", "2", "--threads", "1"],
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy_whisper.safetensors").exists() and done.stdout.count("device cpu") == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(manifests, tmp_path):
    many = command(2, manifests, tmp_path, "--stage", "1", "--steps", "100000", "--sample-every", "100000")
    running = subprocess.Popen(many, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.1)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    (second,) = [int(pid) for pid in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(second, signal.SIGKILL)
    start = time.monotonic()
    _, printed = running.communicate(timeout=60)
    assert running.returncode != 0 and time.monotonic() - start < 60
    assert "process 0 of 2 has lost another" in printed and "--resume" in printed


SPLIT = """
import sys, torch
from diffa2_mini import parallel
from diffa2_mini.config import LladaConfig, LoraConfig
from diffa2_mini.llada import Llada
from diffa2_mini.lora import add_lora
with parallel.together(2) as world:
    model = Llada(LladaConfig(vocab_size=23, width=12, n_layers=3, n_heads=3, hidden=20))
    add_lora(model, LoraConfig(rank=1, alpha=1.0, targets=("q_proj",)))
    model.requires_grad_(False)
    x = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    held = lambda: sum(getattr(p, "to_local", lambda: p)().untyped_storage().nbytes() for p in model.blocks.parameters())
    for p in model.parameters():
        torch.distributed.broadcast(p.data, 0)
    whole, expected = held(), model(x)
    parallel.shard(model.blocks, world, torch.device("cpu"))
    [p.detach().numpy() for name, p in model.named_parameters() if "lora_" in name]  # whole, though it is frozen
    before, y = held(), model(x)
    after = held()
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    print(whole, before, after, held())
"""


@pytest.mark.slow
def test_split_blocks_hold_half_and_come_together_one_at_a_time(tmp_path):
    (tmp_path / "split.py").write_text(SPLIT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "split.py")],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    whole, *held = map(int, done.stdout.split())
    assert all(each < 0.6 * whole for each in held)  # before, after the forward pass, after the backward pass


PATIENT = """
import sys, time
from datetime import timedelta
from diffa2_mini import parallel
from diffa2_mini.config import run_script
parallel.HASTE = timedelta(seconds=2)
def main(argv):
    with parallel.together(2) as world:
        time.sleep(0 if world.first else 5)
        world.wait()
        assert world.gather([world.rank]) == [0, 1] and world.total({"a": 1.0}) == {"a": 2.0}
        print("waited", flush=True)
        time.sleep(0 if world.first else 30)
        world.total({"a": 1.0})
start = time.monotonic()
code = run_script(main, [])
print("after", time.monotonic() - start, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_processes_wait_for_one_another_but_not_within_a_step(tmp_path):
    (tmp_path / "patient.py").write_text(PATIENT)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "patient.py")],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and done.stdout == "waited\n"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: process 0 of 2 has lost another")]
    assert "hangs" in line and "Timed out" in line  # what torch says of it


@pytest.mark.slow
def test_torchrun_that_is_told_to_stop_saves_and_leaves_nobody_behind(manifests, tmp_path):
    many = command(2, manifests, tmp_path, "--stage", "1", "--steps", "100000", "--sample-every", "100000", "--save-every", "100000",
                   "--workers", "1", "--no-cache-audio")
    running = started(many, tmp_path)
    assert len(processes(tmp_path)) == 5  # torchrun, two that train, two that load audio
    os.kill(running.pid, signal.SIGTERM)
    printed, error = running.communicate(timeout=60)
    assert printed.splitlines()[-1] == "stopped and saved; go on with: the same torchrun command and --resume"
    assert "DataLoader" not in error and running.returncode != 0
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert checkpoint.load(tmp_path / "stage1.safetensors").step == len(rows)
    assert until(lambda: not processes(tmp_path), 10)


@pytest.mark.slow
def test_pieces_and_recomputing_change_nothing(manifests, alone, tmp_path):
    run(2, manifests, tmp_path, "--stage", "4", "--init", str(alone / "stage3.safetensors"), "--grad-accum", "3", "--recompute", "blocks")
    assert apart(alone, tmp_path, 4) < 1e-9


@pytest.mark.slow
def test_three_processes_are_followed_by_two(manifests, alone, tmp_path):
    start = ["--stage", "3", "--init", str(alone / "stage2.safetensors")]
    run(3, manifests, tmp_path / "three", *start)
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "three" / "stage3.previous.safetensors", tmp_path / "two" / "stage3.safetensors")
    assert checkpoint.load(tmp_path / "two" / "stage3.safetensors").step == 3
    run(2, manifests, tmp_path / "two", *start, "--resume")
    assert apart(alone, tmp_path / "two", 3) < 1e-9


@pytest.fixture(scope="module")
def collate(world):
    examples = load_examples(world / "sft.json", STAGES[2], CONFIG, False, print)
    return Collate(examples, 0, STAGES[2], CONFIG, load_tokenizer(CONFIG), load=False)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_example_is_dealt_out_exactly_once_an_epoch(collate, size):
    n, batch_size = len(collate.data), 7
    assert n % batch_size and batch_size % 2
    n_epochs = 3
    dealt = [pair for _, pairs in batches(n, batch_size, n * n_epochs // batch_size + 1, 0, 0, 2)
             for rank in range(size) for piece in collate.cut(pairs, 2, rank, size) for pair in piece]
    counts = {pair: dealt.count(pair) for pair in dealt}
    assert {*counts.values()} == {1} and {(e, i) for e in range(n_epochs) for i in range(n)} <= counts.keys()


@torch.no_grad()
def test_the_loss_is_normalised_over_the_whole_batch(collate):
    """An average of the processes' averages is another number, as they have different numbers of tokens."""
    model = build(CONFIG, dtype=torch.float64)
    ears, (_, pairs) = Ears(model, torch.device("cpu"), torch.float64, keep=True), next(batches(len(collate.data), 9, 1, 0, 0, 2))

    def loss(pairs, n_tokens):
        return float(answer_loss(model, collate[pairs].heard(ears, ears.device), STAGES[2], collate.tokenizer, n_tokens))

    def tokens(pairs):
        return sum(own for _, i in pairs for _, own in collate.lengths(i))

    shares = [[pair for piece in collate.cut(pairs, 9, rank, 2) for pair in piece] for rank in range(2)]
    whole = loss(pairs, tokens(pairs))
    assert tokens(shares[0]) != tokens(shares[1])
    assert sum(loss(share, tokens(pairs)) for share in shares) == pytest.approx(whole, rel=1e-12)
    assert sum(loss(share, tokens(share)) for share in shares) / 2 != pytest.approx(whole, rel=1e-3)
