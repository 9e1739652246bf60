"""The pictures of the README that no chapter makes: an answer forming, the map of DIFFA-2, and the
page of --html. Which sound made which word is drawn by chapter 0.

    python tutorials/readme_pictures.py    # into pictures/; page.png where there is selenium

The first is what the shipped model does, one token a step, so that the order can be watched; it
moves by CSS, which browsers run in an SVG that a page shows as a picture.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that this file runs as a script

from diffa2_mini.command.script import begin, run_script

begin(__name__)  # Ctrl-C while the rest is imported

import dataclasses
import os
import shutil
import subprocess
import tempfile
from html import escape

import torch
from common import AUDIO, CLIPS, COLOURS, GREY, arrow, box, picture, shipped
from matplotlib.axes import Axes

from diffa2_mini.command.script import Parser
from diffa2_mini.data import load_clip
from diffa2_mini.fast.generate import generate
from diffa2_mini.fast.state import DecodingState

PICTURES = Path(__file__).parent / "pictures"
CLIP, QUESTION = "three_one_four", "Describe the audio."
SECONDS, PAUSE = 0.6, 3.0  # a step, and the finished answer
WIDTH, HEIGHT, LEFT, GAP = 74, 34, 16, 6  # pixels of a token's box, and between boxes
PER_ROW = 8


def decoded() -> list[tuple[str, int, float]]:
    """Of each token of the answer: its text, the step that committed it, and its confidence
    then."""
    model, tokenizer = shipped()
    config = model.config
    mel, n_frames = load_clip(CLIPS / f"{CLIP}.wav", config.audio)
    decode = dataclasses.replace(config.decode, factor=None, steps=config.decode.gen_length)
    with torch.no_grad():
        audio = model.encode(mel[None], torch.tensor([n_frames]))
        prompt = tokenizer.prompt(config.text.system, QUESTION)
        state = DecodingState(model, model.embed_audio(audio, AUDIO), [prompt], [decode.gen_length],
                              tokenizer.mask_id)
        steps = list(generate(state, decode, tokenizer.eos_id))
    found = {}
    for number, step in enumerate(steps):
        for i in step.committed[0].nonzero().flatten().tolist():
            token = int(step.tokens[0, i])
            text = "end" if token in (tokenizer.eos_id,
                                      tokenizer.eot_id) else tokenizer.spell([token])
            found[i] = text.strip(), number, float(step.confidence[0, i])
    return [found[i] for i in sorted(found)]


def forming(tokens: list[tuple[str, int, float]]) -> str:
    """The answer as an SVG whose tokens appear in the order in which they were committed."""
    n_steps = 1 + max(number for _, number, _ in tokens)
    whole = n_steps * SECONDS + PAUSE
    boxes, rules = [], []
    for i, (text, number, confidence) in enumerate(tokens):
        row, column = divmod(i, PER_ROW)
        x, y = LEFT + column * (WIDTH + GAP), 66 + row * (HEIGHT + GAP)
        middle = f'x="{x + WIDTH / 2}" y="{y + HEIGHT / 2 + 5}"'
        kind = "end" if text == "end" else "word"
        boxes.append(
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" class="box"/>'
            f'<g class="t{i}"><rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" '
            f'class="{kind}" fill-opacity="{0.25 + 0.6 * confidence:.2f}"/>'
            f'<text {middle} class="token">{escape(text)}</text></g>')
        begin = 100 * (number + 1) * SECONDS / whole
        rules.append(
            f"@keyframes k{i}{{0%,{begin:.2f}%{{opacity:0}}{begin + 0.5:.2f}%,100%{{opacity:1}}}}"
            f".t{i}{{animation:k{i} {whole:.1f}s linear infinite}}")
    rows = -(-len(tokens) // PER_ROW)
    width, height = 2 * LEFT + PER_ROW * (WIDTH + GAP) - GAP, 66 + rows * (HEIGHT + GAP) + 10
    style = """text{font:15px ui-monospace,Menlo,Consolas,monospace;fill:#1f2328}
.token{text-anchor:middle}
.said{fill:#59636e}.box{fill:none;stroke:#8a929b}.word{fill:#3b82c4}.end{fill:#8a929b}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.said{fill:#9198a1}}
@media(prefers-reduced-motion:reduce){g{animation:none!important}}"""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="An answer forming, most confident tokens first">'
        f"<style>{style}\n{''.join(rules)}</style>"
        f'<text x="{LEFT}" y="26">{CLIP}.wav</text>'
        f'<text x="{LEFT}" y="50" class="said">{escape(QUESTION)}</text>{"".join(boxes)}</svg>\n')


def draw_map() -> None:
    """The boxes of DIFFA-2, and the shapes of what flows between them."""
    fixed, trained, data = GREY, COLOURS[1], COLOURS[0]
    with picture("00_start_here", width=7.4, height=7.0) as axes:
        axes.set(xlim=(0, 10), ylim=(-0.1, 10.1))
        axes.axis("off")
        box(axes, (3.2, 9.5), 3.4, "sound, 16,000 samples a second", data)
        box(axes, (3.2, 8.0), 3.4, "log-mel spectrogram\nchapter 1", fixed)
        box(axes, (3.2, 6.4), 3.4, "Whisper encoder\nchapter 2", fixed)
        box(axes, (1.5, 4.6), 2.7, "semantic adapter\nwhat was said: chapter 7", trained)
        box(axes, (4.9, 4.6), 2.9, "acoustic adapter\nhow it sounded: chapter 8", trained)
        box(axes, (8.4, 4.6), 2.4, "question, as text\nchapter 3", data)
        box(axes, (4.1, 2.7), 5.8, "prompt with the audio's embeddings spliced in,\n"
            "then the response: all masked at first", data)
        box(axes, (4.1, 1.0), 5.8, "LLaDA backbone                      \n"
            "chapters 4 and 5                      ", fixed)
        box(axes, (5.8, 1.0), 2.0, "LoRA: chapter 9", trained, height=0.5)
        box(axes, (8.8, 1.0), 2.1, "commit the surest\nchapter 6", data)
        draw_flow(axes)
        for i, (text, colour) in enumerate((("data", data), ("a formula, or frozen weights", fixed),
                                            ("trained weights", trained))):
            box(axes, (6.6, 9.7 - 0.5 * i), 0.5, "", colour, height=0.3)
            axes.text(7.0, 9.7 - 0.5 * i, text, color=GREY, fontsize=8, va="center")


def draw_flow(axes: Axes) -> None:
    """The map's arrows, with the shapes of what flows along them."""
    arrow(axes, (3.2, 9.05), (3.2, 8.45), "[samples]", at=(0.8, 0))
    arrow(axes, (3.2, 7.55), (3.2, 6.85), "[n_mels, M]", at=(0.9, 0))
    arrow(axes, (2.4, 5.95), (1.5, 5.05), "last hidden state\n[T, E]", at=(-1.1, 0.1))
    arrow(axes, (4.0, 5.95), (4.9, 5.05), "tapped depths\n[N, T, E]", at=(1.0, 0.1))
    arrow(axes, (1.5, 4.15), (2.6, 3.15), "[up to T // 4, D]", at=(-1.05, 0))
    arrow(axes, (4.9, 4.15), (4.6, 3.15), "[Q, D]", at=(0.6, 0.05))
    arrow(axes, (8.4, 4.15), (7.0, 3.0), "its tokens' embeddings\n[L, D]", at=(1.25, -0.1))
    arrow(axes, (4.1, 2.25), (4.1, 1.45), "[S, D]", at=(0.55, 0))
    arrow(axes, (7.0, 1.0), (7.75, 1.0), "logits\n[K, V]", at=(0, 0.42))
    arrow(axes, (8.8, 1.45), (7.0, 2.5), "fewer masks: next step", at=(1.1, 0.42), bend=0.25)


def page(path: Path) -> None:
    """A picture of the page that `sample.py --html` writes."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=900,900"):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder, "answer.html")
        command = [sys.executable, "sample.py", f"data/clips/{CLIP}.wav", "--prompt", QUESTION,
                   "--html", str(html), "--factor", "0.1"]
        subprocess.run(command, cwd=ROOT, check=True)
        driver = webdriver.ChromeService(shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=driver)
        try:
            browser.get(html.as_uri())
            last = browser.find_element("css selector", ".tokens .fresh")
            webdriver.ActionChains(browser).move_to_element(last).perform()  # what else it could be
            browser.save_screenshot(str(path))
        finally:
            browser.quit()


def main(argv: list[str]) -> None:
    Parser(__doc__).parse_args(argv)
    os.environ["TUTORIAL_PICTURES"] = str(PICTURES)  # where picture() writes
    draw_map()
    (PICTURES / "forming.svg").write_text(forming(decoded()), encoding="utf-8")
    try:
        page(PICTURES / "page.png")
    except ImportError:
        print("pictures/page.png needs selenium, Chromium and its driver: left as it is")


if __name__ == "__main__":
    sys.exit(run_script(main, sys.argv[1:]))
