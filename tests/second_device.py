"""A second device on a machine that has only a processor: tensors that say they are on "cuda",
compute on the processor, and refuse to meet tensors of the processor, as on a card.

`second_device()` makes it exist for a `with`. Code that forgets to move a tensor fails within it,
though no card is there. Numbers, kernels and speed are the processor's."""

import contextlib
import unittest.mock
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("cuda", 0)
# operations that may meet both devices: copies between them, and indices that torch moves itself
MOVES = ("_to_copy", "copy_", "index", "index_put_", "index_put", "_index_put_impl_")


class OnCard(Tensor):
    "A tensor of the second device; `raw` has its numbers."

    @staticmethod
    def __new__(cls, raw: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=raw.device,
            requires_grad=False,
        )

    def __init__(self, raw: Tensor):
        self.raw = raw

    def __repr__(self, **_):
        return f"OnCard({self.raw})"

    def __reduce_ex__(self, protocol):
        raise TypeError("a tensor of the card was pickled; move it to the processor before")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not isinstance(x, OnCard) and x.ndim and name not in MOVES:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {name} got one of shape "
                    f"{list(x.shape)} on cpu, and others on {CARD}"
                )
        bare = tree_map(lambda x: x.raw if isinstance(x, OnCard) else x, (args, kwargs))
        if name == "histc":  # a card counts whole numbers, a processor does not
            bare = ((bare[0][0].float(), *bare[0][1:]), bare[1])
        out = func(*bare[0], **bare[1])
        onto_processor = name == "copy_" and not isinstance(args[0], OnCard)
        if onto_processor:
            return args[0]
        out = tree_map(lambda x: OnCard(x) if isinstance(x, Tensor) else x, out)
        return return_and_correct_aliasing(func, args, kwargs, out)


def _is_card(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Moves(TorchFunctionMode):
    "Answers what names a device: `.to`, `.cpu`, `.device`, and functions that make tensors."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return CARD if isinstance(args[0], OnCard) else func(*args)
        if func == Tensor.is_cuda.__get__:
            return isinstance(args[0], OnCard)
        if func in (Tensor.cpu, Tensor.numpy, Tensor.cuda):
            if func is Tensor.numpy and isinstance(args[0], OnCard):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            device = "cuda" if func is Tensor.cuda else "cpu"
            return _moved(args[0], device) if func is not Tensor.numpy else func(*args)
        if func in (Tensor.storage, Tensor.untyped_storage, Tensor.data_ptr):
            return func(args[0].raw if isinstance(args[0], OnCard) else args[0])
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if _is_card(kwargs.get("device")):
            kwargs["device"] = "cpu"
            out = func(*args, **kwargs)
            return tree_map(lambda x: _moved(x, CARD) if isinstance(x, Tensor) else x, out)
        return func(*args, **kwargs)

    def _to(self, x: Tensor, *args, **kwargs):
        given = [*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")]
        for like in [g for g in given if isinstance(g, Tensor)]:
            given += [CARD if isinstance(like, OnCard) else like.device, like.dtype]
        for dtype in [g for g in given if isinstance(g, torch.dtype)]:
            x = x.to(dtype)
        for device in [g for g in given if isinstance(g, str | torch.device)]:
            x = _moved(x, device)
        return x


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, to_card):
        return OnCard(x.detach().clone()) if to_card else x.raw.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return (grad.raw if isinstance(grad, OnCard) else OnCard(grad)), None


def _moved(x: Tensor, device) -> Tensor:
    to_card = _is_card(device)
    if isinstance(x, OnCard) == to_card:
        return x
    if isinstance(x, torch.nn.Parameter) or not x.requires_grad:
        with torch.no_grad():
            out = OnCard(x.detach().clone()) if to_card else x.raw.detach().clone()
        return out.requires_grad_(x.requires_grad) if x.requires_grad else out
    return _Move.apply(x, to_card)


@contextlib.contextmanager
def second_device() -> Iterator[torch.device]:
    "The device, for as long as it exists."
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            # wrapped tensors make no views in inference mode, and nobody has CUDA to ask
            for name, stand_in in (
                ("torch.inference_mode", torch.no_grad),
                ("torch.cuda.get_device_capability", lambda *_: (9, 0)),
            ):
                stack.enter_context(unittest.mock.patch(name, stand_in))
            stack.enter_context(_Moves())
            yield CARD
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
