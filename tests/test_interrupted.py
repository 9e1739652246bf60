"""What may befall train.py: signals to all of its processes, a full disk, a damaged save, and going
on with other flags."""

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
import torch
from mini import (
    MINI,
    SECONDS,
    command,
    full_disk,
    logged,
    refused,
    same,
    started_by,
    train_here,
)
from test_weights import other_part

import train
from diffa2_mini import weights
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.data import read_manifest
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate.answers import Respondent
from diffa2_mini.training import files
from diffa2_mini.training.checkpoint import export, load_checkpoint, save_checkpoint
from diffa2_mini.training.features import FeatureCache
from diffa2_mini.training.loader import worker_has_died
from diffa2_mini.training.options import parse_arguments
from diffa2_mini.training.processes import World
from diffa2_mini.training.run import Signals

pytest.importorskip("resource")  # Windows has no such limits, nor groups of processes
linux = pytest.mark.skipif(not sys.platform.startswith("linux"),
                           reason="Linux lists processes under /proc")


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
    """A process of its own group that trains, once it has logged a step; those that load audio are
    its copies, and so have its command line."""
    process = subprocess.Popen(arguments, env=started_by("fork", out.parent), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    log = out / "log.jsonl"
    assert until(lambda: process.poll() is not None or log.exists() and log.stat().st_size, SECONDS)
    assert process.poll() is None, process.communicate()[1][-2000:]
    return process


LONG = [
    "--stage", "1", "--steps", "100000", "--save-every", "100000", "--sample-every", "100000",
    "--workers", "1", "--no-cache-audio"]


@linux
@pytest.mark.slow
def test_a_signal_to_the_whole_group_spares_those_that_load_audio_until_it_is_saved(
        world, tmp_path):
    process = started(command(world, tmp_path / "a run", *LONG), tmp_path / "a run")
    os.killpg(process.pid, signal.SIGTERM)
    printed, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in error, error
    hint = shlex.split(printed.splitlines()[-1].partition("go on with: ")[2])
    assert hint == ["python", *command(world, tmp_path / "a run", *LONG)[1:], "--resume"]
    state = load_checkpoint(tmp_path / "a run" / "stage1.safetensors")
    assert state.step == len(logged(tmp_path / "a run")) and not state.done
    assert until(lambda: not processes(tmp_path), SECONDS)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_while_those_that_load_audio_start_spares_them(
        world, tmp_path, method, signum):
    out = tmp_path / "out"
    process = subprocess.Popen(command(world, out, *LONG), env=started_by(method, tmp_path),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)

    def starting():
        with suppress(ProcessLookupError):  # another program's, which has just ended
            return any(os.getpgid(pid) == process.pid
                       for pid in processes(f"multiprocessing.{method}"))

    assert until(starting, SECONDS)
    time.sleep(0.3)  # it imports torch now, for a second or more
    os.killpg(process.pid, signum)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signum and "Traceback" not in error, error
    assert load_checkpoint(out / "stage1.safetensors").step == len(logged(out)) >= 1


@linux
@pytest.mark.slow
def test_those_that_load_audio_end_with_a_run_that_is_killed(world, tmp_path):
    process = started(command(world, tmp_path, *LONG), tmp_path)
    assert len(processes(tmp_path)) == 2
    process.kill()
    process.communicate(timeout=SECONDS)
    assert until(lambda: not processes(tmp_path), SECONDS)


@linux
def test_a_killed_process_that_loads_audio_is_one_line(world, tmp_path):
    process = started(command(world, tmp_path, *LONG), tmp_path)
    (loads,) = processes(tmp_path) - {process.pid}
    os.kill(loads, signal.SIGKILL)
    error = process.communicate(timeout=SECONDS)[1].splitlines()[-1]
    assert process.returncode == 2 and "--workers 0" in error
    assert error.startswith("error: a process that loads audio has ended")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_ends_a_run_saves_first(number, world, tmp_path, monkeypatch, handlers,
                                                  capsys):
    """SIGHUP is what a terminal that is closed sends."""
    step = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step",
                        lambda *args: os.kill(os.getpid(), number) or step(*args))
    with pytest.raises(SystemExit) as ended:
        train.main(["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI])
    state = load_checkpoint(tmp_path / "stage1.safetensors")
    assert ended.value.code == 128 + number and (state.step, state.done) == (1, False)
    assert "stopped; all steps made are saved; go on with" in capsys.readouterr().out


def test_what_is_started_with_nohup_outlives_its_terminal(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    caught = Signals(ignore_second=False)
    caught.catch()
    os.kill(os.getpid(), signal.SIGHUP)
    assert caught.received is None


@pytest.mark.parametrize("error, ended", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), True),
    (ConnectionResetError(104, "Connection reset by peer"), True), (EOFError(), True),
    (RuntimeError("received 0 items of ancdata"), True),
    (OSError("got end of file during message"), True),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nshapes do not fit"), False),
    (torch.OutOfMemoryError("CUDA out of memory"), False),
    (FileNotFoundError(2, "No such file", "a.wav"), False)])
