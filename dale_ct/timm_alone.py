"""Imports timm in half the time."""

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


def import_timm() -> ModuleType:
    """Import timm without torch's compiler, which takes longer to import than timm and torchvision.

    These two use two of its functions while they are imported: stand-ins import the compiler when they are
    called, and whatever else is asked of the compiler meanwhile imports it at once.
    """
    import torch

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
