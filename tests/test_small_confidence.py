"""How sure an answer is, and the table by what is in the clips."""

import pytest
import torch
from mini import refused

from data.toy import write_json
from diffa2_mini import Diffa2
from diffa2_mini.command.script import run_script
from diffa2_mini.config import DATA
from diffa2_mini.fast.generate import Step
from diffa2_mini.listen import Answer
from tutorials import small_confidence

EOS, CLIP = 9, DATA / "clips" / "three_one_four.wav"


def step(confidence, committed):
    return Step(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([confidence]),
                torch.tensor([committed]).bool())


@pytest.mark.parametrize("tokens, expected", [
    ([1, 2, EOS, EOS], 0.5),  # what stands behind the EOS does not count
    ([1, EOS, EOS, EOS], 0.75),
    ([1, 2, 3, 4], 0.25),  # there may be none
])
def test_an_answer_is_as_sure_as_its_least_sure_token_when_committed(tokens, expected):
    history = [step([0.75, 0.875, 0.125, 0.0], [1, 1, 0, 0]), step([0, 0, 0.5, 0.25], [0, 0, 1, 1])]
    assert small_confidence.confidence(Answer("", tokens, 2, 0.1, history), EOS) == expected


def test_a_row_for_each_kind_of_clip(tmp_path, monkeypatch, capsys):
    toy = Diffa2.from_pretrained("toy", device="cpu")
    monkeypatch.setattr(Diffa2, "from_pretrained", lambda *_, **__: toy)
    monkeypatch.setattr(small_confidence, "QUESTIONS", ["List the digits.", "How many digits?"])
    arguments = ["--data", str(tmp_path), "--clips", str(CLIP)]
    assert "data/README.md says how to make it" in refused(
        small_confidence.main, capsys, *arguments)
    for corpus, n_rows in (("orders", 3), ("people", 1)):
        (tmp_path / corpus).mkdir()
        write_json(tmp_path / corpus / "test.json", [{
            "audio_filepath": str(CLIP), "input": "?", "target": "a", "type": "b"}] * n_rows)
    assert run_script(small_confidence.main, arguments) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    counts = {row.split("  ")[1]: row.split()[-4] for row in rows}
    assert counts == dict.fromkeys(["an order", "reading", "the clips named", "silence", "noise"],
                                   "2")
    sure = [float(row.split()[-3]) for row in rows]
    assert all(0 < each <= 1 for each in sure) and sure[0] == sure[1] == sure[2]
