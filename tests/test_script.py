"""How commands print and end: consoles that cannot show it, readers that have gone, Ctrl-C at any
moment, errors."""

import ast
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from mini import MINI, refused

import sample
import train
from diffa2_mini.command.script import EVERY, explain, progress, run_script, unread
from diffa2_mini.errors import UserError
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.training.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
END = "\n    sys.exit(run_script(main, sys.argv[1:]))\n"
SCRIPTS = sorted(path for pattern in ("*.py", "diffa2_mini/**/*.py", "data/*.py", "tutorials/*.py",
                                      "tests/*.py") for path in ROOT.glob(pattern)
                 if path.read_text(encoding="utf-8").endswith(END))
CHINESE = "一只狗叫了三声 ░"


def cp1252():
    """A console that shows neither ░ nor Chinese."""
    return io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="\n")


def printed(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.fixture
def gone():
    """A stream whose reader has gone."""
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as stream:
        yield stream


# ---------------------------------------------------------------------------------- what is printed


def test_what_a_console_cannot_show_is_escaped():
    with cp1252() as out, redirect_stdout(out):
        assert run_script(lambda argv: print(f"café {CHINESE[:1]} \udc80"), []) == 0
        assert printed(out) == "café \\u4e00 \\udc80\n"


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_help_is_shown_by_any_console(name):
    done = subprocess.run([sys.executable, str(ROOT / name), "--help"], capture_output=True,
                          timeout=120, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and done.stderr == b"" and b"usage" in done.stdout


@pytest.mark.parametrize("flag", ["--stage", "--out", "--steps", "--lr", "--diffa2"])
def test_a_flag_without_its_value_is_one_line(flag, capsys):
    assert run_script(train.main, [f"{flag}=--"]) == 2
    assert f"{flag}: expected a value, got --" in capsys.readouterr().err


def chinese(world, folder):
    """The world with every answer in Chinese."""
    for path in (world / f"{name}.json" for name in ("stage1", "validation")):
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            row |= {"audio_filepath": str(world / row["audio_filepath"])}
            row |= {name: CHINESE for name in ("target", "chosen") if name in row}
        (folder / path.name).write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_training_ends_with_a_checkpoint_whatever_the_console_shows(world, tmp_path):
    flags = [
        "--stage", "1", "--data",
        str(chinese(world, tmp_path)), "--out",
        str(tmp_path / "out"), *MINI]
    with cp1252() as out, cp1252() as err, redirect_stdout(out), redirect_stderr(err):
        assert run_script(train.main, flags) == 0
        assert "target '\\u4e00" in printed(out)
    assert load_checkpoint(tmp_path / "out" / "stage1.safetensors").done


def test_training_saves_when_its_reader_goes_on_the_way(world, tmp_path, capfd, handlers,
                                                        monkeypatch):
    flags = ["--stage", "1", "--data", str(world), "--out", str(tmp_path), *MINI]
    read, written = os.pipe()
    step, reader = train.optimizer_step, os.fdopen(read)
    monkeypatch.setattr(train, "optimizer_step", lambda *args: reader.close() or step(*args))
    with os.fdopen(written, "w") as out, redirect_stdout(out), pytest.raises(SystemExit) as ended:
        run_script(train.main, [*flags, "--sample-every", "1"])
    assert ended.value.code == 128 + 13 and "Error" not in capfd.readouterr().err
    state = load_checkpoint(tmp_path / "stage1.safetensors")
    assert (state.step, state.done) == (2, False)  # it saw that after the first step


def scored(world, tmp_path):
    """The flags of an evaluation that has its answers, in Chinese; and where its result goes."""
    rows = [{
        "id": "a", "audio_id": "a.wav", "question": CHINESE, "choices": [CHINESE, "no"],
        "answer": CHINESE, "task": CHINESE, "category": "x", "sub-category": "y",
        "difficulty": "easy", "response": "你好"}]
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return ["--benchmark", "mmau", "--score", str(path)], tmp_path / "answers.result.json"


def test_a_result_is_written_whatever_becomes_of_what_is_printed(world, tmp_path, gone, capfd):
    flags, result = scored(world, tmp_path)
    with cp1252() as out, redirect_stdout(out):
        assert run_script(evaluate.main, flags) == 0
        assert "\\u4e00" in printed(out)
    first = result.read_bytes()
    result.unlink()
    with redirect_stdout(gone):
        assert run_script(evaluate.main, flags) == 128 + 13
    assert result.read_bytes() == first and capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_log_on_a_full_disk_does_not_end_a_run(capfd):
    with open("/dev/full", "w") as full, redirect_stdout(full), redirect_stderr(full):
        assert run_script(lambda argv: [print("x" * 10_000) for _ in range(3)], []) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_answers_that_could_not_be_printed_are_not_passed_over(capfd):
    with open("/dev/full", "w") as full, redirect_stdout(full):
        assert run_script(sample.main, [str(ROOT / "data/clips/three_one_four.wav")]) == 2
    error = capfd.readouterr().err
    assert "error: expected to print it all, got" in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command, message", [
    ("short_context.py --whisper nowhere", "nowhere: expected weights of a Whisper encoder"),
    ("short_context.py --clips 0", "--clips must be from 1"),
    ("loss_variance.py --run nowhere", "stage1.safetensors: expected a checkpoint"),
    ("loss_variance.py --draws 1", "--draws must be from 2")])
