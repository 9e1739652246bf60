"""The claims at toy scale: every experiment gives cells once, and a verdict follows from the cells
alone."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mini import ROOT, SECONDS

from data import toy
from diffa2_mini import weights
from diffa2_mini.command.script import run_script
from diffa2_mini.errors import UserError
from diffa2_mini.published.sources import load_tokenizer
from diffa2_mini.training.files import save_tensors
from tutorials import claims, claims_pictures, claims_table
from tutorials.autoregressive import answer_tokens
from tutorials.claims_lab import CONFIG, QUICK, Scale, long_questions
from tutorials.claims_table import (
    HIDES,
    OPPOSITE,
    SHOWS,
    Comparison,
    judge,
    numbers,
    summary,
    table,
    together,
    verdict,
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A run of a few steps on a handful of clips; its folder, what it printed, and the command.
    "cost" has a world of its own, whose splits stand in their places in `toy.SPLITS`: its long
    answers are about scenes that are drawn anew."""
    out, printed = tmp_path_factory.mktemp("claims"), ""
    splits = {"train": (8, 4, 4), "evaluation": (2, 2, 2), "stage0": (1, 1, 1)}
    others = [name for name in claims.experiments(QUICK) if name != "cost"]
    for names, order in ((["cost"], list(toy.SPLITS)[:3]), (others, list(splits))):
        world = tmp_path_factory.mktemp("world")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(toy, "SPLITS", {name: splits[name] for name in order})
            patch.setattr(toy, "N_PER_TYPE", 2)
            patch.setattr(toy, "N_PAIRS", 8)
            toy.make_world(world)
        command = [sys.executable, str(ROOT / "tutorials" / "claims.py"), "--quick", "--threads",
                   "1", "--data", str(world), "--out", str(out)]
        done = subprocess.run([*command, "--only", *names, "--work", str(out / f"work_{names[0]}")],
                              capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    (out / f"work_{others[0]}").rename(out / "work")
    return out, printed, command


def cells_in(out):
    return [json.loads(path.read_text()) for path in sorted((out / "cells").iterdir())]


@pytest.mark.slow
def test_every_experiment_yields_its_cells_with_finite_numbers(quick):
    out, printed, _ = quick
    found = {(cell["experiment"], cell["setting"]) for cell in cells_in(out)}
    assert found == {(experiment, setting)
                     for experiment, settings in claims.experiments(QUICK).items()
                     for setting in settings}
    for cell in cells_in(out):
        assert cell["seed"] == 0 and all(math.isfinite(value)
                                         for value in numbers(cell).values()), cell
        assert any(name in cell for name in ("overall", "variance", "open"))
    assert printed.count(" s)") == len(found)


@pytest.mark.slow
def test_every_comparison_of_a_claim_is_of_settings_and_figures_that_are_measured(quick):
    settings = claims_table.arrange(cells_in(quick[0]))
    for claim in claims_table.CLAIMS:
        for comparison in claim.comparisons:
            for name in (comparison.more, comparison.less):
                figures = settings[claim.experiment][name][0]
                assert comparison.figure in figures, (claim.experiment, comparison)
    for experiment, names in claims_table.FIGURES.items():
        figures = [by_seed[0] for by_seed in settings[experiment].values()]
        assert all(any(name in each for each in figures) for name in names), experiment


@pytest.mark.slow
def test_what_is_written_sums_the_cells_up_and_one_seed_proves_nothing(quick):
    out, printed, _ = quick
    written = json.loads((out / "claims.json").read_text())
    assert {claim["verdict"] for claim in written["claims"]} == {"not measured yet"}
    both = written["experiments"]["adapters"]["both"]
    assert both["mean"]["overall"] == both["cells"][0]["overall"]
    assert both["spread"]["overall"] is None
    assert all(f"| {claim.claim} |" in printed for claim in claims_table.CLAIMS)


@pytest.mark.slow
def test_a_second_start_measures_nothing_again(quick):
    out, _, command = quick
    before = {
        path: path.stat().st_mtime_ns
        for path in [*(out / "cells").iterdir(), *(out / "work").iterdir()]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    n = len(cells_in(out))
    assert done.returncode == 0 and f"{n} of {n} cells are there" in done.stdout
    assert before == {
        path: path.stat().st_mtime_ns
        for path in [*(out / "cells").iterdir(), *(out / "work").iterdir()]}


@pytest.mark.slow
def test_the_variants_differ_in_what_they_say(quick):
    of = {(cell["experiment"], cell["setting"]): cell for cell in cells_in(quick[0])}
    lora = {
        setting: of["lora", setting]["trained"]
        for setting in ("rank 0", "rank 2", "rank 8", "rank 32")}
    assert sorted(lora.values()) == list(lora.values()) and len(set(lora.values())) == 4
    halves = [of["lora", half]["trained"] for half in ("attention", "feed-forward")]
    assert sum(halves) - lora["rank 0"] == lora["rank 8"]
    parts = {
        setting: of["adapters", setting]["trained"]
        for setting in ("semantic", "acoustic", "both")}
    assert parts["semantic"] + parts["acoustic"] == parts["both"]
    assert [of["autoregressive", f"diffusion, {size}"]["clips"]
            for size in ("few clips", "more clips", "all clips")] == [2, 4, 16]
    assert of["factor", "16 steps"]["forward_passes"] == 16
    assert 1 <= of["factor", "f = 4"]["forward_passes"] <= 16
    assert of["vrpo",
              "4 x 1, shared"]["variance"] < of["vrpo", "4 x 1, independent"]["variance"] / 5


def test_long_answers_have_16_tokens_where_four_digits_are_spoken(world, tmp_path):
    tokenizer, lengths = load_tokenizer(CONFIG), set()
    for question in long_questions(world, "train"):
        response = torch.tensor([tokenizer.response(question.answer, 16)])
        n_digits = int(question.answer.split(" digits")[0].split()[-1])
        assert answer_tokens(response, tokenizer).sum() == 12 + n_digits
        assert question.path.is_file() and question.seconds > 0
        lengths.add(n_digits)
    assert 4 in lengths
    data = shutil.copytree(world, tmp_path / "other")
    rows = json.loads((data / "sft.json").read_text())
    others = [row | {"transcription": f"{row['transcription']} nine"} for row in rows]
    (data / "sft.json").write_text(json.dumps(others))
    with pytest.raises(UserError, match="expected the toy world as"):
        long_questions(data, "train")


@pytest.mark.slow
def test_the_twin_has_a_stage_4_that_starts_from_what_stage_3_left(quick):
    of = {(cell["experiment"], cell["setting"]): cell for cell in cells_in(quick[0])}
    before, after = (of["whole", f"autoregressive, stages 1 to {n}"] for n in (3, 4))
    assert before["trained"] == after["trained"] and "reward_accuracy" not in before
    assert 0 <= after["reward_accuracy"] <= 1 and after["margin"] != 0


def test_a_verdict_needs_every_seed_and_a_difference_beyond_the_spread():
    assert verdict([0.10, 0.11, 0.12]) == SHOWS
    assert verdict([0.10, 0.11]) == "not measured yet"
    assert verdict([0.10, 0.11], n_seeds=2) == SHOWS  # .105 - 6.31 (.00707 / sqrt 2) > 0
    assert verdict([0.10, 0.16], n_seeds=2) == HIDES  # .130 - 6.31 (.0424 / sqrt 2) < 0
    assert verdict([0.30, -0.10, 0.05]) == HIDES
    assert verdict([-0.10, -0.11, -0.12]) == OPPOSITE
    assert verdict([0.0, 0.0, 0.0]) == HIDES
    assert verdict([-0.001, 0.001, 0.0], margin=0.02) == SHOWS  # as good, though not better
    assert verdict([-0.03, -0.031, -0.029], margin=0.02) == OPPOSITE
    limit = 2.92 * np.std([0.0, 1.0, 2.0], ddof=1) / math.sqrt(3)  # Student's t, one-sided, 95 %
    assert verdict([limit + x for x in (-0.999, 0.001, 1.001)]) == SHOWS
    assert verdict([limit + x for x in (-1.001, -0.001, 0.999)]) == HIDES


def made_up(a, b, figure="overall"):
    return [{"experiment": "adapters", "setting": setting, "seed": seed, figure: value}
            for setting, values in (("both", a), ("semantic", b), ("acoustic", b))
            for seed, value in enumerate(values)]


def test_a_claim_is_stated_from_its_cells():
    shows = made_up([0.8, 0.82, 0.81], [0.6, 0.63, 0.61])
    assert summary(shows)["claims"][0]["verdict"] == SHOWS
    row = table(shows).splitlines()[2]
    assert "**shows**" in row and "0.81 ± 0.01 against 0.613 ± 0.015, *shows*" in row
    assert summary(made_up([0.8, 0.5, 0.81], [0.6, 0.63, 0.61]))["claims"][0]["verdict"] == HIDES
    assert "does not show at this scale" in table(made_up([0.6, 0.6, 0.6], [0.6, 0.6, 0.6]))
    spread = summary(shows)["experiments"]["adapters"]["both"]["spread"]
    assert spread["overall"] == pytest.approx(0.01)


def test_the_page_of_claims_shows_what_was_measured():
    cells = cells_in(ROOT / "tutorials" / "results")
    page = (ROOT / "tutorials" / "reference" / "claims.md").read_text(encoding="utf-8")
    assert table(cells) in page
    found = claims_table.arrange(cells)
    for experiment, settings in claims.experiments(Scale()).items():
        seeds = {*claims.SEEDS_OF.get(experiment, claims.SEEDS)}  # all, or not one cell
        assert experiment not in found or settings.keys() <= found[experiment].keys()
        assert all(found[experiment][name].keys() == seeds
                   for name in settings if experiment in found)
    written = json.loads((ROOT / "tutorials" / "results" / "claims.json").read_text())
    assert written == json.loads(json.dumps(summary(cells)))
    verdicts = [found for row in page.splitlines() if " | No" not in row  # claim of the paper
                for found in re.findall(rf", \*({SHOWS}|{OPPOSITE}|{HIDES})\b", row)]
    assert (f"{verdicts.count(SHOWS)} of {len(verdicts)} comparisons show at toy scale, and of "
            f"{verdicts.count(OPPOSITE)} the opposite") in (ROOT / "README.md").read_text("utf-8")


def test_seeds_are_paired_and_small_figures_compared_as_ratios():
    settings = {"a": {0: {"overall": 0.5}, 1: {"overall": 0.7}, 2: {"overall": 0.9}},
                "b": {0: {"overall": 0.49}, 1: {"overall": 0.69}, 2: {"overall": 0.88}}}
    # though the spread is far larger
    assert judge(Comparison("", "a", "b"), settings)["verdict"] == SHOWS
    variances = {"a": {seed: {"variance": 10.0 ** seed} for seed in range(3)},
                 "b": {seed: {"variance": 10.0 ** seed / 4} for seed in range(3)}}
    assert judge(Comparison("", "a", "b", "variance"), variances)["verdict"] == SHOWS
    assert judge(Comparison("", "b", "a", "variance"), variances)["verdict"] == OPPOSITE


def test_some_comparisons_are_a_claim_in_part():
    assert together([SHOWS, SHOWS]) == SHOWS
    assert together([HIDES, SHOWS, OPPOSITE,
                     HIDES]) == "shows in 1 of 4, the opposite in 1, neither in 2"
    assert together([HIDES, OPPOSITE]) == "shows in 0 of 2, the opposite in 1, neither in 1"
    assert together([OPPOSITE, OPPOSITE]) == OPPOSITE


def test_the_fixed_schedule_is_compared_at_as_many_passes():
    cells = [{
        "experiment": "factor", "setting": setting, "seed": 0, "forward_passes": passes,
        "overall": right
    } for setting, passes, right in (("f = 1", 1.5, 0.9), ("1 steps", 1, 0.4), ("2 steps", 2, 0.8),
                                     ("16 steps", 16, 0.9))]
    found = claims_table.arrange(cells)["factor"][claims_table.SAME_PASSES][0]
    assert found["overall"] == pytest.approx(0.6) and found["forward_passes"] == 1.5


@pytest.mark.slow
def test_pictures_are_drawn_of_what_is_there(quick, tmp_path):
    pytest.importorskip("matplotlib")
    paths = claims_pictures.draw(cells_in(quick[0]), tmp_path)
    assert {path.name
            for path in paths} == {
                f"claims_{experiment}.svg"
                for experiment in claims.experiments(QUICK)}
    assert all("<svg" in path.read_text()[:2000] for path in paths)
    assert claims_pictures.draw(made_up([0.8], [0.6])[:0], tmp_path) == []


@pytest.fixture
def two_cells(monkeypatch):
    """Two experiments that measure nothing."""
    setting = claims.Setting(lambda lab, seed: {"variance": 1.0})
    cells = {"vrpo": {"a": setting, "b": setting}}
    monkeypatch.setattr(claims, "experiments", lambda scale: cells)
    monkeypatch.setattr(claims_pictures, "draw", lambda found, out: [])


@pytest.mark.parametrize("change", ["data", "weights", "settings", "an earlier version"])
def test_what_was_made_of_other_things_is_not_mixed_in(
        change, world, two_cells, tmp_path, monkeypatch, capsys):
    data, out = shutil.copytree(world, tmp_path / "world"), tmp_path / "out"
    arguments = ["--quick", "--data", str(data), "--out", str(out)]
    assert run_script(claims.main, arguments) == 0
    (out / "cells" / "vrpo-b-0.json").unlink()
    assert run_script(claims.main, arguments) == 0 and "1 of 2 cells" in capsys.readouterr().out
    (out / "cells" / "vrpo-b-0.json").unlink()
    if change == "data":
        rows = json.loads((data / "sft.json").read_text())
        (data / "sft.json").write_text(json.dumps(rows[1:]))
    elif change == "weights":
        tensors = weights.read_tensors(weights.SHIPPED["llada"], "a backbone")[0]
        save_tensors(tmp_path / "other", {n: t + 1 for n, t in tensors.items()}, {})
        monkeypatch.setitem(weights.SHIPPED, "llada", tmp_path / "other")
    elif change == "settings":
        monkeypatch.setattr(claims, "QUICK", replace(QUICK, batch_size=3))
    else:
        (out / "work" / "stage_1-0.safetensors").write_text("a model")
        (out / "work" / "made_of").unlink()
    assert run_script(claims.main, arguments) == 2
    assert "work: holds models of another version, world or scale" in capsys.readouterr().err
    if change != "an earlier version":
        work = ["--work", str(tmp_path / "work")]
        assert run_script(claims.main, [*arguments, *work]) == 2
        error = capsys.readouterr().err
        assert "vrpo-a-0.json: was measured with another" in error and error.count("\n") == 1
    assert not (out / "cells" / "vrpo-b-0.json").exists()


def test_shares_have_each_cell_once_and_what_needs_the_same_training_together():
    scale = Scale()
    cells = {(experiment, setting, seed): cell for seed in claims.SEEDS
             for experiment, settings in claims.experiments(scale).items()
             for setting, cell in settings.items()}
    shares = [claims.share(cells, scale, number, 5) for number in range(1, 6)]
    assert sum(map(len, shares)) == len(cells) and {*cells} == {key for some in shares
                                                                for key in some}
    found, roots = claims.variants(scale), {}
    for i, some in enumerate(shares):
        for (_, _, seed), cell in some.items():
            roots.setdefault((*claims.chain(found, cell.needs)[-1:], seed), set()).add(i)
    assert all(len(who) == 1 for who in roots.values())
    assert claims.share(cells, scale, 1, 1) == cells


@pytest.fixture
def few_cells(monkeypatch):
    """Stage 2 of both models, and one question about an answer's cost."""
    cells = claims.twin(QUICK)
    kept = {"learning": ("diffusion, low variance", "autoregressive")}
    monkeypatch.setattr(claims, "experiments", lambda scale: {
        name: {setting: cells[name][setting] for setting in some} for name, some in kept.items()})


@pytest.mark.slow
def test_processes_that_share_leave_out_what_needs_a_backbone_that_is_not_there(
        world, few_cells, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(claims, "pretrain_autoregressive", lambda *what: made.append(what))
    quick = ["--quick", "--data", str(world), "--out", str(tmp_path)]
    for number in ("1/2", "2/2"):
        assert run_script(claims.main, [*quick, "--share", number]) == 0
    assert "make it by --backbone" in capsys.readouterr().out and not made
    (cell,) = cells_in(tmp_path)
    assert cell["setting"] == "diffusion, low variance" and cell["targets"] > 0
    assert [passes for passes, _ in cell["on_the_way"]] == sorted(
        passes for passes, _ in cell["on_the_way"])
    assert run_script(claims.main, [*quick, "--backbone"]) == 0
    assert made[0][0] == tmp_path / "work" / claims.BACKBONE


@pytest.mark.parametrize("arguments, message", [
    (["--share", "0/2"], "--share must be I/N, with I from 1 to N, got 0/2"),
    (["--share", "half"], "--share must be I/N"),
    (["--quick"], "--quick needs --out"), (["--only", "nothing"], "--only"),
    (["--threads", "0"], "--threads must be from 1 to 1024, got 0"),
    (["--table", "--out", "/no/such/folder"], "no cell is measured yet")])
def test_what_a_user_gets_wrong_is_one_line(arguments, message, capsys):
    assert run_script(claims.main, arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
