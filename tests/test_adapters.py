"""The adapters: 12.5 semantic embeddings a second whatever the batch, and always Q acoustic ones,
which depend on every tap."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffa2_mini.adapters import AcousticAdapter, QFormerLayer, SemanticAdapter
from diffa2_mini.training.objective import set_dropout

LENGTHS = list(range(14))


def semantic(config):
    return SemanticAdapter(config.adapter, width=8, out_width=12)


def acoustic(config, n_taps=3):
    whisper = dataclasses.replace(config.whisper, taps=tuple(range(n_taps)))
    adapter = AcousticAdapter(config.adapter, whisper, out_width=12)
    for prompts in adapter.layer_prompts:
        nn.init.normal_(prompts)
    return adapter


def test_semantic_gives_one_embedding_per_four_frames(config):
    embeddings, n_valid = semantic(config)(torch.randn(14, 16, 8), torch.tensor(LENGTHS))
    assert n_valid.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert embeddings.shape == (14, 3, 12)


def test_a_batch_of_clips_below_four_frames_gives_none(config):
    embeddings, n_valid = semantic(config)(torch.randn(4, 16, 8), torch.tensor([0, 1, 2, 3]))
    assert embeddings.shape == (4, 0, 12) and n_valid.tolist() == [0] * 4


def test_semantic_is_two_convolutions_and_a_projection_of_the_clip_alone(config):
    adapter, clip = semantic(config), torch.randn(1, 8, 8)
    # the plain convolutions, which pad with zeros
    x = adapter.conv(clip.transpose(1, 2)).transpose(1, 2)
    expected = adapter.layernorm(adapter.linear_connector(x))
    torch.testing.assert_close(adapter(clip, torch.tensor([8]))[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("garbage", [0.0, 1.0, 1e6])
def test_a_padded_batch_equals_its_clips_one_by_one(config, garbage):
    adapter, clips = semantic(config), [torch.randn(1, n, 8) for n in LENGTHS]
    batch = garbage * torch.randn(14, 16, 8)
    for row, clip, n in zip(batch, clips, LENGTHS):
        row[:n] = clip[0]
    embeddings, n_valid = adapter(batch, torch.tensor(LENGTHS))
    for row, n_out, clip, n in zip(embeddings, n_valid, clips, LENGTHS):
        alone, _ = adapter(clip, torch.tensor([n]))
        torch.testing.assert_close(row[:n_out], alone[0], atol=1e-5, rtol=0)


def test_embedding_j_depends_on_frames_4j_minus_2_to_4j_plus_2_so_never_on_padding(config):
    adapter, clip, reads = semantic(config), torch.randn(1, 16, 8), []
    before = adapter(clip, torch.tensor([16]))[0]
    for frame in range(16):
        other = clip.clone()
        other[0, frame] += 10 * torch.randn(8)
        changed = (adapter(other, torch.tensor([16]))[0] - before).abs().amax(-1)[0] > 1e-6
        reads += [frame] if changed[1] else []
    assert reads == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("n_frames", [1, 16])
def test_acoustic_always_gives_q_embeddings(config, n_frames):
    assert acoustic(config)(torch.randn(2, 3, n_frames, 8)).shape == (2, 3, 12)


def test_taps_weigh_the_same_at_first(config):
    adapter, taps = acoustic(config), torch.randn(2, 3, 16, 8)
    assert torch.equal(adapter.layer_weights.softmax(-1), torch.full((3, 3), 1 / 3))
    outputs = []
    for i in range(3):
        queries = adapter.layer_prompts[i].expand(2, -1, -1)
        for layer in adapter.qformer:
            queries = layer(queries, taps[:, i])
        outputs.append(queries)
    torch.testing.assert_close(adapter(taps), adapter.proj(torch.stack(outputs).mean(0)))


def test_each_query_has_its_own_weights_over_the_taps(config):
    adapter, taps = acoustic(config), torch.randn(1, 3, 16, 8)
    adapter.layer_weights.data = 100 * torch.eye(3)  # query i: tap i alone
    before = adapter(taps)
    taps[:, 1] += torch.randn(16, 8)
    changed = (adapter(taps) - before).abs().amax(-1)[0] > 1e-4
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("tap", [0, 1, 2])
def test_acoustic_depends_on_every_tap_and_on_padding_frames(config, tap):
    adapter, taps = acoustic(config), torch.randn(2, 3, 16, 8)
    before = adapter(taps)
    taps[0, tap, -1] += 3
    after = adapter(taps)
    assert not torch.allclose(before[0], after[0], atol=1e-5)
    torch.testing.assert_close(before[1], after[1])


def test_one_decoder_serves_all_taps(config):
    one, three = acoustic(config, n_taps=1), acoustic(config, n_taps=3)
    assert sum(p.numel() for p in one.qformer.parameters()) == sum(
        p.numel() for p in three.qformer.parameters())
    three.qformer, three.proj = one.qformer, one.proj
    for prompts in three.layer_prompts:
        prompts.data = one.layer_prompts[0].data
    tap = torch.randn(2, 1, 16, 8)
    # three times the same is once
    torch.testing.assert_close(three(tap.expand(-1, 3, -1, -1)), one(tap))


def test_a_qformer_layer_equals_torchs_post_norm_decoder_layer(config):
    layer = QFormerLayer(config.adapter, width=8, n_heads=2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    torchs = nn.TransformerDecoderLayer(
        8, 2, 11, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True).double()
    pairs = [(torchs.self_attn, layer.attention), (torchs.multihead_attn, layer.crossattention)]
    for theirs, ours in pairs:
        theirs.in_proj_weight.data = torch.cat(
            [ours.query.weight, ours.key.weight, ours.value.weight])
        theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
        theirs.out_proj = ours.dense
    torchs.linear1, torchs.linear2 = layer.intermediate, layer.output
    torchs.norm1, torchs.norm2 = layer.attention.LayerNorm, layer.crossattention.LayerNorm
    torchs.norm3 = layer.LayerNorm
    queries, frames = torch.randn(2, 3, 8).double(), torch.randn(2, 9, 8).double()
    torch.testing.assert_close(layer(queries, frames), torchs(queries, frames))


def test_dropout_acts_where_bert_has_it(config):
    """On the attention weights and on what each part adds to its input, with the draws in that
    order; nowhere else, and not on the queries themselves."""
    layer, p = QFormerLayer(config.adapter, width=8, n_heads=2).double(), 0.4
    queries, frames = torch.randn(2, 3, 8).double(), torch.randn(2, 9, 8).double()
    set_dropout(layer, p)

    def bert(attend, x, memory):
        def heads(y):
            return y.unflatten(-1, (2, 4)).transpose(1, 2)
        scores = heads(attend.query(x)) @ heads(attend.key(memory)).mT / 2
        mixed = F.dropout(scores.softmax(-1), p) @ heads(attend.value(memory))
        return attend.LayerNorm(x + F.dropout(attend.dense(mixed.transpose(1, 2).flatten(2)), p))

    torch.manual_seed(3)
    x = bert(layer.crossattention, bert(layer.attention, queries, queries), frames)
    expected = layer.LayerNorm(x + F.dropout(layer.output(F.gelu(layer.intermediate(x))), p))
    torch.manual_seed(3)
    torch.testing.assert_close(layer.train()(queries, frames), expected)


def test_dropout_is_off_in_evaluation_and_leaves_no_weights(config):
    plain, dropped = acoustic(config), acoustic(config)
    dropped.load_state_dict(plain.state_dict())
    set_dropout(dropped, 0.5)
    taps = torch.randn(2, 3, 16, 8)
    assert torch.equal(dropped.eval()(taps), plain(taps))
    assert not torch.allclose(dropped.train()(taps), plain(taps))
    assert dropped.state_dict().keys() == plain.state_dict().keys()


def test_layer_norms_have_eps_1e_12_in_the_qformer_and_1e_5_elsewhere(config):
    adapters = nn.ModuleDict({"acoustic": acoustic(config), "semantic": semantic(config)})
    eps = {name: m.eps for name, m in adapters.named_modules() if isinstance(m, nn.LayerNorm)}
    assert {name: 1e-12 if "qformer" in name else 1e-5 for name in eps} == eps
    assert len(eps) == 2 * 3 + 2


def test_only_sound_reads_no_padding_and_no_other_frame_of_the_batch(config):
    """Whatever stands behind the clips, each gives what it gives alone; without it, padding
    counts."""
    every = acoustic(config)
    sound = acoustic(dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, only_sound=True)))
    sound.load_state_dict(every.state_dict())
    n_frames, clips = torch.tensor([3, 7, 1]), torch.randn(3, 3, 10, 8)
    louder = clips.clone()
    for row, n in zip(louder, n_frames):
        row[:, n:] = 1e3
    together = sound(louder, n_frames)
    for i, n in enumerate(n_frames):
        alone = every(clips[i:i + 1, :, :n])
        torch.testing.assert_close(together[i:i + 1], alone, atol=1e-5, rtol=0)
    assert (every(louder) - every(clips)).abs().min(dim=-1).values.max() > 1e-3
