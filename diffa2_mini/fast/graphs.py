"""CUDA graphs: a step's kernels are recorded once, and replayed without Python between them."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


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
