"""The script that checks the real weights, on files of a small shape."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import check_published
import pytest
from test_published import CLIP, CONFIG, GOLDEN, published, trained  # noqa: F401 (fixtures)

from diffa2_mini import config as configs
from diffa2_mini.model import Diffa2Model, part_of
from diffa2_mini.published.sources import SOURCES


def test_the_check_on_the_real_weights_runs_to_its_last_step(published, tmp_path, monkeypatch,
                                                             capsys):
    """On files of CONFIG, whose hash and counts it is told; what it cannot pass is the
    transcript."""
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(CONFIG, size="full")
    monkeypatch.setitem(configs.SIZES, "full", (config, {}))
    for part, path in published.items():
        shutil.copytree(path, Path("weights", SOURCES["full"][part]))
    file = published["diffa2"] / "pytorch_model.bin"
    monkeypatch.setattr(check_published, "SHA256",
                        {file.name: hashlib.sha256(file.read_bytes()).hexdigest()})
    special = json.loads(
        (GOLDEN / "tokenizer_gpt2.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in special}
    monkeypatch.setattr(check_published, "SPECIAL", (ids["<|endoftext|>"], ids["<|mdm_mask|>"]))
    model = Diffa2Model(CONFIG)
    model.add_lora()
    counts = dict.fromkeys(check_published.COUNTS, 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        counts[part_of(name)] += tensor.numel()
    monkeypatch.setattr(check_published, "COUNTS", counts)
    command = [str(CLIP), "--says", "three one four", "--no-reference", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        check_published.main(command)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert ended.value.code == 1 and [line[:5] for line in lines] == ["ok   "] * 6 + ["WRONG"]
    assert "transcript" in lines[-1]
    monkeypatch.setattr(check_published, "SHA256", {file.name: "0" * 64})
    with pytest.raises(SystemExit):
        check_published.main(command)
    assert capsys.readouterr().out.splitlines()[1].startswith("WRONG  SHA-256")
