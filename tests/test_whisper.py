"""The encoder against torch's own transformer layer, and its hidden states numbered as Hugging Face
does."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from diffa2_mini.whisper import EncoderBlock, WhisperEncoder, sinusoids


def encoder(config, **changes):
    return WhisperEncoder(dataclasses.replace(config.whisper, **changes)).eval()


def sound(config, batch=2):
    return torch.randn(batch, config.whisper.n_mels, 2 * config.whisper.n_positions)


def test_sinusoids_are_sines_then_cosines_of_geometric_rates():
    table = sinusoids(50, 12)
    for p in (0, 1, 49):
        angles = [p / 10_000 ** (i / 5) for i in range(6)]
        np.testing.assert_allclose(table[p], [*np.sin(angles), *np.cos(angles)], atol=1e-5)


def test_the_position_table_travels_with_the_weights_but_is_not_trained(config):
    whisper = encoder(config)
    assert "positional_embedding" in whisper.state_dict()
    assert "positional_embedding" not in dict(whisper.named_parameters())


def test_tap_0_is_the_input_of_the_first_block(config):
    whisper, mel = encoder(config, taps=(0,)), sound(config)
    gelu = nn.functional.gelu
    expected = gelu(whisper.conv2(gelu(whisper.conv1(mel)))).transpose(1, 2) + sinusoids(16, 8)
    torch.testing.assert_close(whisper(mel)[1][:, 0], expected)


def test_tap_i_is_the_output_of_block_i_and_the_last_is_after_the_final_norm(config):
    whisper, mel = encoder(config, taps=(0, 1, 2, 3)), sound(config)
    nn.init.normal_(whisper.ln_post.weight)
    final, taps = whisper(mel)
    x = taps[:, 0]
    for i in (1, 2):
        x = whisper.blocks[i - 1](x)
        torch.testing.assert_close(taps[:, i], x)
    torch.testing.assert_close(taps[:, 3], whisper.ln_post(whisper.blocks[2](x)))
    assert torch.equal(taps[:, 3], final)


def test_taps_come_in_the_order_asked_for(config):
    torch.manual_seed(1)
    one = encoder(config, taps=(3, 0))
    torch.manual_seed(1)
    other = encoder(config, taps=(0, 3))
    mel = sound(config)
    assert torch.equal(one(mel)[1], other(mel)[1].flip(1))


def test_a_block_equals_torchs_pre_norm_transformer_layer():
    block = EncoderBlock(width=8, n_heads=2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    attn = block.attn
    layer = nn.TransformerEncoderLayer(
        8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
    layer.load_state_dict({
        "self_attn.in_proj_weight": torch.cat(
            [attn.query.weight, attn.key.weight, attn.value.weight]),
        "self_attn.in_proj_bias": torch.cat([attn.query.bias, torch.zeros(8), attn.value.bias]),
        "self_attn.out_proj.weight": attn.out.weight,
        "self_attn.out_proj.bias": attn.out.bias,
        "norm1.weight": block.attn_ln.weight,
        "norm1.bias": block.attn_ln.bias,
        "linear1.weight": block.mlp[0].weight,
        "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight,
        "linear2.bias": block.mlp[2].bias,
        "norm2.weight": block.mlp_ln.weight,
        "norm2.bias": block.mlp_ln.bias,
    })
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), layer(x))


def test_only_the_key_projection_has_no_bias(config):
    for block in encoder(config).blocks:
        biases = {name: module.bias is not None for name, module in block.attn.named_children()}
        assert biases == {"query": True, "key": False, "value": True, "out": True}


def test_frames_halve_and_any_other_length_is_refused(config):
    final, taps = encoder(config)(sound(config))
    assert final.shape == (2, 16, 8) and taps.shape == (2, 3, 16, 8)
    with pytest.raises(AssertionError, match="expected 16 frames"):
        encoder(config)(sound(config)[:, :, :-2])


def test_every_layer_norm_has_eps_1e_5(config):
    assert {m.eps for m in encoder(config).modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_the_first_frame_depends_on_the_last(config):
    whisper, mel = encoder(config), sound(config)
    before = whisper(mel)[0]
    mel[0, :, -1] += 1
    after = whisper(mel)[0]
    assert not torch.allclose(before[0, 0], after[0, 0], atol=1e-6)
    torch.testing.assert_close(before[1], after[1])  # another clip does not
