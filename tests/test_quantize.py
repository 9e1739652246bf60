"""Weights in 8 and 4 bits are as near as they can be, take the memory that they promise, and let
gradients through."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from mini import ROOT, SECONDS, command, train_here
from test_loading import fill_shards
from torch import nn
from torch.nn import functional as F

import sample
import train
from diffa2_mini import Diffa2, quantize, weights
from diffa2_mini.command import flags
from diffa2_mini.command.script import Parser, run_script
from diffa2_mini.config import DATA, SIZES
from diffa2_mini.errors import UserError
from diffa2_mini.fast.device import choose_device
from diffa2_mini.fast.token_losses import token_losses
from diffa2_mini.lora import LoraLinear, add_lora
from diffa2_mini.quantize import KINDS, QuantizedLinear, nf4_levels, quantize_linears
from diffa2_mini.training import dry_run
from diffa2_mini.training.checkpoint import load_checkpoint
from diffa2_mini.training.random_weights import fill_at_random

NF4 = [  # arXiv 2305.14314, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0]
CLIP = DATA / "clips" / "three_one_four.wav"
BOTH = pytest.mark.parametrize("kind", ["int8", "nf4"])
ALL = pytest.mark.parametrize("kind", [*KINDS])
MEMORY = """
import json, sys, threading, time
from pathlib import Path
import torch
from diffa2_mini.config import LladaConfig
from diffa2_mini.llada import Llada
from diffa2_mini.weights import Loading, load_part

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done = [], threading.Event()
def watch():
    while not done.is_set():
        peak.append(anonymous())
        time.sleep(0.001)
with torch.device("meta"):
    model = Llada(LladaConfig(**json.loads(sys.argv[2])))
