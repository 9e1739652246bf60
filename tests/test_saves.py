"""A backbone that is stopped on its way goes on as if nothing had happened; with other settings, or
a damaged file, that is a line."""

from dataclasses import asdict, replace

import pytest
import torch

from data.pretraining import backbone
from data.pretraining.config import PretrainConfig
from data.pretraining.saves import NOT_SAVED, Saves
from diffa2_mini.config import SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.model import Diffa2Model

TOY = SIZES["toy"][0]
CONFIG = PretrainConfig(recall_steps=2, backbone_steps=4, silence_steps=2, backbone_batch=3,
                        n_held_out=4)


class Cut(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(backbone, "report", lambda *args: "")


def trained(saves: Saves = NOT_SAVED, cut_at: int | None = None) -> tuple[Diffa2Model, float]:
    steps = []

    def loss_of(*args):
        steps.append(1)
        if len(steps) == cut_at:
            raise Cut
        return backbone.text_loss(*args)

    torch.manual_seed(len(steps))
    model = Diffa2Model(TOY)
    loss = backbone.pretrain_backbone(
        model, CONFIG, 0, lambda line: None, saves=saves,
        paradigm=replace(backbone.MASKED_DIFFUSION, text_loss=loss_of))
    return model, loss


def test_a_backbone_goes_on_where_it_was_stopped(tmp_path):
    whole, loss = trained()
    saves = Saves(tmp_path / "partial.safetensors", 2, True, TOY, asdict(CONFIG))
    with pytest.raises(Cut):
        trained(saves, cut_at=6)  # after five steps, of which four are saved
    again, same = trained(saves, cut_at=3)  # no more than two are left
    assert same == loss
    for name, tensor in whole.llada.state_dict().items():
        assert torch.equal(again.llada.state_dict()[name], tensor)
    saves.remove()
    assert not any(tmp_path.iterdir())


def test_without_resume_it_begins_anew(tmp_path):
    saves = Saves(tmp_path / "partial.safetensors", 2, False, TOY, asdict(CONFIG))
    with pytest.raises(Cut):
        trained(saves, cut_at=4)
    with pytest.raises(Cut):
        trained(saves, cut_at=6)  # it has all its steps before it


def test_what_cannot_go_on_is_a_line(tmp_path):
    saves = Saves(tmp_path / "partial.safetensors", 2, True, TOY, asdict(CONFIG))
    with pytest.raises(Cut):
        trained(saves, cut_at=4)
    with pytest.raises(UserError, match="was trained with backbone batch 3, got 4; leave out"):
        trained(replace(saves, settings=asdict(replace(CONFIG, backbone_batch=4))))
    saves.path.write_bytes(saves.path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off or damaged"):
        trained(saves)
