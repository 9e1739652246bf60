"""What breaks in a run harms nothing: damaged saves, a full disk, two runs in one folder, figures
that are not finite."""

import json
import math
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from mini import ROOT, full_disk

from diffa2_mini import weights
from diffa2_mini.command.script import run_script
from diffa2_mini.errors import UserError
from diffa2_mini.training import files
from diffa2_mini.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_diffa2,
)
from diffa2_mini.training.files import write_whole
from diffa2_mini.training.folder import Log, finite
from diffa2_mini.training.processes import has_lost_another
from diffa2_mini.view.curves import draw_curves
from diffa2_mini.weights import trained_tensors

posix = pytest.mark.skipif(sys.platform == "win32", reason="no limit to the size of files")


def save(path, model, step):
    save_checkpoint(path, Checkpoint(model.config, 1, step, False, trained_tensors(model)),
                    keep=files.keep_previous)


def test_a_damaged_save_gives_way_to_the_one_before(tmp_path, model, capsys):
    path = tmp_path / "stage1.safetensors"
    for step in (1, 2, 3):
        save(path, model, step)
    assert files.load_last(path, load_checkpoint).step == 3
    assert capsys.readouterr().out == ""
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    before = files.previous(path).read_bytes()
    assert before != bytes(damaged)  # a second name of the save, not of its place
    assert files.load_last(path, load_checkpoint).step == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "checksum" in printed and "from the save before, step 2" in printed
    assert load_checkpoint(path).step == 2 and path.read_bytes() == before
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="checksum"):  # none before it
        files.load_last(path, load_checkpoint)


@posix
def test_a_disk_that_is_full_leaves_the_last_save(tmp_path, model, capsys):
    path = tmp_path / "stage1.safetensors"
    save(path, model, 0)
    save(path, model, 1)
    before = path.read_bytes()
    with full_disk(len(before) // 2):
        assert run_script(lambda argv: save(path, model, 2), []) == 2
    error = capsys.readouterr().err
    assert "could not be written" in error and "free some space" in error and error.count("\n") == 1
    assert path.read_bytes() == before and load_checkpoint(path).step == 1
    assert load_checkpoint(files.previous(path)).step == 0
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_is_full_is_told_of_a_bin_file_too(tmp_path, monkeypatch):
    def full(*args):  # as torch says it
        raise RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 640 vs 534\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
            UserError,
            match=r"a.bin: could not be written \(.*unexpected pos 640 vs 534\); free some"):
        save_diffa2({"semantic_connector.fc1.bias": torch.ones(2)}, tmp_path / "a.bin")


