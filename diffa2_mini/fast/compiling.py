"""torch.compile for the blocks of encoder and backbone, whose small operations it fuses."""

import itertools
import logging
import sys

import torch
from torch import nn


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile each block when it is first used. After the first failure, which one line tells, all
    that is not compiled yet runs as it is."""
    torch._logging.set_logs(all=logging.ERROR)  # else thousands of lines; see TORCH_LOGS
    torch._dynamo.config.suppress_errors = True  # in what comes before `compiler`
    failures = []

    def compiler(graph: torch.fx.GraphModule, inputs: list):
        from torch._inductor.compile_fx import compile_fx  # takes long
        if not failures:
            try:
                return compile_fx(graph, inputs)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                print(f"--compile: a block could not be compiled, goes on without ({reason})",
                      file=sys.stderr)
                failures.append(error)
        return graph

    for block in itertools.chain(*stacks):
        block.forward = torch.compile(block.forward, backend=compiler)
