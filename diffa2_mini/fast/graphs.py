"""Steps that are recorded as a CUDA graph, and replayed without Python between their kernels."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """A function of tensors on CUDA. Its kernels are recorded once for each shape of its inputs,
    and then replayed without Python, and without a gap, between them. The output is overwritten by
    the next call. What cannot be recorded runs as it is, with a warning."""

    def __init__(self, function: Callable):
        self.function, self.recorded, self.fails = function, {}, False

    def record(self, inputs: list[Tensor]) -> tuple[list[Tensor], torch.cuda.CUDAGraph, Tensor]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        # whatever a kernel prepares on its first run must not be recorded
        with torch.cuda.stream(beside):
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
                warnings.warn(
                    f"--capture: not recorded, goes on without ({str(error).splitlines()[0]})")
        if shapes not in self.recorded:
            return self.function(*tensors)
        inputs, graph, output = self.recorded[shapes]
        for recorded, tensor in zip(inputs, tensors):
            recorded.copy_(tensor)
        graph.replay()
        return output
