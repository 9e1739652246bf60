"""How the adapters of small start: fitted to the encoder and to the backbone that they connect.

* The mean over all frames has three quarters of the power of Whisper's second block. On such states
  the acoustic adapter collapses: it gives every clip the same embeddings. So it standardises them.
* What its queries add up over many frames still differs between clips by an eighth of what the
  queries themselves are, and the backbone learnt to overlook such noise. So each layer's
  attention to the frames is scaled until clips differ by 1 (as in arXiv 1511.06422).
* All words that the backbone knows have one direction in common (backbone.py), by which its first
  block finds their neighbours. So both adapters give the mean word at first, and learn the rest.

Nothing of this is in DIFFA-2.
"""

from contextlib import suppress

import torch
from torch import Tensor

from diffa2_mini.adapters import AcousticAdapter
from diffa2_mini.data import Example
from diffa2_mini.errors import UserError
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training.run import Run

N_CLIPS = 64


def fit_attention(acoustic: AcousticAdapter, taps: list[Tensor]) -> None:
    """Scale what each layer's attention to frames adds, first layer first, until its variance
    between clips is 1 on average."""
    was_training = acoustic.training
    acoustic.eval()  # no dropout
    for layer in acoustic.qformer:
        added, dense = [], layer.crossattention.dense
        hook = dense.register_forward_hook(lambda *call, to=added: to.append(call[-1]))
        for each in taps:
            acoustic(each[None], torch.tensor([each.shape[1]], device=each.device))
        hook.remove()
        deviation = torch.stack(added).var(0).mean().sqrt() if len(added) > 1 else 0.0
        if deviation > 1e-5:  # there are several clips, and they differ
            dense.weight /= deviation
    acoustic.train(was_training)


@torch.no_grad()
def fit(model: Diffa2Model, taps: list[Tensor]) -> None:
    """Fit new adapters to the backbone, and to an encoder whose taps have such states, [N, F, E] of
    each clip."""
    acoustic, mean_word = model.acoustic_connector, model.llada.wte.weight.float().mean(0)
    taps = [each.to(acoustic.mean) for each in taps]
    std, mean = torch.std_mean(torch.cat(taps, dim=1), dim=1, correction=0, keepdim=True)
    acoustic.mean.copy_(mean)
    acoustic.std.copy_(std.clamp_min(1e-5))  # a channel may be constant
    fit_attention(acoustic, taps)
    acoustic.proj[1].bias.copy_(mean_word)
    model.semantic_connector.layernorm.bias.copy_(mean_word)


def fit_new_adapters(run: Run, examples: list[Example]) -> None:
    """Fit the adapters where the size asks for it and they are not yet, to sound in `N_CLIPS` of
    the clips of `examples` that can be read. All processes get the same."""
    acoustic, taps = run.model.acoustic_connector, []
    if not acoustic.config.fitted or acoustic.mean.any():
        return
    paths = [*dict.fromkeys(each.path for each in examples)]
    for path in paths[::-(-len(paths) // N_CLIPS)]:
        with suppress(UserError):  # training tells or leaves out what is broken
            audio = run.features.get(path)
            taps += [audio.taps[:, :audio.n_frames]] * bool(audio.n_frames)
    if taps:
        fit(run.model, taps)
    run.world.broadcast_parameters([*acoustic.buffers(), *acoustic.parameters(),
                                    run.model.semantic_connector.layernorm.bias])