def test_a_process_that_has_ended_is_told_from_one_whose_work_fails(error, ended):
    assert worker_has_died(error) == ended


@pytest.mark.parametrize("during", ["encoding", "a sample", "the measurement at the end"])
def test_a_signal_while_no_step_is_made_is_heeded_and_resuming_is_right(
        during, world, whole, tmp_path, monkeypatch, handlers):
    flags = ["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI]
    on, name, n = {
        "encoding": (FeatureCache, "get", 2), "a sample": (Respondent, "answer", 1)
    }.get(during, (Respondent, "answer", 2))
    function, calls = getattr(on, name), []

    def signalled(*args, **options):
        calls.append(args)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **options)

    monkeypatch.setattr(on, name, signalled)
    with pytest.raises(SystemExit) as ended:
        train.main(flags)
    assert ended.value.code == 128 + signal.SIGTERM and len(calls) == n
    path = tmp_path / "stage1.safetensors"
    assert path.exists() == (during != "encoding")
    if during != "encoding":
        saved = load_checkpoint(path)
        assert (saved.step, saved.done) == (3 if during == "a sample" else 4, False)
    monkeypatch.undo()
    train.main([*flags, "--resume"])
    assert same(tmp_path, whole[0], stages=(1,))


def begun(whole, out):
    """A run that was stopped in the middle of stage 1."""
    out.mkdir(exist_ok=True)
    return Path(shutil.copy(whole[0] / "stage1.previous.safetensors", out / "stage1.safetensors"))


