"""Objects that the native library calls back: instances of its classes that call our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def native(base: Any, **methods: Callable[..., Any]) -> Any:
    """An instance of a subclass of `base` whose methods are these, without `self`.

    The classes belong to a module that is a parameter, so they cannot be derived from by name.
    """

    def init(self: Any) -> None:
        base.__init__(self)

    bound = {name: staticmethod(method) for name, method in methods.items()}
    return type(f"Remora{base.__name__}", (base,), {"__init__": init, **bound})()