def test_scripts_of_the_tutorials_tell_mistakes_in_one_line(command, message):
    done = subprocess.run([sys.executable, *f"tutorials/{command}".split()], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_an_error_is_one_line_whatever_is_in_a_name(capsys):
    assert "no such\\nfile" in refused(sample.main, capsys, "no such\nfile")


def test_a_process_without_streams_runs():
    code = ("import sys; from diffa2_mini.command.script import progress, run_script; "
            "sys.exit(run_script(lambda argv: [print(i) for i in progress([1])], []))")
    closed = 'exec "$0" -c "$1" >&- 2>&-'
    done = subprocess.run(["sh", "-c", closed, sys.executable, code], cwd=ROOT)
    assert done.returncode == 0


def test_a_bar_that_goes_to_no_terminal_is_a_line_now_and_then(monkeypatch):
    clock, err = [0.0], io.StringIO()
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with redirect_stderr(err):
        for _ in progress(range(1000), desc="steps"):
            clock[0] += 1  # so many seconds
        list(progress(range(1000), desc="soon done"))
    lines = err.getvalue().splitlines()
    assert len(lines) == 1000 // EVERY + 1 and all(line.startswith("steps: ") for line in lines)
    assert "1000/1000" in lines[-1] and "\r" not in err.getvalue()


def test_a_bar_on_a_terminal_moves():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with redirect_stderr(Terminal()) as err:
        list(progress(range(3), mininterval=0, leave=False))
    assert err.getvalue().count("\r") > 3


# ------------------------------------------------------------------------------- how a command ends


def first_of(tree):
    """The statements of a script before which nothing slow may be imported."""
    found = []
    for node in tree.body:
        alone = ast.unparse(node).startswith("if __name__ == '__main__':")
        found += node.body if alone else [node]
    return [node for node in found if isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_heeds_ctrl_c_before_it_imports_what_is_slow(path):
    for node in first_of(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and "begin(__name__)" in ast.unparse(node):
            return
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= {"sys"}
        if isinstance(node, ast.ImportFrom):
            names = ("pathlib", "script", "command.script", "diffa2_mini.command.script")
            assert node.module in names
    raise AssertionError("begin(__name__) is missing")


STUCK = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_ctrl_c_in_the_first_second_is_one_line(path, tmp_path):
    """The imports are slow: one that gets a signal stands for them."""
    for name in ("numpy", "torch", "textwrap"):
        (tmp_path / f"{name}.py").write_text(STUCK)
    inside = ROOT / "diffa2_mini" in path.parents
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    command = ["-m", name.removesuffix(".__main__")] if inside else [str(path)]
    done = subprocess.run([sys.executable, *command, "x", "y"], capture_output=True, text=True,
                          timeout=30, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


INTERRUPTED = """
import os, signal, sys, time
from diffa2_mini.command.script import begin, progress, run_script
begin(__name__)
def main(argv):
    try:
        for i in progress(range(100)):
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    finally:
        print("cleaned up")
        if argv:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
code = run_script(main, sys.argv[1:])
os.kill(os.getpid(), signal.SIGINT)  # all is said
sys.exit(code)
"""


@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_cleans_up_and_the_second_one_ends_at_once(twice):
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *["twice"] * twice],
                          capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaned up\n", "stopped\n")


def test_ctrl_c_says_how_an_evaluation_goes_on(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "ask_all", interrupt)
    monkeypatch.setattr(evaluate, "load_questions", lambda *args: [])
    assert run_script(evaluate.main,
                      ["--benchmark", "toy", "--out", str(tmp_path / "a.jsonl")]) == 130
    error = capsys.readouterr().err
    assert error == f"stopped; the same command goes on from {tmp_path / 'a.jsonl'}\n"


# ------------------------------------------------------------------------------------------- errors


# of no file that is known
@pytest.mark.parametrize("error, starts", [
    (UserError("clip.wav: expected"), "error: clip.wav: expected"),
    (FileNotFoundError(2, "No such file", "a.json"),
     "error: 'a.json': expected a file that can be used, got 'No such file'"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
     "error: expected memory enough, got 'CUDA out of"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
     "error: expected memory enough"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
     "error: expected memory enough"),
    (MemoryError(), "error: expected memory enough, got 'MemoryError'"),
])
def test_an_error_is_told_as_what_it_is(error, starts, capsys):
    def main(argv):
        raise error

    assert run_script(main, []) == 2
    line = capsys.readouterr().err
    assert line.startswith(starts) and line.count("\n") == 1
    assert ("--grad-accum" in line and "--recompute" in line) == ("memory" in starts)


def test_a_mistake_of_ours_is_a_traceback():
    assert explain(RuntimeError("shapes do not fit")) is None and explain(IndexError()) is None
    with pytest.raises(ZeroDivisionError):
        run_script(lambda argv: 1 / 0, [])
    assert not unread()
