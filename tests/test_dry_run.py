"""The dry run counts exactly, and its estimate of memory is what a step really takes, to within 15
%."""

import dataclasses
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import train
from diffa2_mini import weights
from diffa2_mini.command.script import run_script
from diffa2_mini.config import SIZES, AdapterConfig, AudioConfig, LladaConfig, WhisperConfig
from diffa2_mini.data import AnswerBatch, PreferenceBatch
from diffa2_mini.fast.llada import FastLlada
from diffa2_mini.model import Diffa2Model
from diffa2_mini.quantize import quantize_linears
from diffa2_mini.tokenizer import Prompt
from diffa2_mini.training import dry_run
from diffa2_mini.training.objective import answer_loss, preference_bounds
from diffa2_mini.vrpo import vrpo_loss

FULL = SIZES["full"][1]
SMALLER = dataclasses.replace(  # the shape of full, with smaller numbers
    SIZES["full"][0], size="smaller", audio=AudioConfig(n_mels=20, max_seconds=4),
    whisper=WhisperConfig(n_mels=20, n_positions=200, width=64, n_layers=2, n_heads=2, taps=(1, 2)),
    adapter=AdapterConfig(n_queries=16, qformer_hidden=128),
    llada=LladaConfig(vocab_size=4096, width=256, n_layers=6, n_heads=4, hidden=768))


@pytest.mark.parametrize(
    "stage, trainable",
    [(1, "36,474,368"), (2, "84,285,440"), (3, "98,965,504"), (4, "98,965,504")])
def test_the_dry_run_counts_what_is_trained(capsys, stage, trainable):
    train.main(["--stage", str(stage), "--size", "full", "--dry-run"])
    out = capsys.readouterr().out
    assert f"trainable parameters: {trainable}\n" in out
    assert "636,968,960" in out and "8,015,581,184" in out
    (memory, ) = [
        float(line.split()[-2]) for line in out.splitlines() if "estimated peak memory" in line]
    assert 17 < memory <= 22  # GiB: it fits a card of 24 GB
    for word in ("gradients", "state of AdamW", "tokens per step", "operations per step", "steps",
                 "hours on one"):
        assert word in out


