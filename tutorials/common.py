"""What the chapters share: the way to the library, the shipped model, and one style of picture."""

import builtins
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a chapter runs without installing the package

from data import toy_text
from data.toy import write_clip
from data.toy_sound import synthesize
from diffa2_mini import weights
from diffa2_mini.config import SIZES
from diffa2_mini.data import Example
from diffa2_mini.model import Diffa2Model
from diffa2_mini.published.sources import SOURCES, load_tokenizer
from diffa2_mini.tokenizer import Tokenizer
from diffa2_mini.training.checkpoint import load_checkpoint

CLIPS = ROOT / "data" / "clips"
# for text and lines: a contrast of 4.3 to white, and of 4.4 to #0d1117, GitHub's dark page
GREY = "#7a7a7a"
COLOURS = ("#3b82c4", "#d07b26", "#4a9c5d", "#a05fb4")  # for what is drawn: at least 3 to either
rcParams["svg.hashsalt"] = "diffa2_mini"  # the same picture is the same file
torch.manual_seed(0)
torch.set_num_threads(1)  # sums come out alike, whatever the number of cores


def shipped() -> tuple[Diffa2Model, Tokenizer]:
    """The toy model after its four stages, as shipped, and its tokenizer. It splices in
    `model.config`'s parts: see AUDIO."""
    trained = load_checkpoint(Path(SOURCES["toy"]["diffa2"]))
    model = weights.build(trained.config)
    weights.restore(model, trained.model, "the checkpoint")
    return model.eval(), load_tokenizer(trained.config)


AUDIO = SIZES["toy"][1][4].audio  # what stage 4 splices into the prompt


def toy_pairs(folder: Path, n: int, seed: int, evaluation: bool = False) -> list[Example]:
    """n pairs of answers to questions about toy scenes, of training or of `evaluation`. Their clips
    are written to `folder`."""
    rng, pairs = np.random.default_rng(seed), []
    while len(pairs) < n:
        kind = str(rng.choice(("speech", "sound", "music")))
        scene = toy_text.random_scene(rng, kind, evaluation)
        question = toy_text.random_question(scene, rng, {}, share_lettered=0.0)
        if question.wrong:
            path = Path(folder) / f"{seed}_{len(pairs)}.wav"
            write_clip(path, synthesize(scene, rng)[0])
            pairs.append(Example(path, question.instruction, question.answer,
                                 str(rng.choice(question.wrong)), question.type, kind))
    return pairs


@contextmanager
def picture(name: str, width: float = 7, height: float = 3, rows: int = 1,
            columns: int = 1) -> Iterator:
    """Axes, or an array of them, to draw on; shown when the block ends, transparent and with
    grey lines, so that it can be read on white and on black. Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns)
    yield axes
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(which="both", colors=GREY)
        for part in (*axis.spines.values(), axis.title, axis.xaxis.label, axis.yaxis.label):
            part.set_color(GREY)
        if axis.get_legend():
            axis.legend(labelcolor=GREY, framealpha=0, fontsize=8)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    show(name, file.getvalue())


class Drawing:
    """A picture that a notebook shows below its cell."""

    def __init__(self, svg: str):
        self.svg = svg

    def _repr_svg_(self) -> str:
        return self.svg


def show(name: str, svg: str) -> None:
    """Below its cell in a notebook; else in the folder that build.py names, or in runs/pictures,
    which git ignores."""
    told = os.environ.get("TUTORIAL_PICTURES")
    if not told and "ipykernel" in sys.modules:
        builtins.display(Drawing(svg))
        return
    path = Path(told or ROOT / "runs" / "pictures") / f"{name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg, encoding="utf-8")
    if not told:
        print(f"picture: {path}")


def box(axes: Axes, at: tuple[float, float], width: float, text: str, colour: str,
        height: float = 0.9) -> None:
    """A rounded box of this colour around the point `at`, with text in it."""
    x, y = at
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor="none",
                       edgecolor=colour, linewidth=1.8, boxstyle="round,pad=0,rounding_size=0.12"))
    axes.text(x, y, text, color=GREY, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], stop: tuple[float, float], text: str = "",
          at: tuple[float, float] = (0, 0), bend: float = 0.0) -> None:
    """An arrow from start to stop, and text that stands `at` from its middle."""
    axes.annotate(
        "", stop, start, arrowprops=dict(arrowstyle="-|>", color=GREY, shrinkA=0, shrinkB=0,
                                         connectionstyle=f"arc3,rad={bend}"))
    middle = (start[0] + stop[0]) / 2 + at[0], (start[1] + stop[1]) / 2 + at[1]
    axes.text(*middle, text, color=GREY, ha="center", va="center", fontsize=8)
