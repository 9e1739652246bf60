"""Blocks whose operations torch.compile fuses."""

import logging
import sys
from collections.abc import Callable

import torch
from torch import nn


class Fused:
    """A block's forward pass, fused by torch.compile when it is first used. Where that fails it
    runs as it is from then on, and so do those among `all_fused` that have not been fused by then;
    others stay, since in a backward pass what is computed again must be computed as before."""

    def __init__(self, forward: Callable, all_fused: list["Fused"]):
        self.plain, self.fused, self.all_fused = forward, torch.compile(forward), all_fused
        self.has_run, self.fails = False, False

    def __call__(self, *inputs):
        if self.fails:
            return self.plain(*inputs)
        try:
            output = self.fused(*inputs)
            self.has_run = True
            return output
        except torch._dynamo.exc.TorchDynamoException as error:
            if not any(each.fails for each in self.all_fused):
                reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
                print(f"--compile: a block could not be compiled, goes on without ({reason})",
                      file=sys.stderr)
            for each in self.all_fused:
                each.fails = each.fails or each is self or not each.has_run
        return self.plain(*inputs)


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Have torch.compile fuse the operations of each block when it is first used. Where it cannot,
    for want of a compiler say, one line says so, and the block runs as it is."""
    # else thousands of lines; TORCH_LOGS brings them back
    torch._logging.set_logs(all=logging.ERROR)
    all_fused = []
    for blocks in stacks:
        for block in blocks:
            block.forward = Fused(block.forward, all_fused)
            all_fused.append(block.forward)