def test_memory_that_is_full_is_not_told_as_another_thing(tmp_path, monkeypatch):
    """As a full disk, a damaged file, or a process that is lost."""
    def exhausted(*args, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(torch.OutOfMemoryError):
        write_whole(tmp_path / "a.bin", exhausted)
    monkeypatch.setattr(torch, "save", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        save_diffa2({"semantic_connector.fc1.bias": torch.ones(2)}, tmp_path / "a.bin")
    monkeypatch.setattr(torch, "load", exhausted)
    (tmp_path / "b.bin").write_bytes(b"PK")
    with pytest.raises(torch.OutOfMemoryError):
        weights.unpickle(tmp_path / "b.bin", "weights")
    assert not has_lost_another(RuntimeError("NCCL Error 1: unhandled cuda error: out of memory"))
    assert has_lost_another(
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert [path.name for path in tmp_path.iterdir()] == ["b.bin"]


def test_a_disk_without_second_names_gets_a_copy(tmp_path, model, monkeypatch):
    def refuse(*names):
        raise OSError(1, "Operation not permitted")

    path = tmp_path / "stage1.safetensors"
    monkeypatch.setattr(files.os, "link", refuse)
    for step in (1, 2, 3):
        save(path, model, step)
    assert load_checkpoint(path).step == 3
    assert load_checkpoint(files.previous(path)).step == 2


@posix
@pytest.mark.parametrize("which", ["log", "nonfinite"])
def test_a_log_on_a_full_disk_ends_with_one_line(tmp_path, which, capsys):
    def write(argv):
        for step in range(100):
            if which == "log":
                Log(tmp_path / "log.jsonl").add(stage=1, step=step)
            else:
                row = {"stage": 1, "step": step, "loss": 0, "grad_norm": 0}
                Log(tmp_path / "log.jsonl").note_nonfinite(row, ["a.wav"], skip=True)

    with full_disk(100):
        assert run_script(write, []) == 2
    error = capsys.readouterr().err
    assert f"{which}.jsonl: could not be written" in error and "free some space" in error
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error


HOLD = """
import sys
from pathlib import Path
from diffa2_mini.training import files
held = files.lock(Path(sys.argv[1]), *sys.argv[2:])
print("held", flush=True)
input()
"""


@contextmanager
def held(out, *name):
    """Another process holds the folder, or a file of this name in it."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out), *name], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "held\n"
        yield
        other.kill()


def test_a_folder_holds_one_run(tmp_path):
    out = tmp_path / "run"
    with held(out), pytest.raises(UserError, match="another run is writing here"):
        files.lock(out)
    (out / ".stage1.safetensors.7.tmp").write_text("half of it")
    (out / ".mine.tmp").write_text("of another program")
    files.lock(out).close()
    assert sorted(path.name for path in out.iterdir()) == [".lock", ".mine.tmp"]


def test_a_file_holds_one_run_and_its_neighbours_others(tmp_path):
    with held(tmp_path, "a[1].jsonl"):
        with pytest.raises(UserError, match="jsonl: another run is writing here"):
            files.lock(tmp_path, "a[1].jsonl")
        (tmp_path / ".a[1].jsonl.7.tmp").write_text("half of it")
        files.lock(tmp_path, "b.jsonl").close()
        files.lock(tmp_path, "a").close()  # whose name is the beginning of the other's
        assert (tmp_path / ".a[1].jsonl.7.tmp").exists()  # the other run may be writing it
    files.lock(tmp_path, "a[1].jsonl").close()
    assert not (tmp_path / ".a[1].jsonl.7.tmp").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_written_down(tmp_path, bad, name):
    row = {"stage": 1, "step": 5, "loss": 1.0, "grad_norm": 2.0}
    assert finite(row) and not finite(row | {name: bad})
    log = Log(tmp_path / "log.jsonl")
    log.note_nonfinite(row | {name: bad}, ["a.wav", "b.wav"], skip=True)
    with pytest.raises(UserError, match="stage 1, step 6: .*--skip-nonfinite"):
        log.note_nonfinite(row | {"step": 6, name: bad}, ["c.wav"], skip=False)
    rows = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [(row["step"], row["clips"]) for row in rows] == [
        (5, ["a.wav", "b.wav"]), (6, ["c.wav"])]
    assert rows[0][name] == str(bad)


def test_the_log_forgets_half_lines_and_what_came_after_a_save(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.add(stage=1, step=step)
    with open(log.path, "a") as file:
        file.write('{"stage": 1, "st')
    log.forget_after(1, 2)
    log.add(stage=1, step=3)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]
    log.add(stage=2, step=9)  # this stage is done, when the one before goes back to an earlier save
    log.forget_after(1, 1)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 9]


FOREIGN = ["", "note to self: worked", "[]", "null", "7", '"stage"', "{}", '{"stage": 1}',
           '{"step": 2}', '{"stage": "1", "step": 2}', '{"stage": [1], "step": {}}',
           '{"stage": true, "step": 1}', '{"stage": 1, "step": 1.5}',
           '{"stage": null, "step": null}',
           "[" * 100_000, "9" * 10_000, '{"stage": 1, "step": 1' + "0" * 400 + "}", "\u2028\x85"]
ODD = ['{"stage": 1, "step": 2, "loss": "low"}',
       '{"stage": 1, "step": 2, "loss": {}, "open": [1], "wer": null}',
       '{"stage": 1, "step": 2, "loss": 1' + "0" * 400 + ', "open": NaN, "wer": -Infinity}',
       '{"stage": 7, "step": -1}']


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    def refuse(constant):
        raise ValueError(constant)

    log = Log(tmp_path / "log.jsonl")
    log.add(stage=1, step=1, loss=math.nan, grad_norm=-math.inf, wer=0.5)
    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert row == {"stage": 1, "step": 1, "loss": "nan", "grad_norm": "-inf", "wer": 0.5}


def test_the_curves_of_a_log_are_drawn_if_matplotlib_is_there(tmp_path):
    pytest.importorskip("matplotlib")
    log = Log(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.add(stage=1, step=step, loss=1 / step)
    assert draw_curves(log.path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_foreign_lines_of_the_log_stay_and_are_no_traceback(tmp_path):
    foreign = "\n".join(FOREIGN).encode() + b"\n\xff\xfe no text\n"
    log = Log(tmp_path / "log.jsonl")
    log.add(stage=1, step=1, loss=2.0, open=0.5)
    with open(log.path, "ab") as file:
        file.write(foreign + "\n".join(ODD).encode() + b"\n")
    drawn = draw_curves(log.path, tmp_path / "curves.png")
    assert drawn == (tmp_path / "curves.png").exists()
    log.add(stage=1, step=5, loss=1.0)
    log.forget_after(1, 1)
    kept = log.path.read_bytes()
    assert kept.count(b'"step": 1,') == 1
    assert b'"step": 5' not in kept and b'"loss": "low"' not in kept
    assert foreign in kept and kept.endswith(ODD[-1].encode() + b"\n")
    for text in (foreign, b"", None):
        log.path.unlink()
        if text is not None:
            log.path.write_bytes(text)
        assert not draw_curves(log.path, tmp_path / "none.png")
        log.forget_after(1, 1)
        assert log.path.read_bytes() == (text or b"")
