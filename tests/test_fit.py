"""The adapters of small start whitened, and at the mean word; once, and wherever they go on."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from test_data import MICRO, examples, features_of  # noqa: F401  (a fixture)

from data.pretraining.fit import FLOOR, fit, fit_new_adapters, whitening
from diffa2_mini import weights
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training.processes import World


def new_model(fitted: bool) -> Diffa2Model:
    torch.manual_seed(0)
    adapter = dataclasses.replace(MICRO.adapter, fitted=fitted)
    return Diffa2Model(dataclasses.replace(MICRO, adapter=adapter)).eval()


def test_whitened_states_have_mean_0_and_covariance_1_where_they_vary():
    variances = torch.tensor([9.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    directions = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    states = torch.randn(5000, 4, dtype=torch.float64)
    states = (states - states.mean(0)) @ torch.linalg.cholesky(states.T.cov()).inverse().T
    states = states * variances.sqrt() @ directions.T + 5
    mean, matrix = whitening(states)
    white = (states - mean) @ matrix
    expected = variances / (variances + FLOOR * variances.mean())
    torch.testing.assert_close(white.mean(0), torch.zeros_like(mean))
    torch.testing.assert_close(directions.T @ white.T.cov() @ directions, expected.diag())
    torch.testing.assert_close(mean, torch.full_like(mean, 5))


@torch.no_grad()
def test_fitted_adapters_read_whitened_taps_and_give_the_mean_word():
    plain, fitted = new_model(False), new_model(True)
    taps = torch.randn(2, 300, 8) * torch.arange(1, 9) + 3
    before = fitted.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    fit(fitted, taps)
    changed = {name for name, tensor in fitted.state_dict().items()
               if not torch.equal(tensor, before[name])}
    assert changed == {"acoustic_connector.mean", "acoustic_connector.whitening",
                       "acoustic_connector.proj.1.bias", "semantic_connector.layernorm.bias"}
    plain.load_state_dict({name: tensor for name, tensor in fitted.state_dict().items()
                           if name in plain.state_dict()})
    white = torch.stack([(states - mean) @ matrix for states, (mean, matrix)
                         in zip(taps, map(whitening, taps))])
    torch.testing.assert_close(fitted.acoustic_connector(taps[None]),
                               plain.acoustic_connector(white[None]), atol=1e-4, rtol=1e-4)
    embeddings, _ = fitted.semantic_connector(torch.randn(1, 40, 8), torch.tensor([40]))
    mean_word = fitted.llada.wte.weight.mean(0)
    torch.testing.assert_close(embeddings.mean(-1), mean_word.mean().expand(1, 10))
    assert torch.equal(fitted.acoustic_connector.proj[1].bias, mean_word)


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


def test_some_clips_of_all_the_manifest_are_read(examples):  # noqa: F811
    """Of all corpora of a manifest, which come one after the other; and each clip is read once."""
    model, read = new_model(True), []
    features = features_of(model, True)
    get = features.get
    features.get = lambda path: read.append(path) or get(path)
    run = SimpleNamespace(model=model, features=features, world=World())
    fit_new_adapters(run, examples[:4] * 100)
    assert 32 < len(read) <= 64 and {*read} == {each.path for each in examples[:4]}


@pytest.mark.parametrize("fitted", [False, True])
def test_what_is_fitted_is_in_every_checkpoint(fitted):
    names = weights.trained_tensors(new_model(fitted))
    assert fitted == ("acoustic_connector.whitening" in names)
    assert not any(name.startswith(("whisper", "llada")) for name in names)
