"""Kaldi's tables become a manifest, which is asked and scored as one."""

from pathlib import Path

import pytest

from data import kaldi
from diffa2_mini.command.script import run_script
from diffa2_mini.evaluate import __main__ as evaluate
from diffa2_mini.evaluate.benchmarks import load_questions


def test_the_tables_become_a_manifest_of_transcripts(tmp_path, capsys):
    (tmp_path / "wav.scp").write_text(
        "u1 clips/my clip.wav\nu2\t/abs/u2.flac\n\n", encoding="utf-8")
    (tmp_path / "text").write_text("u2 naïve words\nu1 one two\nu3 no clip\nu4\n", encoding="utf-8")
    assert run_script(kaldi.main, [str(tmp_path)]) == 0
    assert f"4 transcripts: {tmp_path / 'manifest.json'}" in capsys.readouterr().out
    questions = load_questions("asr", tmp_path / "manifest.json")
    assert [(q.id, q.audio, q.answer) for q in questions] == [
        ("u2", Path("/abs/u2.flac"), "naïve words"),
        ("u1", tmp_path / "clips/my clip.wav", "one two"), ("u3", None, "no clip"),
        ("u4", None, "")]


@pytest.mark.parametrize("scp, text, message",
                         [("u1 a.wav\n", "u2 words\n", "got none, or a command to run, for u1"),
                          ("u1 a.wav\nu1 b.wav\n", "u1 words\n", "an id twice"),
                          ("", "u1 words\n", "got none"),
                          ("u1 sox a.wav -t wav - |\n", "u1 words\n", "a command to run, for u1"),
                          ("u1 a.wav\n", None, "no such file")])
def test_tables_that_do_not_fit_are_refused_in_a_line(tmp_path, capsys, scp, text, message):
    (tmp_path / "wav.scp").write_text(scp)
    if text:
        (tmp_path / "text").write_text(text)
    assert run_script(kaldi.main, [str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["", "wav.scp"])
def test_a_benchmark_of_tables_says_how_they_become_one(tmp_path, capsys, name):
    (tmp_path / "wav.scp").write_text("u1 a.wav\n")
    command = ["--benchmark", "asr", "--file", str(tmp_path / name)]
    assert run_script(evaluate.main, command) == 2
    error = capsys.readouterr().err
    assert f"python data/kaldi.py {tmp_path}" in error and error.count("\n") == 1
