"""How the adapters of small start: fitted to the encoder and to the backbone that they connect.

* The mean over all frames has three quarters of the power of Whisper's second block. On such states
  the acoustic adapter collapses: it gives every clip the same embeddings. So it standardises them.
* All words that the backbone knows have one direction in common (backbone.py), by which its first
  block finds their neighbours. So both adapters give the mean word at first, and learn the rest.

Nothing of this is in DIFFA-2.
"""

import torch
from torch import Tensor

from diffa2_mini.data import Example
from diffa2_mini.model import Diffa2Model
from diffa2_mini.training.run import Run

N_CLIPS = 64


@torch.no_grad()
def fit(model: Diffa2Model, taps: Tensor) -> None:
    """Fit new adapters to the backbone, and to an encoder whose taps have the states [N, F, E]."""
    acoustic, mean_word = model.acoustic_connector, model.llada.wte.weight.float().mean(0)
    std, mean = torch.std_mean(taps.float(), dim=1, keepdim=True)
    acoustic.mean.copy_(mean)
    acoustic.std.copy_(std.clamp_min(1e-5))  # a channel may be constant
    acoustic.proj[1].bias.copy_(mean_word)
    model.semantic_connector.layernorm.bias.copy_(mean_word)


def fit_new_adapters(run: Run, examples: list[Example]) -> None:
    """Fit the adapters where the size asks for it and they are not yet, to sound in `N_CLIPS` of
    the clips of `examples`. All processes get the same."""
    acoustic = run.model.acoustic_connector
    if not acoustic.config.fitted or acoustic.mean.any():
        return
    audios = [run.features.get(each.path) for each in examples[::-(-len(examples) // N_CLIPS)]]
    fit(run.model, torch.cat([audio.taps[:, :audio.n_frames] for audio in audios], dim=1))
    run.world.broadcast_parameters([*acoustic.buffers(), acoustic.proj[1].bias,
                                    run.model.semantic_connector.layernorm.bias])
