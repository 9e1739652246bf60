"""The page of sample.py --html: what is in it, that nothing breaks out of it, and that it works in
a real browser."""

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mini import SECONDS

import sample
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES
from diffa2_mini.fast.generate import Step
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.view import page
from diffa2_mini.weights import SHIPPED

CLIP = Path(__file__).resolve().parent.parent / "data" / "clips" / "three_one_four.wav"
HOSTILE = "</script><script>document.title = 'broken'</script><!--\" & 'SECTIONS"


def ask(capsys, *arguments) -> list[dict]:
    """The lines of JSON that sample.py prints."""
    assert run_script(sample.main, [*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def sections(html: str) -> list[dict]:
    """The JSON in the page, read as a browser does: up to the first </script>."""
    pattern = r'<script type="application/json" id="sections">(.*?)</script>'
    return json.loads(re.search(pattern, html, re.DOTALL)[1])


def last_text(section: dict) -> str:
    """The answer that the steps on the page end with."""
    tokens = [None] * section["length"]
    for predicted in section["steps"]:
        for at, token, *_ in predicted:
            tokens[at] = token
    spelled = "".join("░" if token is None else token
                      for token in tokens[:tokens.index("") if "" in tokens else None])
    return spelled.encode("latin-1").decode().strip()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SIZES["toy"][0], SHIPPED["llada"])


def test_the_last_step_is_the_answer_and_each_step_tells_its_alternatives(tmp_path, capsys):
    (row,) = ask(capsys, CLIP, "--steps", 16, "--html", tmp_path / "out.html")
    (section,) = sections((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert last_text(section) == section["text"] == row["text"] == "three one four"
    assert (section["passes"], section["seconds"]) == (
        row["steps"], row["seconds"]) == (16, row["seconds"])
    # each step predicts what is masked
    assert [len(predicted) for predicted in section["steps"]] == [*range(16, 0, -1)]
    for predicted in section["steps"]:
        assert sum(token is not None for _, token, *_ in predicted) == 1
        for _, _, confidence, top in predicted:
            probabilities = [p for _, p in top]
            assert len(top) == page.TOP and probabilities == sorted(probabilities, reverse=True)
            assert sum(probabilities) <= 1.001
            # without a temperature the first is taken
            assert confidence == pytest.approx(probabilities[0], abs=2e-4)


def test_the_page_changes_no_answer(tmp_path, capsys):
    for flags in ([], ["--temperature", "2", "--seed", "1"], ["--threshold", "0.9", "--cfg", "1"]):
        (plain,) = ask(capsys, CLIP, *flags)
        (row,) = ask(capsys, CLIP, *flags, "--html", tmp_path / "out.html")
        assert row["tokens"] == plain["tokens"]
        (section,) = sections((tmp_path / "out.html").read_text(encoding="utf-8"))
        assert last_text(section) == row["text"]
        assert section["passes"] == row["steps"] * (2 if "--cfg" in flags else 1)


def test_clips_and_parts_are_sections_of_one_page(tmp_path, capsys):
    digits, rate = soundfile.read(CLIP)
    first = np.pad(digits, (0, 3 * rate - len(digits)))
    soundfile.write(tmp_path / "long.wav", np.concatenate([first, first]), rate)
    rows = ask(capsys, tmp_path / "long.wav", CLIP, "--chunk", "--html", tmp_path / "out.html")
    found = sections((tmp_path / "out.html").read_text(encoding="utf-8"))
    names = [f"{tmp_path / 'long.wav'}, {at}" for at in ("0.0 to 3.0 s", "3.0 to 6.0 s")]
    assert [section["clip"] for section in found] == [*names, str(CLIP)]
    assert [section["text"] for section in found] == [row["text"] for row in rows]
    assert [section["duration"] for section in found] == [row["end"] - row["start"] for row in rows]


def test_nothing_breaks_out_of_the_page_and_nothing_is_fetched(tmp_path, capsys):
    clip = tmp_path / "<script>alert(1)<!-- &.wav"
    shutil.copy(CLIP, clip)
    ask(capsys, clip, "--prompt", HOSTILE, "--html", tmp_path / "out.html")
    html, template = ((path.read_text(encoding="utf-8"))
                      for path in (tmp_path / "out.html", page.TEMPLATE))
    (section,) = sections(html)
    assert (section["clip"], section["prompt"]) == (str(clip), HOSTILE)
    assert all(html.count(tag) == template.count(tag) for tag in ("<script", "</script", "<!--"))
    assert "default-src 'none'" in html
    assert not re.search(r"https?:|@import|url\(|src=\"|href=\"(?!data:)", html)


def test_the_sound_and_the_picture_are_those_of_the_clip(tmp_path, capsys):
    ask(capsys, CLIP, "--html", tmp_path / "out.html")
    (section,) = sections((tmp_path / "out.html").read_text(encoding="utf-8"))
    sound, rate = soundfile.read(
        io.BytesIO(base64.b64decode(section["sound"].removeprefix("data:audio/wav;base64,"))))
    np.testing.assert_allclose(sound, soundfile.read(CLIP)[0], atol=1e-4)
    values = np.frombuffer(base64.b64decode(section["picture"]), np.uint8)
    values = values.reshape(section["bands"], -1)
    assert rate == 16_000 and values.shape == (128, -(-len(sound) // 160))
    assert (values.min(), values.max()) == (0, 255)


def test_a_picture_has_its_highest_band_on_top_and_silence_has_one_too():
    values = page.picture(np.array([[0.0, 1.0], [2.0, 0.0]]))  # the second row is the higher band
    assert values.tolist() == [[255, 0], [0, 128]]
    assert page.picture(np.full((2, 3), -1.5)).max() == 0


def test_a_letter_of_two_tokens_and_an_end_are_recorded_as_bytes(tokenizer):
    first, second = (next(i
                          for i, token in tokenizer.tokens.items()
                          if token == bytes([b]))
                     for b in "é".encode())
    tokens = torch.tensor([[first, second, tokenizer.mask_id, tokenizer.eos_id]])
    likely = tokens[..., None].expand(-1, -1, 2), torch.tensor([0.75, 0.0]).expand(1, 4, 2)
    step = Step(tokens, tokens, torch.full((1, 4), 0.75), tokens > 0, likely)
    recorded = page.predictions([step], tokenizer)
    assert [token for _, token, *_ in recorded[0]] == ["\xc3", "\xa9", None, ""]
    assert recorded[0][3][2:] == [0.75, [["<|endoftext|>", 0.75]]]


@pytest.mark.parametrize("name", ["missing/out.html", "out.wav", "folder.html"])
def test_a_page_that_cannot_be_is_refused_before_the_model_is_loaded(name, tmp_path, capsys,
                                                                     monkeypatch):
    (tmp_path / "folder.html").mkdir()
    monkeypatch.setattr(sample.Diffa2, "load", None)
    assert run_script(sample.main, [str(CLIP), "--html", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert f"--html {tmp_path / name}: expected the name of a file" in printed.err
    assert printed.err.count("\n") == 1 and not printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_disk_that_is_full_leaves_the_old_page(tmp_path, capsys, monkeypatch):
    def fail(path, text, **options):
        path.write_bytes(text[:100].encode())
        raise OSError("No space left on device")

    (tmp_path / "out.html").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_text", fail)
    assert run_script(sample.main, [str(CLIP), "--html", str(tmp_path / "out.html")]) == 2
    assert "No space left" in capsys.readouterr().err
    assert (tmp_path / "out.html").read_bytes() == b"old" and len([*tmp_path.iterdir()]) == 1


# ---------------------------------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that keeps what is written to its console."""
    webdriver = pytest.importorskip("selenium.webdriver",
                                    reason="selenium is not installed: pip install selenium")
    programs = [next(filter(None, map(shutil.which, names)), None)
                for names in (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]
    if None in programs:
        pytest.skip(
            "no Chromium with its driver is installed: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of two answers in 16 steps each, the second of a clip and a question that are
    hostile; and its path."""
    folder = tmp_path_factory.mktemp("page")
    hostile = folder / f"<img src=x onerror=alert(1)>{'long' * 20}.wav"
    shutil.copy(CLIP, hostile)
    path = folder / "out.html"
    assert run_script(sample.main,
                      [str(CLIP),
                       str(hostile), "--prompt", HOSTILE, "--steps", "16", "--html",
                       str(path)]) == 0
    return path


@pytest.fixture
def opened(browser, written):
    """The page, opened anew at 900 pixels in the light; returns the first section of it, and the
    browser."""
    open_page(browser, written)
    return browser.find_element("css selector", "section"), browser


def open_page(browser, path, width=900, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme},
                         {"name": "prefers-reduced-motion", "value": "reduce"}]})
    browser.get(path.as_uri())


def text(section) -> str:
    return "".join(token.get_property("textContent") for token in tokens(section)).strip()


def tokens(section) -> list:
    return [
        token for token in section.find_elements("css selector", ".tokens span")
        if token.is_displayed()]


def keys(browser):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    return Keys, lambda *pressed: ActionChains(browser).send_keys(*pressed).perform()


def wait(condition, seconds=SECONDS):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "the page did not change in time"
        time.sleep(0.05)


def test_the_page_opens_on_the_answers_without_an_error_or_a_request(opened, written):
    _, browser = opened
    found = sections(written.read_text(encoding="utf-8"))
    shown = browser.find_elements("css selector", "section")
    assert [text(section) for section in shown] == [section["text"] for section in found]
    assert [section.find_element("css selector", "h2").text
            for section in shown] == [section["clip"] for section in found]
    assert browser.title == "How DIFFA-2 answered"
    wait(lambda: browser.execute_script("return document.querySelector('audio').readyState > 0"))
    seconds = browser.execute_script("return document.querySelector('audio').duration")
    assert seconds == pytest.approx(found[0]["duration"], abs=0.01)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def test_the_picture_has_the_colours_of_what_is_quiet_and_loud(opened, written):
    found = sections(written.read_text(encoding="utf-8"))[0]
    values = np.frombuffer(base64.b64decode(found["picture"]), np.uint8)
    pixels = np.array(opened[1].execute_script(
        "const c = document.querySelector('canvas');"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]")).reshape(-1, 4)
    assert len(pixels) == len(values) and (pixels[:, 3] == 255).all()
    for value, colour in ((0, [8, 10, 30]), (255, [252, 250, 200])):
        assert (pixels[values == value, :3] == colour).all() and (values == value).any()
    brightness = [pixels[values == value, :3].sum(1).mean() for value in (0, 64, 128, 192, 255)
                  if (values == value).any()]
    assert brightness == sorted(brightness)


def test_tokens_are_shaded_by_confidence_and_the_work_is_stated(opened, written):
    (section, browser), found = opened, sections(written.read_text(encoding="utf-8"))[0]
    confidence = {at: c for predicted in found["steps"] for at, _, c, _ in predicted}
    script = "return getComputedStyle(arguments[0]).getPropertyValue('--confidence')"
    shown = [float(browser.execute_script(script, token)) for token in tokens(section)]
    assert shown == pytest.approx([confidence[at] for at in range(len(shown))]) and 0 < min(shown)
    shades = {token.value_of_css_property("background-color") for token in tokens(section)}
    assert len(shades) > 1
    assert f"{found['passes']} forward passes, {found['seconds']:.2f} s" in section.text


def test_the_slider_goes_through_the_steps_by_keyboard_too(opened):
    section, browser = opened
    Keys, press = keys(browser)
    slider, answer = section.find_element("css selector", "input"), text(section)
    browser.execute_script("arguments[0].focus()", slider)
    press(Keys.HOME)
    assert set(text(section)) == {"░"} and slider.get_attribute("aria-valuetext") == "step 0 of 16"
    seen = [text(section)]
    for _ in range(16):
        press(Keys.ARROW_RIGHT)
        seen.append(text(section))
    assert len({*seen}) > 4 and seen[-1] == answer
    press(Keys.ARROW_LEFT)
    assert "15 / 16" in section.text
    assert section.find_element("css selector",
                                "[role=status]").get_property("textContent") == text(section)


def test_play_shows_the_steps_and_ends_on_the_answer(opened):
    section, browser = opened
    Keys, press = keys(browser)
    button, answer = section.find_element("css selector", "button"), text(section)
    browser.execute_script("arguments[0].focus()", button)
    press(Keys.ENTER)
    assert button.text == "Pause" and "░" in text(section)
    wait(lambda: "1 / 16" in section.text or "2 / 16" in section.text)
    button.click()
    stopped = text(section)
    time.sleep(1.2)
    assert button.text == "Play" and text(section) == stopped
    button.click()
    wait(lambda: button.text == "Play")
    assert text(section) == answer and "16 / 16" in section.text


def test_focus_and_pointer_show_the_alternatives_of_a_token(opened, written):
    from selenium.webdriver.common.action_chains import ActionChains

    section, browser = opened
    Keys, press = keys(browser)
    tooltip = section.find_element("css selector", "[role=tooltip]")
    browser.execute_script("arguments[0].focus()", section.find_element("css selector", "input"))
    assert not tooltip.is_displayed()
    press(Keys.TAB)
    focused = browser.switch_to.active_element
    assert focused == tokens(section)[0]
    assert focused.get_attribute("aria-describedby") == tooltip.get_attribute("id")
    assert tooltip.is_displayed() and len(tooltip.find_elements("css selector", "li")) == page.TOP
    assert browser.execute_script(
        "return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    before = tooltip.text
    press(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == tokens(section)[1] and tooltip.text != before
    press(Keys.ESCAPE)
    assert not tooltip.is_displayed()
    press(Keys.END, Keys.TAB)  # the tokens are one stop
    assert not tooltip.is_displayed()
    ActionChains(browser).move_to_element(tokens(section)[0]).perform()
    assert tooltip.is_displayed() and tooltip.text == before
    ActionChains(browser).move_to_element(tooltip).perform()
    assert tooltip.is_displayed()
    ActionChains(browser).move_to_element(section.find_element("css selector", "h2")).perform()
    assert not tooltip.is_displayed()


def test_a_phone_shows_it_all_without_scrolling_sideways(opened, written):
    _, browser = opened
    open_page(browser, written, width=360)
    for section in browser.find_elements("css selector", "section"):
        for token in tokens(section):
            browser.execute_script("arguments[0].focus()", token)
            assert browser.execute_script(
                "return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    for button in browser.find_elements("css selector", "button, input, audio"):
        assert button.size["height"] >= 44  # what a finger hits


CONTRASTS = """
const parse = colour => {
  const n = colour.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
const luminance = c => c.slice(0, 3).map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
const ground = e => e
  ? over(parse(getComputedStyle(e).backgroundColor), ground(e.parentElement)) : [255, 255, 255];
return [...document.querySelectorAll(
    'h1, h2, p, figcaption, button, .controls span, .tokens span, [role=tooltip] li')]
  .filter(e => e.checkVisibility()).map(e => {
    const [a, b] = [luminance(parse(getComputedStyle(e).color)), luminance(ground(e))];
    return [e.className + e.tagName, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_a_readable_contrast(scheme, opened, written):
    _, browser = opened
    open_page(browser, written, scheme=scheme)
    browser.execute_script("document.querySelector('.tokens span').focus()")
    is_dark = browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128")
    contrasts = browser.execute_script(CONTRASTS)
    assert is_dark == (scheme == "dark") and len(contrasts) > 20
    assert [(name, contrast) for name, contrast in contrasts if contrast < 4.5] == []


def test_a_letter_of_two_tokens_is_shown_whole(browser, tmp_path):
    section = dict(
        clip="c", prompt="p", text="é!", length=4, passes=2, seconds=0.1, duration=1.0,
        highest=8000.0, bands=1, picture="AP8=", sound="data:,",
        steps=[[[0, "\xc3", 1.0, []], [2, "!", 1.0, []]], [[1, "\xa9", 1.0, []], [3, "", 1.0, []]]])
    page.save(tmp_path / "out.html", [section])
    open_page(browser, tmp_path / "out.html")
    assert text(browser.find_element("css selector", "section")) == "é!"
    browser.execute_script(
        "const s = document.querySelector('input');"
        " s.value = 1; s.dispatchEvent(new Event('input'))")
    assert text(browser.find_element("css selector", "section")) == "�░!░"
