"""Builds a network of timm in a fraction of the time that timm's import and random weights take."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


def build_network(arguments: Mapping[str, Any], seed: int, is_drawn: bool) -> nn.Module:
    """Build a network; the caller's random numbers stay as they are.

    Args:
        arguments: of ``timm.create_model``.
        seed: seed of its random weights.
        is_drawn: whether these are wanted; else they are to be replaced, all of them, and hold anything.
    """
    timm = import_timm()
    with torch.random.fork_rng(devices=[]), nullcontext() if is_drawn else _Undrawn():
        torch.manual_seed(seed)
        network: nn.Module = timm.create_model(**arguments)
    if not is_drawn and [*network.buffers()]:  # they may be in no file
        return build_network(arguments, seed, True)
    return network


class _Undrawn(TorchFunctionMode):
    """Leaves out what is done to tensors in place: to draw a ViT-L's weights takes five seconds."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (the function's)
        name, options = getattr(function, "__name__", ""), dict(kwargs or {})
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else options["tensor"]
        return function(*args, **options)


def import_timm() -> ModuleType:
    """Import timm without torch's compiler, which takes longer to import than timm and torchvision.

    These two use two of its functions while they are imported: stand-ins import the compiler when they are
    called, and whatever else is asked of the compiler meanwhile imports it at once.
    """
    if COMPILER in sys.modules or "timm" in sys.modules:
        return importlib.import_module("timm")
    standins = {name: ModuleType(name) for name in (COMPILER, UTILS)}

    def stand_back() -> None:
        for name, module in standins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def real(name: str, attribute: str) -> Any:  # noqa: ANN401 (the compiler's own)
        if attribute.startswith("__") and (name, attribute) != (COMPILER, "__path__"):
            raise AttributeError(attribute)  # Python asks every module for its file and so on
        stand_back()
        return getattr(importlib.import_module(name), attribute)

    def disable(function: Any = None, recursive: bool = True, reason: str | None = None) -> Any:  # noqa: ANN401
        return torch._disable_dynamo(function, recursive)  # torch's own, which imports the compiler late

    standins[COMPILER].__dict__.update(disable=disable, __getattr__=lambda name: real(COMPILER, name))
    standins[UTILS].__dict__.update(
        is_compile_supported=lambda device: real(UTILS, "is_compile_supported")(device),
        __getattr__=lambda name: real(UTILS, name),
    )
    sys.modules.update(standins)
    try:
        return importlib.import_module("timm")
    finally:
        stand_back()
