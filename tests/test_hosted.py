"""The notebook for a hosted GPU: its cells at toy size, what they would download, and what a
browser that records hands over."""

import runpy
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from diffa2_mini.published.sources import SOURCES
from tutorials import build

CELLS = [cell.code for cell in build.cells_of(
    (build.FOLDER / "hosted.md").read_text(encoding="utf-8"))]
CLIP = build.FOLDER.parent / "data" / "clips" / "three_one_four.wav"


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """Runs cells where the notebook stands, and gives what they have defined."""
    monkeypatch.chdir(build.FOLDER)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TUTORIAL_PICTURES", str(tmp_path))

    def run(cells, **changed):
        found = {}
        for i, code in enumerate(cells):
            cell = tmp_path / f"cell_{i}.py"
            cell.write_text(code, encoding="utf-8")
            found = runpy.run_path(str(cell), init_globals=found)
            found |= changed if i == 0 else {}
        return found

    return run


def test_it_runs_at_toy_size_on_any_machine_and_downloads_nothing(notebook, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", None)
    found = notebook(CELLS)
    answer, samples = found["answer"], soundfile.read(CLIP, dtype="float32")[0]
    assert np.array_equal(found["samples"], samples)
    assert found["diffa2"].ask(found["CLIP"], found["QUESTION"]).text == answer.text
    page, shown = (tmp_path / "answer.html").read_text(), found["Shown"](found["path"])
    assert answer.text in page and "three_one_four.wav" in page
    assert shown._repr_html_().startswith("<iframe") and shown._repr_html_().count("<") == 2


def test_of_the_full_size_it_downloads_each_part_once(notebook, monkeypatch):
    commands, asked = [], {}
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(
        snapshot_download=lambda name, allow_patterns: asked.update({name: allow_patterns})))
    notebook(CELLS[:2], SIZE="full")
    assert [command[1:] for command in commands] == [
        ["-m", "pip", "install", "-q", "huggingface_hub"]]
    expected = {name: None for name in SOURCES["full"].values()}
    assert asked == expected | {SOURCES["full"]["whisper"]: "model.safetensors"}


def test_what_the_browser_has_recorded_is_asked_about(notebook, monkeypatch, tmp_path):
    samples, scripts = soundfile.read(CLIP, dtype="float32")[0], []

    def eval_js(script):
        scripts.append(script)
        return b64encode(samples.tobytes()).decode()

    colab = SimpleNamespace(output=SimpleNamespace(eval_js=eval_js))
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=colab))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    found = notebook(CELLS, SECONDS=2.5)
    assert np.array_equal(found["samples"], samples) and scripts[0].endswith("(2.5)")
    assert "your recording" in (tmp_path / "answer.html").read_text()


def test_a_browser_records_as_the_cell_says(notebook, tmp_path):
    """Chromium has a microphone of its own for tests, which beeps every second."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "use-fake-device-for-media-stream",
                 "use-fake-ui-for-media-stream"):
        options.add_argument(f"--{flag}")
    try:
        browser = webdriver.Chrome(options)
    except Exception as error:  # no browser, or no driver for it
        pytest.skip(f"needs Chromium: {type(error).__name__}")
    record = notebook(CELLS[:4])["RECORD"]
    (tmp_path / "empty.html").write_text("<!doctype html><title>empty</title>")
    try:
        browser.set_script_timeout(120)
        browser.get((tmp_path / "empty.html").as_uri())
        start = time.perf_counter()
        text = browser.execute_async_script(
            f"const done = arguments[0]; {record}(2.5).then(done, error => done('!' + error))")
        assert not text.startswith("!") and time.perf_counter() - start >= 2.5, text
    finally:
        browser.quit()
    samples = np.frombuffer(b64decode(text), np.float32)
    assert len(samples) / 16_000 > 1 and np.isfinite(samples).all()
    assert np.abs(samples).max() > 0.01  # a beep, no silence