@pytest.mark.parametrize("limit, what", [(1000, "config.json"), (1_000_000, "stage1.safetensors")])
def test_a_disk_that_is_full_ends_a_run_with_one_line_and_harms_nothing(
        limit, what, world, whole, tmp_path, capsys):
    path = begun(whole, tmp_path)
    before = path.read_bytes()
    with full_disk(limit):
        assert run_script(train.main, command(world, tmp_path, "--stage", "1", "--resume")[2:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{what}: could not be written" in error and "free some space" in error
    assert path.read_bytes() == before and load_checkpoint(path).step == 2
    assert {file.name
            for file in tmp_path.iterdir()} <= {
                ".lock", "config.json", "log.jsonl", "stage1.safetensors"}
    assert what == "config.json" or json.loads((tmp_path / "config.json").read_text())


def test_a_resumed_run_falls_back_to_the_save_before(world, whole, tmp_path, capsys):
    out = shutil.copytree(whole[0], tmp_path / "out")
    damaged = bytearray((out / "stage1.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "stage1.safetensors").write_bytes(damaged)
    train_here(world, out, "--resume")
    printed = capsys.readouterr().out
    assert "checksum" in printed and "going on from the save before, step 2" in printed
    assert "stage 4 is done" in printed
    # stage 1 is logged again, at the end
    assert all(same(out, whole[0], stages=(number,)) for number in (1, 2, 3, 4))


def other_manifest(world, folder):
    """The small world with one word changed; its clips are where they were."""
    rows = [row | {"audio_filepath": str(world / row["audio_filepath"])}
            for row in read_manifest(world / "stage1.json")]
    rows[0]["transcription"] += " nine"
    (folder / "stage1.json").write_text(json.dumps(rows))
    return folder


SETTINGS = [(["--seed", "7"], "was trained with seed 42, got 7"),
            (["--batch-size", "4"], "was trained with batch size 3, got 4"),
            (["--lr", "0.5"], f"was trained with lr {SIZES['toy'][1][1].lr}, got 0.5"),
            (["--steps", "8"], "was trained with steps 4, got 8"),
            (["--warmup", "2"], "was trained with warmup 1, got 2"),
            (["--dtype", "bfloat16"], "was trained with dtype float32, got bfloat16"),
            (["--whisper", "OTHER"], "was trained with another encoder (--whisper)"),
            (["--llada", "OTHER"], "was trained with another backbone (--llada)"),
            (["--data", "OTHER"], "was trained with another manifest (--data)"),
            (["--init", "OTHER"], "was trained with another start (--init")]


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("flags, message", SETTINGS)
def test_a_run_does_not_go_on_as_another(flags, message, done, world, whole, tmp_path, capsys):
    out, other = tmp_path / "out", {"--data": lambda: other_manifest(world, tmp_path),
                                    "--init": lambda: whole[0] / "stage2.safetensors"}
    path = begun(whole, out)
    if done:
        shutil.copy(whole[0] / "stage1.safetensors", path)
    if flags[1] == "OTHER":
        part = tmp_path / "part.safetensors"
        flags = [flags[0], str(other.get(flags[0], lambda: other_part(flags[0][2:], part))())]
    arguments = ["--stage", 1, "--resume", "--data", world, "--out", out, *MINI, *flags]
    assert message in refused(train.main, capsys, *arguments)
    assert {file.name for file in out.iterdir()} <= {".lock", path.name}  # no config.json above all


def test_a_copy_of_data_and_parts_elsewhere_is_the_same(world, whole, tmp_path):
    begun(whole, tmp_path / "out")
    shutil.copy(whole[0] / "log.jsonl", tmp_path / "out")
    shutil.copytree(world, tmp_path / "moved")
    flags = ["--stage", "1", "--resume", "--grad-accum", "1"]
    for part in ("whisper", "llada"):
        copied = shutil.copy(weights.SHIPPED[part], tmp_path / f"my_{part}.safetensors")
        flags += [f"--{part}", str(copied)]
    train_here(tmp_path / "moved", tmp_path / "out", *flags)
    assert same(tmp_path / "out", whole[0], stages=(1,))


def test_preferences_go_on_against_their_own_reference(world, whole, tmp_path, capsys):
    shutil.copy(whole[0] / "log.jsonl", tmp_path)
    shutil.copy(whole[0] / "stage4.previous.safetensors", tmp_path / "stage4.safetensors")
    arguments = ["--stage", "4", "--resume"]
    assert "no such file" in refused(train.main, capsys, *command(world, tmp_path, *arguments)[2:])
    before = load_checkpoint(whole[0] / "stage3.safetensors")
    next(iter(before.model.values())).view(-1)[0] += 1
    save_checkpoint(tmp_path / "stage3.safetensors", before)  # another stage 3, in --out
    error = refused(train.main, capsys, *command(world, tmp_path, *arguments)[2:])
    assert "another start (--init" in error
    train_here(world, tmp_path, *arguments, "--init", str(whole[0] / "stage3.safetensors"))
    assert same(tmp_path, whole[0], stages=(4,))


def test_a_run_that_is_done_keeps_its_config_and_is_tested_as_it_is(world, whole, tmp_path, capsys):
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = (out / "config.json").read_bytes()
    for number in (1, 2, 3, 4):
        (out / f"stage{number}.previous.safetensors").unlink()
    train_here(world, out, "--resume", "--test", str(world / "validation.json"))
    table = capsys.readouterr().out.partition("validation.json\n")[2].partition("curves")[0]
    assert "questions: open" in table and table.partition("ask it")[0] in whole[1]
    assert (out / "config.json").read_bytes() == before
    (out / "log.jsonl").unlink()
    train_here(world, out, "--resume")  # has nothing to draw


@linux
@pytest.mark.parametrize("start", ["stage2.safetensors", "published.bin",
                                   pytest.param("published.safetensors", marks=pytest.mark.slow)])
def test_nothing_that_a_run_replaces_is_mapped(start, world, whole, tmp_path, monkeypatch):
    """Windows replaces no such file."""
    replaced, replace = set(), os.replace

    def watched(source, target):
        maps = Path("/proc/self/maps").read_text()
        for path in (source, target):
            assert str(path) not in maps, path
        replaced.add(Path(target).name)
        return replace(source, target)

    path = tmp_path / start
    if start.startswith("published"):
        export(whole[0] / "stage2.safetensors", path)
    else:
        shutil.copy(whole[0] / start, path)
    shutil.copy(whole[0] / "stage3.previous.safetensors", tmp_path / "stage3.safetensors")
    monkeypatch.setattr(files.os, "replace", watched)
    flags = [] if start == "stage2.safetensors" else ["--diffa2", str(path)]
    if flags:
        (tmp_path / "stage3.safetensors").unlink()
    train_here(world, tmp_path, "--stage", "3", *flags, *([] if flags else ["--resume"]))
    assert {"stage3.safetensors", "config.json", "log.jsonl"} <= replaced
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps
    assert str(weights.SHIPPED["whisper"].parent) not in maps  # stage 0 may write there


class Another(World):
    """A world in which another process sees other things."""

    def gather(self, items):
        if [type(item) for item in items] != [self.apart]:
            return items
        return [*items, [(1, 2, False)] if self.apart is list else 5]


@pytest.mark.parametrize("type, message", [(list, "the processes see different checkpoints"),
                                           (int, "the processes see different examples")])
def test_processes_that_see_different_things_do_not_train(type, message, world, tmp_path):
    apart = Another()
    object.__setattr__(apart, "apart", type)
    args = parse_arguments(
        ["--stage", "1", "--resume", "--data", str(world), "--out", str(tmp_path), *MINI], "")
    with ExitStack() as held, pytest.raises(UserError, match=message):
        train.train(args, apart, held)


@pytest.mark.parametrize("size, others, message", [
    ("2", {}, "without LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT, RANK;"),
    ("2", {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
           "MASTER_PORT": "1234", "RANK": "a"}, "without RANK;"),
    ("x", {}, "got 'x'"), ("0", {}, "got '0'")])
def test_what_torchrun_has_not_started_is_one_line(size, others, message, world, tmp_path,
                                                   monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": size, **others}.items():
        monkeypatch.setenv(name, value)
    assert run_script(train.main,
                      ["--data", str(world), "--out", str(tmp_path / "out"), *MINI]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
