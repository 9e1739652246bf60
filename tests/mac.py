"""A Mac's GPU, pretended: tensors that say they are on `mps`, and compute on the CPU. Like the real
one it knows no float64, and it does not compute with what is on the CPU."""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("meta")
# with the CPU
MAY_MIX = ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")


class OnGpu(torch.Tensor):
    """A tensor on the GPU; `inside` is what it is made of, on the CPU."""

    @staticmethod
    def __new__(cls, inside: torch.Tensor):
        assert inside.dtype not in (torch.float64, torch.complex128), "a Mac's GPU has no float64"
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(),
            dtype=inside.dtype, device=GPU)

    def __init__(self, inside: torch.Tensor):
        self.inside = inside

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> list:
        return self.inside.tolist()

    def numpy(self, **named):
        raise TypeError("what is on the GPU has no array; move it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args: tuple, kwargs: dict):
    """Call an operation of torch; what comes out is where real tensors would be."""
    given, _ = tree_flatten((args, kwargs))
    on_gpu = {id(x.inside): x for x in given if isinstance(x, OnGpu)}
    asked = kwargs.get("device")
    if on_gpu and function.overloadpacket.__name__ not in MAY_MIX:
        stray = [x for x in given if type(x) is torch.Tensor and x.dim() > 0]
        assert not stray, f"{function} computes with tensors on the GPU and on the CPU"
    args, kwargs = tree_map(lambda x: x.inside if isinstance(x, OnGpu) else x, (args, kwargs))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    found = function(*args, **kwargs)
    if on_gpu if asked is None else torch.device(asked).type == GPU.type:
        def there(x):  # the same tensor again, if it was changed in place
            known = on_gpu.get(id(x))
            if isinstance(x, torch.Tensor):
                return OnGpu(x) if known is None else known
            return x
        return tree_map(there, found)
    return found


class Computes(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class Moves(TorchFunctionMode):
    """What is made of Python's numbers is moved there; torch itself leaves it out on this
    device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if function in (torch.tensor, torch.as_tensor) else None
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


@contextmanager
def mac():
    """Within it, tensors can be made on the GPU, and moved there."""
    with Computes(), Moves():
        yield
