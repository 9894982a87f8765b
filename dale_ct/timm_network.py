"""Builds networks of timm without torch's compiler, and without random weights that a file replaces."""
# ruff: noqa: ANN401 (values are torch's own)

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


def build_network(arguments: Mapping[str, Any], seed: int, is_drawn: bool) -> torch.nn.Module:
    """Call ``timm.create_model`` for weights that a seed draws, or else for any, which must be replaced."""
    with compiler_left_out():
        import timm
    with torch.random.fork_rng(devices=[]), nullcontext() if is_drawn else _Undrawn():
        torch.manual_seed(seed)  # the caller's random numbers stay as they are
        network: torch.nn.Module = timm.create_model(**arguments)
    in_no_file = not is_drawn and [*network.buffers()]
    return build_network(arguments, seed, True) if in_no_file else network


class _Undrawn(TorchFunctionMode):
    """Leaves out what is done to tensors in place: to draw a ViT-L's weights takes five seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), kwargs or {}
        if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
            return func(*args, **options)
        return args[0] if args else options["tensor"]


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Import timm in here: torch's compiler takes longer to import, of which timm needs two functions."""
    try:
        from torch._compile import _disable_dynamo
    except ImportError:  # a torch that does without; then timm brings its compiler
        yield
        return
    standins = {name: ModuleType(name) for name in (COMPILER, UTILS)}

    def real(name: str, attribute: str) -> Any:
        if attribute.startswith("__") and (name, attribute) != (COMPILER, "__path__"):
            raise AttributeError(attribute)  # Python asks every module for its file and so on
        stand_back()
        return getattr(importlib.import_module(name), attribute)

    def stand_back() -> None:
        for name in [name for name in standins if sys.modules.get(name) is standins[name]]:
            del sys.modules[name]

    for name, module in standins.items():  # what they lack is the compiler's, which it imports
        vars(module)["__getattr__"] = partial(real, name)
    vars(standins[COMPILER])["disable"] = lambda func, deep, reason: _disable_dynamo(func, deep)
    vars(standins[UTILS])["is_compile_supported"] = lambda kind: real(UTILS, "is_compile_supported")(kind)
    sys.modules.update({} if COMPILER in sys.modules else standins)
    try:
        yield
    finally:
        stand_back()
