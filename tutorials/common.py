"""What the chapters share: the way to the library, the shipped model, and one style of picture."""

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from matplotlib import rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a chapter runs without installing the package

from diffa2_mini import checkpoint, weights
from diffa2_mini.config import SIZES
from diffa2_mini.model import Diffa2
from diffa2_mini.tokenizer import Tokenizer

CLIPS = ROOT / "data" / "clips"
PICTURES = Path(__file__).parent / "pictures"
GREY, COLOURS = "#808080", ("#3b82c4", "#d9822b", "#4a9c5d", "#a05fb4")  # to be read on white and on black
rcParams["svg.hashsalt"] = "diffa2_mini"  # the same picture is the same file
torch.manual_seed(0)


def shipped() -> tuple[Diffa2, Tokenizer]:
    """The toy model after its four stages, as shipped, and its tokenizer. It splices in `model.config`'s parts: see AUDIO."""
    trained = checkpoint.load(Path(weights.SOURCES["toy"]["diffa2"]))
    model = weights.build(trained.config)
    checkpoint.restore(model, trained.model, "the checkpoint")
    return model.eval(), weights.load_tokenizer(trained.config)


AUDIO = SIZES["toy"][1][4].audio  # what stage 4 splices into the prompt


@contextmanager
def picture(name: str, width: float = 7, height: float = 3, rows: int = 1, columns: int = 1) -> Iterator:
    """Axes, or an array of them, to draw on; saved to pictures/NAME.svg when the block ends, transparent and with grey lines,
    so that it can be read on white and on black. Sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, columns)
    yield axes
    for axis in figure.axes:
        axis.patch.set_alpha(0)
        axis.tick_params(colors=GREY)
        for part in (*axis.spines.values(), axis.title, axis.xaxis.label, axis.yaxis.label):
            part.set_color(GREY)
        if axis.get_legend():
            axis.legend(labelcolor=GREY, framealpha=0, fontsize=8)
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
