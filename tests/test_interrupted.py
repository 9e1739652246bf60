"""What may befall train.py: signals to all of its processes, a full disk, a damaged save, and going on with other flags."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import train
from diffa2_mini import checkpoint
from diffa2_mini.config import UserError, run_script
from diffa2_mini.ears import Ears
from diffa2_mini.options import parse_arguments
from diffa2_mini.parallel import World
from mini import MINI, command, logged, same, train_here

resource = pytest.importorskip("resource")  # Windows has no such limits, nor groups of processes
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux lists processes under /proc")


def processes(out):
    """The processes whose command line names a folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found |= {int(path.parent.name)} if str(out).encode() in path.read_bytes() else set()
    return found


def until(condition, seconds):
    """Wait for a condition, for so long at most; whether it came."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def started(arguments, out):
    """A process of its own group that trains, once it has logged a step."""
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    log = out / "log.jsonl"
    assert until(lambda: process.poll() is not None or log.exists() and log.stat().st_size, 120) and process.poll() is None
    return process


LONG = ["--stage", "1", "--steps", "100000", "--save-every", "100000", "--sample-every", "100000", "--workers", "1", "--no-cache-audio"]


@linux
@pytest.mark.slow
def test_a_signal_to_the_whole_group_spares_those_that_load_audio_until_it_is_saved(world, tmp_path):
    process = started(command(world, tmp_path / "a run", *LONG), tmp_path / "a run")
    os.killpg(process.pid, signal.SIGTERM)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in error, error
    hint = shlex.split(printed.splitlines()[-1].partition("go on with: ")[2])
    assert hint == ["python", "train.py", *command(world, tmp_path / "a run", *LONG)[2:], "--resume"]
    state = checkpoint.load(tmp_path / "a run" / "stage1.safetensors")
    assert state.step == len(logged(tmp_path / "a run")) and not state.done
    assert until(lambda: not processes(tmp_path), 10)


@linux
@pytest.mark.slow
def test_those_that_load_audio_end_with_a_run_that_is_killed(world, tmp_path):
    process = started(command(world, tmp_path, *LONG), tmp_path)
    assert len(processes(tmp_path)) == 2
    process.kill()
    process.communicate(timeout=60)
    assert until(lambda: not processes(tmp_path), 20)


@linux
def test_a_killed_process_that_loads_audio_is_one_line(world, tmp_path):
    process = started(command(world, tmp_path, *LONG), tmp_path)
    (loads,) = processes(tmp_path) - {process.pid}
    os.kill(loads, signal.SIGKILL)
    error = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 2 and error.startswith("error: a process that loads audio has ended") and "--workers 0" in error


@pytest.fixture
def handlers():
    """Signals do afterwards what they did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("during", ["listening", "a sample", "the measurement at the end"])
def test_a_signal_while_no_step_is_made_is_heeded_and_resuming_is_right(during, world, whole, tmp_path, monkeypatch, handlers):
    flags = ["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI]
    on, name, n = {"listening": (Ears, "listen", 2), "a sample": (train.answers, "answer", 1)}.get(during, (train.answers, "answer", 2))
    function, calls = getattr(on, name), []

    def signalled(*args):
        calls.append(args)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(on, name, signalled)
    with pytest.raises(SystemExit) as ended:
        train.main(flags)
    assert ended.value.code == 128 + signal.SIGTERM and len(calls) == n
    path = tmp_path / "stage1.safetensors"
    assert path.exists() == (during != "listening")
    assert during == "listening" or (checkpoint.load(path).step, checkpoint.load(path).done) == (3 if during == "a sample" else 4, False)
    monkeypatch.undo()
    train.main([*flags, "--resume"])
    assert same(tmp_path, whole[0], stages=(1,))


def begun(whole, out):
    """A run that was stopped in the middle of stage 1."""
    out.mkdir(exist_ok=True)
    return Path(shutil.copy(whole[0] / "stage1.previous.safetensors", out / "stage1.safetensors"))


@pytest.mark.parametrize("limit, what", [(1000, "config.json"), (1_000_000, "stage1.safetensors")])
def test_a_disk_that_is_full_ends_a_run_with_one_line_and_harms_nothing(limit, what, world, whole, tmp_path, capsys):
    path = begun(whole, tmp_path)
    before = path.read_bytes()
    none, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        assert run_script(train.main, command(world, tmp_path, "--stage", "1", "--resume")[2:]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (none, most))
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{what}: could not be written" in error and "free some space" in error
    assert path.read_bytes() == before and checkpoint.load(path).step == 2
    assert {file.name for file in tmp_path.iterdir()} <= {".lock", "config.json", "log.jsonl", "stage1.safetensors"}
    assert what == "config.json" or json.loads((tmp_path / "config.json").read_text())


def test_a_resumed_run_falls_back_to_the_save_before(world, whole, tmp_path, capsys):
    out = shutil.copytree(whole[0], tmp_path / "out")
    damaged = bytearray((out / "stage1.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "stage1.safetensors").write_bytes(damaged)
    train_here(world, out, "--resume")
    printed = capsys.readouterr().out
    assert "checksum" in printed and "going on from the save before, step 2" in printed and "stage 4 is done" in printed
    assert all(same(out, whole[0], stages=(number,)) for number in (1, 2, 3, 4))  # stage 1 is logged again, at the end


@pytest.mark.parametrize("flags, message", [(["--seed", "7"], "was begun with seed 42, got 7"),
                                            (["--batch-size", "4"], "was begun with batch size 3, got 4")])
def test_a_run_does_not_go_on_with_another_order_of_examples(flags, message, world, whole, tmp_path, capsys):
    begun(whole, tmp_path)
    arguments = ["--stage", "1", "--resume", "--data", str(world), "--out", str(tmp_path), *MINI, *flags]
    assert run_script(train.main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


class Another(World):
    """A world in which another process sees other things."""

    def gather(self, items):
        return items + [[(1, 2, False)] if isinstance(items[0], list) else 5] if [*map(type, items)] == [self.apart] else items


@pytest.mark.parametrize("type, message", [(list, "the processes see different checkpoints"), (int, "the processes see different examples")])
def test_processes_that_see_different_things_do_not_train(type, message, world, tmp_path):
    apart = Another()
    object.__setattr__(apart, "apart", type)
    args = parse_arguments(["--stage", "1", "--resume", "--data", str(world), "--out", str(tmp_path), *MINI], "")
    with ExitStack() as held, pytest.raises(UserError, match=message):
        train.train(args, apart, held)


@pytest.mark.parametrize("size, message", [("2", "without RANK, LOCAL_RANK, LOCAL_WORLD_SIZE"), ("x", "got 'x'"), ("0", "got '0'")])
def test_what_torchrun_has_not_started_is_one_line(size, message, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert run_script(train.main, ["--data", str(world), "--out", str(tmp_path / "out"), *MINI]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