largest = 2 * max(tensor.numel() for tensor in model.parameters())
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
load_part(model, "llada", Path(sys.argv[1]), dtype=torch.bfloat16, how=Loading(sys.argv[3]))
done.set()
thread.join()
result = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
print((max(peak) - before - result) / largest, result)
"""


def turned_back(layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.cat([*layer.slices(dtype)])


def error_of(back: torch.Tensor, weight: torch.Tensor) -> float:
    return float((back - weight).norm() / weight.norm())


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


# --------------------------------------------------------------------------------------- the codes


def test_the_levels_of_nf4_are_the_published_ones():
    torch.testing.assert_close(nf4_levels(), torch.tensor(NF4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind, expected, off", [
    ("nf4", 0.092, 0.002),
    ("int8", 0.0078, 0.0005),  # of 1024 weights the largest is about 3.4: 3.4 / 127 / sqrt(12)
    ("fp8", 0.026, 0.002)])  # 3 bits of mantissa
def test_normal_weights_come_back_with_the_error_that_so_many_bits_leave(kind, expected, off):
    weight = torch.randn(1024, 1024)
    assert error_of(turned_back(KINDS[kind](weight)), weight) == pytest.approx(expected, abs=off)


def test_int8_is_off_by_half_a_step_at_most():
    weight = torch.randn(50, 70) * torch.logspace(-6, 3, 50)[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((turned_back(KINDS["int8"](weight)) - weight).abs() <= step * 0.5001).all()


def test_nf4_takes_the_nearest_level():
    block = torch.randn(1, 64)
    scale, codes = quantize.nearest_levels(block)
    codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten()
    distances = (block.flatten() / block.abs().max() - nf4_levels()[:, None]).abs()  # [16, 64]
    assert torch.equal(codes.long(), distances.argmin(0)) and scale.item() == block.abs().max()


def test_the_scales_of_nf4_are_quantised_too_and_add_little_error():
    weight = torch.randn(512, 1024)
    layer, n = KINDS["nf4"](weight), weight.numel()
    assert layer.scale_codes.dtype == torch.int8
    assert 8 * (bytes_of(layer) - layer.pairs.nbytes) / n == pytest.approx(4.127, abs=0.001)
    scale, _ = quantize.nearest_levels(weight.view(-1, 64))
    exact = nf4_levels()[torch.stack([layer.codes >> 4, layer.codes & 15], -1).long()].flatten(1)
    alone = error_of((exact * scale).view_as(weight), weight)
    assert error_of(turned_back(layer), weight) < 1.002 * alone


@ALL
@pytest.mark.parametrize("shape", [(16, 16), (23, 12), (130, 96), (1, 5)])
def test_zeros_stay_zero_in_weights_of_any_shape(kind, shape):
    weight = torch.randn(shape)
    weight[::2] = 0
    weight.view(-1)[:64] = 0
    back = turned_back(KINDS[kind](weight))
    assert back.shape == shape and not back[weight == 0].any()
    assert not turned_back(KINDS[kind](torch.zeros(shape))).any()
    assert torch.isfinite(turned_back(KINDS[kind](weight * 1e-42))).all()


def test_few_rows_are_in_float32_at_once(monkeypatch):
    weight = torch.randn(100, 64).bfloat16()
    whole = {kind: turned_back(KINDS[kind](weight)) for kind in KINDS}
    monkeypatch.setattr(quantize, "PIECE", 7 * 64)
    assert all(torch.equal(turned_back(KINDS[kind](weight)), whole[kind]) for kind in KINDS)


# ------------------------------------------------------------------------------------- the product


@BOTH
@pytest.mark.parametrize("rows", [2**14, 64])
def test_the_product_and_its_gradient_are_those_of_the_weight_turned_back(monkeypatch, kind, rows):
    monkeypatch.setattr(quantize, "ROWS", rows)
    layer = KINDS[kind](torch.randn(200, 36), nn.Parameter(torch.randn(200).double()))
    x, by_y = torch.randn(2, 3, 36).double().requires_grad_(), torch.randn(2, 3, 200).double()
    plain = F.linear(x, turned_back(layer, torch.float64), layer.bias)
    torch.testing.assert_close(layer(x), plain)
    gradients = (torch.autograd.grad(y, x, by_y)[0] for y in (layer(x), plain))
    torch.testing.assert_close(*gradients)


@BOTH
def test_nothing_is_kept_for_the_backward_pass(kind):
    kept, x = [], torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        KINDS[kind](torch.randn(32, 64))(x).sum()
    assert not kept


def test_a_product_in_float8_is_near():
    layer, x = KINDS["fp8"](weight := torch.randn(48, 64)), torch.randn(2, 5, 64).bfloat16()
    x[0, 0] = 0
    try:
        y = layer(x)
    except (NotImplementedError, RuntimeError):
        pytest.skip("this torch has no such product on the CPU")
    assert y.dtype == torch.bfloat16 and not y[0, 0].any()
    # x and the weight are off by 2.6 % each, and one is off as often as the other
    assert error_of(y.float(), F.linear(x.float(), weight)) < 0.05


@BOTH
def test_lora_learns_beside_a_quantised_layer(model, config, kind):
    weight = {name: p.detach().clone() for name, p in model.llada.named_parameters()}
    quantize_linears(model.llada, kind, weight.get)
    x = torch.randn(2, 5, 12, requires_grad=True)
    before = model.llada(x)
    add_lora(model.llada, config.lora)
    assert torch.equal(model.llada(x), before)
    trained = model.train_only(("lora",))
    for parameter in trained.values():
        assert parameter.dtype == torch.float32
        nn.init.normal_(parameter, std=0.2)
    model.llada(x).square().sum().backward()
    assert x.grad.any() and all(parameter.grad.any() for parameter in trained.values())
    layer = model.llada.blocks[0].q_proj
    assert isinstance(layer, LoraLinear) and isinstance(layer.quantized, KINDS[kind])


@BOTH
def test_the_loss_of_tokens_and_its_gradient_pass_through_a_quantised_head(monkeypatch, kind):
    monkeypatch.setattr(quantize, "ROWS", 64)
    head, hidden = KINDS[kind](torch.randn(150, 16)), torch.randn(7, 16, requires_grad=True)
    targets = torch.randint(150, (7,))
    losses = token_losses(head)(hidden, targets)
    plain = F.cross_entropy(F.linear(hidden, turned_back(head)), targets, reduction="none")
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), hidden)[0]
                                 for each in (losses, plain)))


# -------------------------------------------------------------------------- which layers, and where


@ALL
def test_encoder_blocks_and_head_are_quantised_and_nothing_else(kind):
    plain, small = (weights.build(SIZES["toy"][0], how=weights.Loading(quantize))
                    for quantize in (None, kind))
    for name, module in plain.named_modules():
        fits = kind != "fp8" or not name.endswith("llada.ff_out")  # a vocabulary of 619
        frozen = isinstance(module, nn.Linear) and name.startswith(("llada", "whisper")) and fits
        found = small.get_submodule(name)
        assert isinstance(found, QuantizedLinear) == frozen
        if frozen:  # as if it were quantised after loading
            assert torch.equal(turned_back(found), turned_back(KINDS[kind](module.weight)))
            assert module.bias is None or torch.equal(module.bias, found.bias)
    assert torch.equal(plain.llada.wte.weight, small.llada.wte.weight)


@BOTH
def test_random_weights_are_quantised_while_they_are_made(config, kind):
    made = []
    for size in (config, dataclasses.replace(config, size="toy")):  # on `meta`, and not
        model = weights.build(size, None)
        fill_at_random(torch.device("cpu"), torch.bfloat16, model.whisper, model.llada,
                       quantize=kind)
        made.append(model.state_dict())
    assert not any(tensor.is_meta for tensors in made for tensor in tensors.values())
    assert made[0]["whisper.conv1.weight"].dtype == torch.bfloat16
    assert made[0]["llada.ff_out.codes"].dtype in (torch.int8, torch.uint8)
    assert not made[0]["whisper.blocks.0.mlp.0.bias"].any()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@BOTH
def test_two_shards_of_a_gigabyte_need_little_memory_beside_the_result(tmp_path, kind):
    """Above the result, at most three times the largest tensor."""
    numbers = dict(vocab_size=40_000, width=2048, n_layers=20, n_heads=16, hidden=5632)
    size = fill_shards(tmp_path / "llada", numbers, torch.bfloat16, "model.safetensors")
    assert 2 * 10**9 < size < 3 * 10**9
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "llada"), json.dumps(numbers), kind]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    above, result = map(float, done.stdout.split())
    assert above <= 3 and result < {"int8": 0.58, "nf4": 0.35}[kind] * size


# ------------------------------------------------------------------------------------- the commands


def test_answers_in_8_bits_are_those_of_the_weights(capsys):
    sample.main([str(CLIP), "--quantize", "int8"])
    assert capsys.readouterr().out == "three one four\n"


def test_what_answers_is_all_in_the_dtype_asked_for_but_codes_and_scales():
    small = Diffa2.from_pretrained("toy", device="cpu", dtype="float16", quantize="nf4")
    assert {p.dtype for p in small.model.parameters()} == {torch.float16}
    assert small.model.llada.ff_out.scale.dtype == torch.float32
    answer = small.ask(CLIP)
    assert torch.isfinite(answer.history[0].confidence).all() and answer.tokens


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_all_stages_train_on_quantised_weights(world, tmp_path, capsys, kind):
    out = tmp_path / "out"
    train_here(world, out, "--quantize", kind)
    assert f"--quantize {kind}" in capsys.readouterr().out.splitlines()[-1]  # ask it something
    assert load_checkpoint(out / "stage4.safetensors").settings["quantize"] == kind
    assert run_script(train.main, command(world, out, "--resume")[2:]) == 2
    assert f"quantize {kind}, got none" in capsys.readouterr().err


def with_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)


def test_a_gpu_without_bfloat16_answers_in_float16_and_trains_in_float32(monkeypatch):
    with_gpu(monkeypatch, (7, 5))
    assert choose_device()[:2] == (torch.device("cuda"), torch.float16)
    assert choose_device(trains=True)[1] == torch.float32
    stage = dataclasses.replace(SIZES["toy"][1][3], micro_batch=2)
    counts = {"whisper": (9, 0), "llada": (9, 0)}
    planned = [dry_run.memory_of(dry_run.Plan("toy", dtype, "nothing"), stage, counts)
               for dtype in ("auto", "float32")]
    assert planned[0] == planned[1]
    with_gpu(monkeypatch, (8, 0))
    assert choose_device()[1] == choose_device(trains=True)[1] == torch.bfloat16


def test_float8_is_refused_where_a_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "auto"):
        with pytest.raises(UserError, match="capability 8.9 or above, got device cpu; use int8"):
            choose_device(device, quantize="fp8")
    with_gpu(monkeypatch, (8, 0))
    with pytest.raises(UserError, match="8.9 or above, got 8.0; use int8 or nf4"):
        choose_device(quantize="fp8")
    with_gpu(monkeypatch, (8, 9))
    assert choose_device(quantize="fp8")[1] == torch.bfloat16


@pytest.mark.parametrize("arguments, message", [
    (["--quantize", "fp8"], "invalid choice: 'fp8'"),
    (["--dtype", "float16"], "small gradients would become zero"),
    (["--stage", "0", "--quantize", "nf4"], "--quantize is of stages 1 to 4"),
    (["--compile", "--quantize", "nf4"], "--quantize is of stages 1 to 4, without --shard"),
    (["--shard", "--dry-run", "--processes", "2", "--quantize", "nf4"], "without --shard")])
def test_training_refuses_what_cannot_be(tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert run_script(train.main, ["--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not out.exists()


def test_answering_refuses_what_cannot_be(capsys):
    assert run_script(sample.main, [str(CLIP), "--quantize", "nf4", "--merge-lora"]) == 2
    assert "--merge-lora and --quantize exclude each other" in capsys.readouterr().err
    with pytest.raises(UserError, match="one of int8, nf4, fp8, got int4"):
        Diffa2.from_pretrained("toy", device="cpu", quantize="int4")


def test_answers_of_quantised_weights_are_told_apart():
    parser = Parser("")
    flags.add_model_flags(parser.add_argument)
    names = []
    for arguments in ([], ["--quantize", "nf4"]):
        args = parser.parse_args(arguments)
        source = flags.model_source(args)
        decode = flags.decode_config(args, source.config.decode)
        names.append(flags.identify_model(source, decode, torch.float32, False, args.quantize))
    assert names[1].replace("nf4, ", "") == names[0] != names[1]
