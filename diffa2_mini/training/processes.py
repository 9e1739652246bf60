"""Several processes that train one model, each on its share of every batch: what `torchrun` starts.

All of them hold the model, draw the same batches, and deal out the examples. Once a step the
gradients of what is trained are added up over the processes, and each makes the same step. What is
frozen needs no exchange, and can be split among the cards.
"""

import dataclasses
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

from ..errors import UserError, out_of_memory, require

# with one another: one may be downloading weights, listening or saving for as long as it takes
WAIT_TIMEOUT = timedelta(days=7)
# within a step, where all do the same; then one of them is lost
STEP_TIMEOUT = timedelta(minutes=1)
COMPILE_TIMEOUT = timedelta(hours=1)  # instead, where torch.compile may be at work within a step
# what torchrun tells each process
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """This process, number `rank` of `size`, on its machine number `local_rank` of `local_size`."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # all processes, for what they exchange within a step
    step_group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Does this process write checkpoints and logs, and talk?"""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device that this process computes on: on CUDA a card of its own."""
        if device.type != "cuda" or self.size == 1:
            return device
        require(
            self.local_rank < torch.cuda.device_count(),
            f"expected a card for each process, got {self.local_size} processes and {torch.cuda.device_count()} cards; "
            "lower --nproc_per_node")
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def wait(self) -> None:
        """Go on when all processes are here, however long it takes."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes through this before all others, and the first of another machine
        before the rest of it: they find what it has made."""
        turn = 0 if self.is_main else 2 if self.local_rank else 1
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(2 - turn):
            self.wait()

    def gather(self, items: list) -> list:
        """The items of all processes, however long it takes."""
        if self.size == 1:
            return items
        of_each = [None] * self.size
        distributed.all_gather_object(of_each, items)
        return [item for items in of_each for item in items]

    def agree(self, value, message: str) -> None:
        """Raise UserError in all processes unless they have the same value."""
        require(all(other == value for other in self.gather([value])), message)

    def total(self, figures: dict[str, float]) -> dict[str, float]:
        """The sum of each figure over the processes, within a step."""
        if self.size == 1:
            return figures
        values = torch.tensor(list(figures.values()), dtype=torch.float64)
        distributed.all_reduce(values, group=self.step_group)
        return dict(zip(figures, values.tolist()))

    @torch.no_grad()
    def start_alike(self, parameters: list[nn.Parameter]) -> None:
        """Give all processes the values that the first has: what starts at random may differ
        between two machines."""
        self.wait()
        for parameter in parameters if self.size > 1 else []:
            distributed.broadcast(parameter, 0, group=self.step_group)

    def add_up(self, parameters: list[nn.Parameter]) -> None:
        """Make each gradient its sum over the processes, within a step. A missing one becomes
        zeros: clips too short for a semantic embedding do not reach the semantic adapter. So it
        does in a single process, whose optimiser makes the step that it would make among several.
        """
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.size == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        distributed.all_reduce(flat, group=self.step_group)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, total in zip(parameters, flat.split(sizes)):
            parameter.grad.copy_(total.view_as(parameter))


def has_lost_another(error: RuntimeError) -> bool:
    """Whether an error of gloo or NCCL tells of another process. NCCL also tells of want of
    memory."""
    words = ("Connection closed", "Connection reset", "gloo", "NCCL", "Broken pipe")
    return not out_of_memory(error) and any(word in str(error) for word in words)


@contextmanager
def together(size: int, compiles: bool = False) -> Iterator[World]:
    """Join the `size` processes that torchrun has started; a World of one if it has not. All but
    the first are silent, and each ends with the block. Raises UserError when another process is
    lost."""
    if size == 1:
        yield World()
        return
    missing = [name for name in STARTED if name not in os.environ]
    require(
        not missing,
        f"expected processes that torchrun has started, got WORLD_SIZE={size} without {', '.join(missing)}; start them "
        f"with: torchrun --nproc_per_node={size} train.py, or unset WORLD_SIZE")
    world = World(*(int(os.environ[name]) for name in STARTED))
    if not world.is_main:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")
    try:
        distributed.init_process_group("gloo", timeout=WAIT_TIMEOUT)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        step_group = distributed.new_group(backend=backend,
                                           timeout=COMPILE_TIMEOUT if compiles else STEP_TIMEOUT)
        world = dataclasses.replace(world, step_group=step_group)
        yield world
        world.wait()  # or one would hang up while another still listens
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # at an ordinary exit torch's threads now and then end the process with an error
        os._exit(0)
    except RuntimeError as error:  # what gloo and NCCL raise
        if not has_lost_another(error):
            raise
        raise UserError(
            f"process {world.rank} of {world.size} has lost another, which has ended, hangs or cannot be reached; see its "
            f"message, and go on with --resume ({str(error).strip().splitlines()[0][:200]})"
        ) from None


def shard(blocks: nn.ModuleList, world: World, device: torch.device) -> None:
    """Split the frozen weights of each block among the processes. They come together on the device
    when the block runs, and part again. What can be trained in it stays whole, trained or not."""
    # here, as it takes a second or two that a single process need not wait
    from torch.distributed.fsdp import fully_shard

    require("ignored_params" in inspect.signature(fully_shard).parameters,
            f"--shard: expected torch 2.7 or later, got {torch.__version__}; install a later one")
    world.wait()
    mesh = DeviceMesh.from_group(world.step_group, device.type)
    for block in blocks:
        whole = {
            parameter
            for name, parameter in block.named_parameters()
            if parameter.requires_grad or "lora_" in name}
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
