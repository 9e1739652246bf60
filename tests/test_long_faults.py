"""Faults at length: a run that is killed again and again, and a process that answers thousands of
questions."""

import json
import os
import subprocess
import sys
import time

import pytest
from mini import ROOT, SECONDS, logged

from diffa2_mini.training.checkpoint import load_checkpoint

STEPS = ["--batch-size", "2", "--warmup", "1", "--save-every", "1", "--threads", "1",
         "--sample-every", "1000"]
KILLED = """
import os, random, signal, sys, time
import train
from diffa2_mini.command.script import run_script
seconds, argv, rng = float(sys.argv[2]), sys.argv[3:], random.Random(int(sys.argv[1]))
def saving():
    return any(name.startswith(".stage") and name.endswith(".tmp") for name in os.listdir(argv[1]))
while True:  # a child that trains, until one comes to its end
    child = os.fork()
    if not child:
        os._exit(run_script(train.main, argv))
    time.sleep(rng.uniform(0.05, 0.35) * seconds)
    if rng.random() < 0.3:  # a save is short: some of the kills wait for one
        while not saving() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(1e-4)
    if os.waitpid(child, os.WNOHANG)[0]:
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed, while saving" if saving() else "killed", file=sys.stderr)
"""


def outcome(out, n_steps):
    """Weights of all stages, the optimiser's state a step before their ends, and the log."""
    names = [
        f"stage{stage}{kind}.safetensors" for stage in (1, 2, 3, 4) for kind in ("", ".previous")]
    found = [load_checkpoint(out / name) for name in names]
    assert [state.step for state in found] == [n_steps, n_steps - 1] * 4
    return [state.model | state.optimizer for state in found], logged(out)


@pytest.mark.parametrize(
    "n_steps, least",
    [pytest.param(4, 5, marks=pytest.mark.slow), pytest.param(25, 50, marks=pytest.mark.long)])
def test_a_run_killed_at_many_moments_ends_as_if_it_had_not_been(n_steps, least, world, tmp_path):
    (tmp_path / "whole").mkdir()
    few = tmp_path / "few.json"
    few.write_text(json.dumps([row | {"audio_filepath": str(world / row["audio_filepath"])}
                               for row in json.loads((world / "validation.json").read_text())[:2]]))
    there = os.environ | {"PYTHONPATH": str(ROOT)}

    def flags(name):
        return ["--out", str(tmp_path / name), "--data", str(world), "--validation", str(few),
                "--steps", str(n_steps), *STEPS]

    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags("whole")], check=True,
                   capture_output=True, timeout=SECONDS)
    seconds = time.perf_counter() - start  # the moments are shares of it, whatever the machine
    tensors, log = outcome(tmp_path / "whole", n_steps)
    n_kills = n_saving = 0
    for attempt in range(40):
        (tmp_path / str(attempt)).mkdir()
        command = [sys.executable, "-c", KILLED, str(attempt), str(seconds), *flags(str(attempt)),
                   "--resume"]
        done = subprocess.run(command, env=there, capture_output=True, text=True,
                              timeout=100 * seconds)
        assert done.returncode == 0, done.stderr
        n_kills += done.stderr.count("killed")
        n_saving += done.stderr.count("killed, while saving")
        again, log_again = outcome(tmp_path / str(attempt), n_steps)
        assert log_again == log
        for a, b in zip(tensors, again):
            assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
        if n_kills >= least and n_saving >= least // 5:
            break
    print(f"{n_kills} kills in {attempt + 1} runs, {n_saving} of them while a checkpoint was being "
          "written")
    assert n_kills >= least and n_saving >= least // 5


MANY = """
import sys
from pathlib import Path
import torch
import sample
from diffa2_mini import Diffa2
from diffa2_mini.command import flags
from diffa2_mini.audio import load_audio
torch.set_num_threads(1)
args = sample.parse_arguments(["x.wav", "--device", "cpu"])
source = flags.model_source(args)
diffa2 = Diffa2.load(source, *flags.device_and_dtype(args, source.config))
clips = sorted(Path("data/clips").glob("*.wav"))
for i in range(int(sys.argv[1])):
    samples = load_audio(clips[i % 3])[:16000 + 37 * i % 40000]
    diffa2.answer([samples], [f"How many sounds are there? {i}"], source.config.decode)
    if i >= 99 and i % 50 == 49:
        status = Path("/proc/self/status").read_text()
        print(status.split("VmRSS:")[1].split()[0])
"""


@pytest.mark.parametrize("n", [pytest.param(300, marks=pytest.mark.slow),
                               pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                    reason="Linux tells the memory of a process")
def test_many_answers_take_no_more_memory_than_a_hundred(n):
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MANY, str(n)], cwd=ROOT, capture_output=True,
                          text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    memory = [int(line) for line in done.stdout.split()]
    print(f"{memory[0] / 1024:.0f} MiB after 100 answers, at most {max(memory) / 1024:.0f} later; "
          f"{time.monotonic() - start:.0f} s")
    assert len(memory) == n // 50 - 1 and max(memory) < 1.05 * memory[0]
