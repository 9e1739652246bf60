"""Less time between kernels: torch.compile fuses a block's small operations, and a CUDA graph is a
step's kernels, recorded once and replayed without Python between them."""

import itertools
import logging
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn


def quiet_compiler() -> Callable:
    """What turns a graph into kernels, for torch.compile. After the first failure, which one line
    tells, all that is not compiled yet runs as it is."""
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

    return compiler


def compile_blocks(*stacks: nn.ModuleList) -> None:
    """Compile each block when it is first used."""
    compiler = quiet_compiler()
    for block in itertools.chain(*stacks):
        block.forward = torch.compile(block.forward, backend=compiler)


@cache
def compiled(function: Callable) -> Callable:
    """A function of tensors that is compiled once for each shape of its inputs."""
    torch._dynamo.config.cache_size_limit = 64  # shapes; at first 8, and no others are compiled
    return torch.compile(function, backend=quiet_compiler(), dynamic=False)


class Captured:
    """A function of tensors on CUDA, recorded once for each shape of its inputs, then replayed. The
    next call overwrites the output. If it cannot be recorded, it runs as it is, with a warning."""

    def __init__(self, function: Callable):
        self.function, self.recorded, self.fails = function, {}, False

    def record(self, inputs: list[Tensor]) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # a kernel's first run, whose preparations are not recorded
            self.function(*inputs)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.function(*inputs)
        return inputs, graph, output

    def __call__(self, *tensors: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recorded and not self.fails:
            try:
                self.recorded[shapes] = self.record([tensor.clone() for tensor in tensors])
            except RuntimeError as error:
                self.fails = True
                reason = str(error).splitlines()[0]
                warnings.warn(f"--capture: not recorded, goes on without ({reason})", stacklevel=2)
        if shapes not in self.recorded:
            return self.function(*tensors)
        inputs, graph, output = self.recorded[shapes]
        for recorded, tensor in zip(inputs, tensors):
            recorded.copy_(tensor)
        graph.replay()
        return output