def test_the_dry_run_plans_every_stage_of_every_size(capsys):
    for size, (_, stages) in SIZES.items():
        train.main(["--size", size, "--dry-run"])
        out = capsys.readouterr().out
        assert out.count("estimated peak memory") == len(stages)
        hours = [
            float(line.split()[-1]) for line in out.splitlines() if line.strip().startswith("hours")
        ]
        assert hours[-1] == pytest.approx(sum(hours[:-1]), abs=0.03)
    assert run_script(train.main, ["--size", "diffa1", "--stage", "3", "--dry-run"]) == 2
    assert "has stages 1, 2" in capsys.readouterr().err


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors that exist at once, at most; what operations use inside does not
    count."""

    def __init__(self, model):
        super().__init__()
        self.held, self.now, self.peak = {}, 0, 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self.hold(tensor)

    def hold(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.release, key)

    def release(self, key):
        self.now -= self.held.pop(key)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        # only sizes count, and a CPU may take a minute for products in bfloat16
        if operation is torch.ops.aten.mm.default:
            output = args[0].new_zeros(args[0].shape[0], args[1].shape[1])
        else:
            output = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return output


class Mask:
    mask_id = 5


def run_two_steps(stage, dtype: torch.dtype, recompute: str, clips: int, watch: Callable,
                  quantize: str | None = None) -> None:
    """Two steps of a stage on `clips` full-length clips, or pairs, under the context that `watch`
    gives for a model."""
    model = Diffa2Model(SMALLER, llada=FastLlada)
    for part in (model.whisper.to(dtype), model.llada.to(dtype)):
        if quantize:
            quantize_linears(part, quantize, part.get_parameter)
    if "lora" in stage.trains:
        model.add_lora()
    trained = model.train_only(stage.trains)
    model.llada.recompute = recompute
    optimizer = torch.optim.AdamW(trained.values(), foreach=False)
    rows, T, R = clips * (1 + stage.preference), SMALLER.audio.max_frames // 2, dry_run.RESPONSE
    mel, response = torch.randn(clips, 20, 2 * T).to(dtype), torch.randint(10, 4000, (rows, R))
    masks = torch.zeros(rows, stage.vrpo_samples, R, dtype=torch.bool)
    masks[..., ::2] = True
    prompts = [Prompt([7] * dry_run.PROMPT, 20)] * clips
    with watch(model):
        reference = {
            name: tensor.clone()
            for name, tensor in weights.trained_tensors(model).items()}
        for _ in range(2):
            common = dict(examples=[], clips=[], prompts=prompts, response=response,
                          valid=torch.ones_like(response).bool(),
                          audio=model.encode(mel, torch.full((clips,), T)))
            if stage.preference:
                batch = PreferenceBatch(masked=masks, **common)
            else:
                noisy = response.masked_fill(masks[:, 0], 0)
                batch = AnswerBatch(noisy=noisy, masked=masks[:, 0],
                                    weight=torch.full((rows,), 2.0), **common)
            with torch.autocast("cpu",
                                torch.bfloat16) if dtype == torch.bfloat16 else nullcontext():
                if stage.preference:
                    loss = vrpo_loss(*preference_bounds(model, reference, batch, stage, Mask),
                                     stage.vrpo_beta)
                else:
                    loss = answer_loss(model, batch, stage, rows * R)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del batch, loss


@pytest.mark.parametrize("number, dtype, recompute", [
    *((number, torch.bfloat16, recompute)
      for number in (1, 2, 3, 4)
      for recompute in ("nothing", "feed-forward", "blocks")), (3, torch.float32, "blocks"),
    (3, torch.float32, "nothing")])
def test_the_estimate_of_memory_is_within_15_percent(number, dtype, recompute):
    stage, clips = FULL[number], 1 if number == 4 else 2
    counts = dry_run.count_parameters(SMALLER, stage)
    shape = dry_run.shape_of(SMALLER, stage, clips)
    estimate = sum(dry_run.resident_bytes(counts, stage, dtype.itemsize).values())
    estimate += dry_run.activation_bytes(SMALLER, stage, shape, dtype.itemsize, recompute)
    memory = []
    run_two_steps(stage, dtype, recompute, clips,
                  lambda model: memory.append(PeakMemory(model)) or memory[0])
    assert estimate == pytest.approx(memory[0].peak, rel=0.15)


@pytest.mark.parametrize("number, kind", [(3, "int8"), (3, "nf4"), (4, "nf4")])
def test_the_estimate_is_within_15_percent_on_quantised_weights(monkeypatch, number, kind):
    monkeypatch.setitem(SIZES, "smaller", (SMALLER, FULL))
    stage = dataclasses.replace(FULL[number], micro_batch=1 if number == 4 else 2)
    plan, memory = dry_run.Plan("smaller", "bfloat16", "blocks", quantize=kind), []
    estimate = dry_run.memory_of(plan, stage, dry_run.count_parameters(SMALLER, stage))
    run_two_steps(stage, torch.bfloat16, "blocks", stage.micro_batch,
                  lambda model: memory.append(PeakMemory(model)) or memory[0], kind)
    assert estimate["estimated peak memory"] == pytest.approx(memory[0].peak, rel=0.15)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_bytes_of_quantised_weights_are_those_that_they_take(kind):
    with torch.device("meta"):
        model = Diffa2Model(SMALLER).bfloat16()
    for part in (model.whisper, model.llada):
        quantize_linears(part, kind, part.get_parameter)
    real = sum(tensor.nbytes for part in (model.whisper, model.llada)
               for tensor in [*part.parameters(), *part.buffers()])
    assert dry_run.frozen_bytes(SMALLER, 2, kind) == pytest.approx(real, rel=0.03)  # and tables


def test_four_bits_let_the_whole_size_train_on_a_card_of_12_gb(capsys):
    memory = []
    for stage in ("3", "4"):
        train.main(["--size", "full", "--stage", stage, "--batch-size", "1", "--quantize", "nf4",
                    "--dry-run"])
        memory += [float(line.split()[-2]) for line in capsys.readouterr().out.splitlines()
                   if "estimated peak memory" in line]
    assert memory[0] <= 9.5 and memory[1] <= 11  # GiB


@pytest.mark.parametrize("number", [1, 3, 4])
def test_the_operations_are_those_that_torch_counts(number):
    stage, counter = FULL[number], FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # torch counts no other attention on the CPU
        run_two_steps(stage, torch.float32, "nothing", 1, lambda model: counter)
    needed = dry_run.step_flops(SMALLER, stage, dry_run.shape_of(SMALLER, stage, 1))
    assert 2 * needed == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_formulas_of_the_reference_page_are_what_is_counted():
    config, stage = SIZES["full"][0], FULL[3]
    w, D, F, J = config.whisper, config.llada.width, config.llada.hidden, config.llada.n_layers
    E, T, N, b = w.width, w.n_positions, len(w.taps), stage.batch_size
    clip, step = dry_run.shape_of(config, stage, 1), dry_run.shape_of(config, stage, b)
    S, R = clip.tokens, clip.answers
    activations = S * (2 * D * J + (8 + 8 + 4) * D + (6 + 6) * F) + T * E * 2 * (
        N + 2 * N * config.adapter.qformer_layers + 6)
    assert activations == dry_run.activation_bytes(config, stage, clip, 2, "blocks")
    rest = 2 * D**2 + 3 * D * F
    operations = [
        4 * b * (S * J * (4 * D**2 + 3 * D * F) - (S - R) * rest),
        12 * S * D * b * (S * (J - 1) + R),
        b * T * w.n_layers * (24 * E**2 + 4 * T * E),
        4 * (b * R // 2) * D * config.llada.vocab_size]
    assert sum(operations) == pytest.approx(dry_run.step_flops(config, stage, step), rel=1e-9)
    assert [round(100 * part / sum(operations)) for part in operations] == [85, 3, 11, 1]
    again = 2 * b * S * J * (4 * D**2 + 3 * D * F)
    assert round(100 * again / sum(operations)) == 44 and (S, R) == (631, 128)
