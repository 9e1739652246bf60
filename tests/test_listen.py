"""What `from diffa2_mini import Diffa2` gives: in a clone, and installed, from any folder."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from mini import ROOT, SECONDS

import diffa2_mini
from diffa2_mini import Diffa2, weights
from diffa2_mini.command.flags import identify_model
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.listen import decode_settings
from diffa2_mini.training import checkpoint
from diffa2_mini.training.checkpoint import load_checkpoint, save_checkpoint
from diffa2_mini.training.model_source import find_source

CLIPS = [DATA / "clips" / f"{name}.wav"
         for name in ("three_one_four", "siren_bell_drum", "minor_arpeggio")]
QUESTIONS = ["Please transcribe the audio to text.", "How many sounds are there?",
             "How many digits are there?"]
DECODE = SIZES["toy"][0].decode


@pytest.fixture(scope="module")
def diffa2():
    return Diffa2.from_pretrained("toy", device="cpu")


def error_of(function, *args, **named):
    with pytest.raises(UserError) as caught:
        function(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- answers


def test_a_clip_is_answered_from_its_path_and_from_its_samples(diffa2):
    answer = diffa2.ask(CLIPS[0])  # without a question: a transcript
    assert answer.text == "three one four" and answer.seconds > 0
    assert len(answer.tokens) == DECODE.gen_length and answer.steps == len(answer.history) >= 1
    samples, rate = soundfile.read(CLIPS[0])
    assert diffa2.ask((samples, rate), None).tokens == answer.tokens
    assert diffa2.ask(str(CLIPS[0]), QUESTIONS[2]).text == "3"
    assert isinstance(answer, diffa2_mini.Answer) and "history" not in repr(answer)


def test_clips_in_a_list_are_answered_as_a_batch_and_as_one_by_one(diffa2):
    together = diffa2.ask(CLIPS, QUESTIONS)
    alone = [diffa2.ask(*both) for both in zip(CLIPS, QUESTIONS)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.steps for answer in together] == [answer.steps for answer in alone]
    assert len({answer.seconds for answer in together}) == 1
    assert [each.text for each in diffa2.ask(CLIPS[:1], QUESTIONS[0])] == [together[0].text]


def test_the_history_of_an_answer_leads_to_it(diffa2):
    for answer in diffa2.ask(CLIPS[:2], QUESTIONS[0], steps=8):
        committed = torch.cat([step.committed for step in answer.history])  # [steps, R]
        assert answer.steps == 8 and bool((committed.sum(0) == 1).all())
        assert answer.history[-1].tokens.tolist() == [answer.tokens]
        assert all(step.confidence.shape == (1, DECODE.gen_length) for step in answer.history)


def test_settings_of_decoding_are_fields_of_its_config(diffa2):
    hot = [diffa2.ask(CLIPS[0], temperature=3.0, seed=seed).tokens for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    assert diffa2.ask(CLIPS[0], steps=4).steps == 4
    assert len(diffa2.ask(CLIPS[0], gen_length=8).tokens) == 8
    with pytest.raises(TypeError, match="length"):
        diffa2.ask(CLIPS[0], length=8)
    assert "exclude each other" in error_of(diffa2.ask, CLIPS[0], steps=4, factor=1.0)


def test_changed_settings_bring_what_they_need():
    assert decode_settings(DECODE) == DECODE
    assert decode_settings(DECODE, steps=4).factor is None
    assert decode_settings(DECODE, threshold=0.9).factor is None
    assert decode_settings(DECODE, remasking="random").factor is None
    odd, even = (decode_settings(DECODE, gen_length=n) for n in (24, 32))
    assert (odd.block_length, odd.steps) == (24, 24)
    assert (even.block_length, even.steps) == (16, 32) and even.factor == DECODE.factor


def test_what_cannot_be_asked_is_one_line(diffa2, tmp_path):
    assert "no such file" in error_of(diffa2.ask, tmp_path / "gone.wav")
    silence = np.zeros(5)
    for samples, rate in [(np.zeros((5, 2)), 16_000), (np.array([np.nan]), 16_000),
                          (np.array([1e7]), 16_000), (np.zeros(0), 16_000), (silence, 0),
                          (silence, -5), (silence, np.nan)]:
        assert "expected floats from -1 to 1" in error_of(diffa2.ask, (samples, rate))
    integers = error_of(diffa2.ask, (np.zeros(5, np.int16), 16_000))
    assert "divide integers by their full scale" in integers and "got int16 (5,)" in integers
    assert "got 1 for 2 clips" in error_of(diffa2.ask, CLIPS[:2], ["What?"])
    assert "got 0 for 0 clips" in error_of(diffa2.ask, [], [])


def test_a_rule_that_is_off_excludes_no_other():
    default = dataclasses.replace(DECODE, factor=0.5, threshold=None)
    assert decode_settings(default, factor=None, steps=DECODE.gen_length).is_scheduled
    assert decode_settings(default, factor=None, threshold=0.9).threshold == 0.9
    assert decode_settings(default, threshold=None).factor == 0.5


def test_a_dtype_that_there_is_not_is_one_line():
    assert "expected one of float32, bfloat16" in error_of(
        lambda: Diffa2.from_pretrained("toy", dtype="int3"))


def test_a_clip_that_ends_early_is_answered_with_a_warning(diffa2, tmp_path):
    (tmp_path / "cut.wav").write_bytes(CLIPS[0].read_bytes()[:-4000])
    with pytest.warns(UserWarning, match="cut off or damaged"):
        assert diffa2.ask(tmp_path / "cut.wav").text.startswith("three one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = np.tile(soundfile.read(CLIPS[0])[0], 5)
        assert len(diffa2.load_clip((long, 16_000))) == diffa2.config.audio.max_samples


# ------------------------------------------------------------------------------ where it comes from


def test_a_model_comes_from_a_size_a_checkpoint_or_a_folder_of_training(diffa2, tmp_path):
    shutil.copy(weights.SHIPPED["diffa2"], tmp_path / "stage2.safetensors")
    other = load_checkpoint(weights.SHIPPED["diffa2"])
    other.model["trainable_prompts.weight"] += 1
    save_checkpoint(tmp_path / "stage3.safetensors", other)
    from_folder = Diffa2.from_pretrained(str(tmp_path), device="cpu")
    from_file = Diffa2.from_pretrained(checkpoint=tmp_path / "stage2.safetensors", device="cpu")
    prompts = [each.model.trainable_prompts.weight for each in (from_folder, from_file, diffa2)]
    assert torch.equal(prompts[1], prompts[2]) and not torch.equal(prompts[0], prompts[2])
    assert not any(parameter.requires_grad for parameter in diffa2.model.parameters())


@pytest.mark.parametrize("arguments, message", [
    (dict(name="huge"), "expected a size (toy, small, diffa1, full) or a folder"),
    (dict(name="full"), "hf download zhoujiaming777/DIFFA-2"),
    (dict(name="small"), "hf download openai/whisper-tiny.en model.safetensors"),
    (dict(checkpoint="gone.safetensors"),
     "gone.safetensors: expected a checkpoint, found no such file; python train.py"),
    (dict(checkpoint="data/toy_diffa2.safetensors"), f"it is now {weights.SHIPPED['diffa2']}"),
    (dict(sources={"whisper": "data/toy_whisper.safetensors"}),
     f"it is now {weights.SHIPPED['whisper']}"),
    (dict(sources={"encoder": "a"}), "expected sources of whisper, llada and diffa2"),
    (dict(sources={"diffa2": "a"}, checkpoint="b"), "exclude each other"),
    (dict(sources={"llada": weights.SHIPPED["whisper"]}), "was trained with another backbone"),
    (dict(device="mps", dtype="float64"), "--d"),  # no such device, or no such dtype on it
])
def test_what_is_missing_is_told_in_one_line(arguments, message, nothing_downloaded):
    assert message in error_of(Diffa2.from_pretrained, **arguments)


def test_a_source_is_found_without_loading_it():
    config, trained, paths, fingerprints = find_source()
    assert config.size == "toy" and trained.done
    assert {part: paths[part] for part in paths} == {
        part: weights.SHIPPED[part] for part in ("whisper", "llada")}
    trained_part = {"diffa2": checkpoint.fingerprint(trained.model)}
    assert fingerprints == checkpoint.fingerprints_of(paths) | trained_part


def test_the_files_of_a_model_are_fingerprinted_once(monkeypatch):
    made, fingerprint = [], checkpoint.fingerprint
    monkeypatch.setattr(checkpoint, "fingerprint",
                        lambda tensors: made.append(tensors) or fingerprint(tensors))
    source = find_source("toy")
    identify_model(source, DECODE, torch.float32, merge=False)
    Diffa2.load(source, torch.device("cpu"), torch.float32)
    assert len(made) == 3  # encoder, backbone, and what the checkpoint has


# --------------------------------------------------------------------------------------- packaging


def test_a_command_that_asks_no_model_imports_none():
    code = "import sys, diffa2_mini.command.script; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=SECONDS)
    assert done.stdout == "False\n", done.stderr
    assert not hasattr(diffa2_mini, "Diffa3")


@pytest.mark.slow
def test_an_installed_package_answers_from_any_folder(tmp_path):
    """Packages that are installed here already are not fetched again."""
    source, home = tmp_path / "source", tmp_path / "elsewhere"
    skip = shutil.ignore_patterns(".*", "runs", "weights", "build", "*.egg-info", "toy", "fsdd")
    shutil.copytree(ROOT, source, ignore=skip)
    home.mkdir()
    shutil.copy(CLIPS[0], home / "clip.wav")
    environment = tmp_path / "environment"
    here = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"

    def run(*command, code=0):
        done = subprocess.run(list(map(str, command)), cwd=home, capture_output=True, text=True,
                              timeout=SECONDS, env=here)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    run(sys.executable, "-m", "venv", "--without-pip", environment)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
        "--target", site, source)
    packages = [path for path in map(str, sys.path) if path.endswith("-packages")]
    (environment / "here.pth").write_text("\n".join(packages))
    shutil.copy(environment / "here.pth", site)
    question = "Please transcribe the audio to text."
    say = ("from diffa2_mini import Diffa2; "
           f"print(Diffa2.from_pretrained('toy').ask('clip.wav', '{question}').text)")
    assert run(python, "-c", say) == "three one four\n"
    assert run(python, "-c", "import diffa2_mini; print(diffa2_mini.__file__)").startswith(site)
    for flags, maker in ((["evaluate", "--benchmark", "toy"], "python data/toybench.py"),
                         (["bench", "--toy"], "python tutorials/speed.py")):
        error = run(python, "-m", f"diffa2_mini.{flags[0]}", *flags[1:], code=2)
        assert maker in error and "clone" in error and error.count("\n") == 1
