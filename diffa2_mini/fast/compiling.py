"""torch.compile for the blocks of encoder and backbone, whose small operations it fuses."""

import itertools
import logging
import sys
from collections.abc import Callable

import torch
from torch import nn


class Fused:
    """A block's forward pass, compiled when it is first used. If that fails, this one and those of
    `all_fused` that have not run yet are not compiled from then on. The others stay compiled: a
    backward pass that recomputes a block must compute what the forward pass did."""

    def __init__(self, forward: Callable, all_fused: list["Fused"]):
        self.plain, self.fused, self.all_fused = forward, torch.compile(forward), all_fused
        self.has_run, self.fails = False, False

    def __call__(self, *inputs):
        if not self.fails:
            try:
                output = self.fused(*inputs)
                self.has_run = True
                return output
            except torch._dynamo.exc.TorchDynamoException as error:
                if not any(each.fails for each in self.all_fused):
                    reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    print(f"--compile: a block could not be compiled, goes on without ({reason})",
                          file=sys.stderr)
                for each in self.all_fused:
                    each.fails |= each is self or not each.has_run
        return self.plain(*inputs)


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile each block when it is first used. If that fails, one line says so."""
    torch._logging.set_logs(all=logging.ERROR)  # else thousands of lines; see TORCH_LOGS
    all_fused = []
    for block in itertools.chain(*stacks):
        block.forward = Fused(block.forward, all_fused)
        all_fused.append(block.forward)
