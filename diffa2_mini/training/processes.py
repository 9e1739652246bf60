"""Data parallelism: several processes, which `torchrun` starts, train one model together.

Each process holds the whole model and computes the gradient on its part of every batch. Once a step
the gradients of the trained parameters are summed over the processes, and all make the same step.
Frozen parameters need no exchange, and can be sharded over the GPUs.
"""

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import UserError, out_of_memory, require

BARRIER_TIMEOUT = timedelta(days=7)  # between steps, when one may download, encode or save
GRADIENT_TIMEOUT = timedelta(minutes=1)  # within a step, when all do the same work
COMPILED_GRADIENT_TIMEOUT = timedelta(hours=1)  # likewise, with torch.compile
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # of each process


@dataclass(frozen=True)
class World:
    """This process: number `rank` of `size`, and on its machine `local_rank` of `local_size`.
    `step_group` connects all processes for the exchanges within a step."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    step_group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and logs, and prints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this process: of GPUs its own. Raises UserError if there are too few."""
        if device.type != "cuda" or self.size == 1:
            return device
        n_cards = torch.cuda.device_count()
        require(self.local_rank < n_cards, f"expected a card for each process, got "
                f"{self.local_size} processes and {n_cards} cards; lower --nproc_per_node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first, then in the first process of each other machine,
        then in the rest: each finds the files that those before it have made."""
        mine = 0 if self.is_main else min(self.local_rank, 1) + 1
        for turn in range(3):
            if turn == mine:
                yield
            if turn < 2:
                self.wait()

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of their ranks."""
        if self.size == 1:
            return items
        by_rank = [None] * self.size
        distributed.all_gather_object(by_rank, items)
        return [item for items in by_rank for item in items]

    def require_equal(self, value, message: str) -> None:
        """Raise UserError in all processes unless they have the same value."""
        require(all(other == value for other in self.gather([value])), message)

    def sum_figures(self, figures: dict[str, float]) -> dict[str, float]:
        """The sum of each figure over the processes, within a step."""
        if self.size == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        distributed.all_reduce(values, group=self.step_group)
        return dict(zip(figures, values.tolist()))

    @torch.no_grad()
    def broadcast_parameters(self, parameters: list[nn.Parameter]) -> None:
        """Give all the main process's values: random initialisation may differ between machines."""
        self.wait()
        for parameter in parameters if self.size > 1 else []:
            distributed.broadcast(parameter, 0, group=self.step_group)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes. A missing one becomes zero, of one
        process too: clips too short for a semantic embedding do not reach that adapter."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size > 1:
            gradients = [parameter.grad for parameter in parameters]
            flat = parameters_to_vector(gradients)
            distributed.all_reduce(flat, group=self.step_group)
            vector_to_parameters(flat, gradients)


def has_lost_another(error: RuntimeError) -> bool:
    """Whether gloo or NCCL says that another process is gone; NCCL tells of full memory too."""
    words = ("Connection closed", "Connection reset", "gloo", "NCCL", "Broken pipe")
    return not out_of_memory(error) and any(word in str(error) for word in words)


@contextmanager
def join_processes(size: int, compiles: bool = False) -> Iterator[World]:
    """This process's place among the `size` that torchrun has started. If there are several, all
    but the main one print nothing, and each exits at the end of the block. Raises UserError when
    another is lost."""
    if size == 1:
        yield World()
        return
    no_number = {name for name in RANKS if not os.environ.get(name, "").isdecimal()}
    missing = sorted(no_number | {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys())
    require(not missing, f"expected processes of torchrun, got WORLD_SIZE={size} without "
            f"{', '.join(missing)}; start them with: torchrun --nproc_per_node={size} train.py")
    places = [int(os.environ[name]) for name in RANKS]
    if places[0] > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    timeout = COMPILED_GRADIENT_TIMEOUT if compiles else GRADIENT_TIMEOUT
    try:
        distributed.init_process_group("gloo", timeout=BARRIER_TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        world = World(*places, distributed.new_group(backend=backend, timeout=timeout))
        yield world
        world.wait()  # before any of them closes its connections
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # at an ordinary exit torch's threads now and then raise an error
    except RuntimeError as error:  # what gloo and NCCL raise
        if not has_lost_another(error):
            raise
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"process {places[0]} of {size} has lost another, which has ended "
                        f"or hangs ({reason}); go on with --resume") from None


def shard(model: nn.Module, blocks: nn.ModuleList, world: World, device: torch.device) -> None:
    """Shard the frozen weights of a model's blocks over the processes (FSDP): they are gathered on
    the device when one runs, and freed again. All other weights are whole on each device."""
    from torch.distributed.fsdp import fully_shard  # here, as it takes a second or two

    require("ignored_params" in inspect.signature(fully_shard).parameters,
            f"--shard: expected torch 2.7 or later, got {torch.__version__}; install a later one")
    world.wait()
    mesh = DeviceMesh.from_group(world.step_group, device.type)
    for block in blocks:
        whole = {parameter for name, parameter in block.named_parameters()
                 if parameter.requires_grad or "lora_" in name}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)
