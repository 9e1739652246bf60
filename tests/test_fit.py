"""The adapters of small start on standardised taps, clips apart, at the mean word; once, and for
good."""

import dataclasses
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import MICRO, examples, features_of  # noqa: F401  (a fixture)

from data.pretraining.fit import fit, fit_new_adapters
from diffa2_mini import weights
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training.objective import set_dropout
from diffa2_mini.training.processes import World


def new_model(fitted: bool) -> Diffa2Model:
    torch.manual_seed(0)
    adapter = dataclasses.replace(MICRO.adapter, fitted=fitted)
    return Diffa2Model(dataclasses.replace(MICRO, adapter=adapter)).eval()


@torch.no_grad()
def test_fitted_adapters_read_standardised_taps_and_give_the_mean_word():
    plain, fitted = new_model(False), new_model(True)
    clips = list((torch.randn(2, 300, 8) * torch.arange(8) + 3).split([40, 160, 100], dim=1))
    taps = torch.cat(clips, dim=1)  # its first channel is constant
    before = fitted.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    fit(fitted, clips)
    changed = {name for name, tensor in fitted.state_dict().items()
               if not torch.equal(tensor, before[name])}
    layers = range(len(fitted.acoustic_connector.qformer))
    assert changed == {
        "acoustic_connector.mean", "acoustic_connector.std", "acoustic_connector.proj.1.bias",
        "semantic_connector.layernorm.bias",
        *(f"acoustic_connector.qformer.{i}.crossattention.dense.weight" for i in layers)}
    plain.load_state_dict({name: tensor for name, tensor in fitted.state_dict().items()
                           if name in plain.state_dict()})
    std, mean = torch.std_mean(taps, 1, correction=0, keepdim=True)
    scaled = (taps - mean) / std.clamp_min(1e-5)
    torch.testing.assert_close(fitted.acoustic_connector(taps[None]),
                               plain.acoustic_connector(scaled[None]))
    embeddings, _ = fitted.semantic_connector(torch.randn(1, 40, 8), torch.tensor([40]))
    mean_word = fitted.llada.wte.weight.mean(0)
    torch.testing.assert_close(embeddings.mean(-1), mean_word.mean().expand(1, 10))
    assert torch.equal(fitted.acoustic_connector.proj[1].bias, mean_word)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_what_attention_adds_differs_between_clips_by_one(training):
    """In each layer, though dropout may be on."""
    clips = [torch.randn(2, n, 8) + torch.randn(2, 1, 8) for n in (20, 60, 40, 90)]
    found, added = new_model(True).train(training), {}
    set_dropout(found.acoustic_connector, 0.5)
    fit(found, clips)
    assert found.acoustic_connector.training == training
    layers = found.eval().acoustic_connector.qformer
    for i, layer in enumerate(layers):
        layer.crossattention.dense.register_forward_hook(
            lambda *call, i=i: added.setdefault(i, []).append(call[-1]))
    for clip in clips:
        found.acoustic_connector(clip[None])
    for i in range(len(layers)):
        torch.testing.assert_close(torch.stack(added[i]).var(0).mean(), torch.tensor(1.0))


@torch.no_grad()
def test_adapters_are_fitted_once_and_only_where_the_size_asks_for_it(examples):  # noqa: F811
    for fitted in (False, True):
        model = new_model(fitted)
        run = SimpleNamespace(model=model, features=features_of(model, True), world=World())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit_new_adapters(run, examples)
        assert fitted != all(torch.equal(tensor, before[name])
                             for name, tensor in model.state_dict().items())
    n_sound = sum(int(run.features.get(each.path).n_frames) for each in examples)
    taps = torch.cat([run.features.get(each.path).taps[:, :run.features.get(each.path).n_frames]
                      for each in examples], dim=1)
    assert taps.shape[1] == n_sound < 50 * len(examples)  # padding is passed over
    torch.testing.assert_close(model.acoustic_connector.mean[:, 0], taps.mean(1))
    torch.testing.assert_close(model.acoustic_connector.std[:, 0], taps.std(1, correction=0))
    saved = {name: tensor.clone() for name, tensor in weights.trained_tensors(model).items()}
    fit_new_adapters(run, examples[:2])
    assert all(torch.equal(tensor, saved[name])
               for name, tensor in weights.trained_tensors(model).items())
    other = new_model(True)
    weights.restore(other, saved, "a checkpoint")
    audio = run.features([each.path for each in examples])
    for one, same in zip(model.embed_audio(audio, ("acoustic",)),
                         other.embed_audio(audio, ("acoustic",))):
        assert torch.equal(one, same)


def clips_of(number: int, examples: list, get) -> tuple[list, dict, object]:
    """Examples of `number` clips, each with two questions; which clips are read; what reads."""
    more = [dataclasses.replace(examples[i % 4], path=Path(f"{i}.wav")) for i in range(number)]
    read = Counter()

    def reads(path):
        read[path] += 1
        return get(examples[int(path.stem) % 4].path)
    return [each for one in more for each in (one, one)], read, reads


def test_some_clips_of_all_the_manifest_are_read(examples):  # noqa: F811
    """Of all corpora of a manifest, which come one after the other; and each clip is read once,
    however many questions it has."""
    model = new_model(True)
    features = features_of(model, True)
    asked, read, features.get = clips_of(300, examples, features.get)
    fit_new_adapters(SimpleNamespace(model=model, features=features, world=World()), asked)
    assert 32 < len(read) <= 64 and {*read.values()} == {1}
    assert max(int(path.stem) for path in read) >= 290


@torch.no_grad()
def test_clips_that_do_not_differ_leave_the_attention_as_it_is():
    """One clip, or one several times: between them nothing varies."""
    clip = torch.randn(2, 20, 8)
    for clips in ([clip], [clip] * 3, [clip[:, :1]]):
        model = new_model(True)
        dense = model.acoustic_connector.qformer[0].crossattention.dense
        before = dense.weight.clone()
        fit(model, clips)
        assert torch.equal(dense.weight, before)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_clips_that_cannot_be_read_are_left_out(examples, tmp_path):  # noqa: F811
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    broken = dataclasses.replace(examples[0], path=tmp_path / "broken.wav")
    means = []
    for asked in (examples, [broken, *examples], [broken]):
        model = new_model(True)
        run = SimpleNamespace(model=model, features=features_of(model, True), world=World())
        fit_new_adapters(run, asked)
        means.append(model.acoustic_connector.mean)
    assert torch.equal(means[0], means[1]) and not means[2].any()


@pytest.mark.parametrize("fitted", [False, True])
def test_what_is_fitted_is_in_every_checkpoint(fitted):
    names = weights.trained_tensors(new_model(fitted))
    assert fitted == ("acoustic_connector.std" in names)
    assert not any(name.startswith(("whisper", "llada")) for name in names)
