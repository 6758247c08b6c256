"""What lets a package name what stands in its modules without importing them yet."""

from __future__ import annotations

import importlib
from collections.abc import Callable


def open_room(package: str, places: dict[str, tuple[str, ...]]) -> tuple[list[str], Callable]:
    """`__all__` and `__getattr__` of a package; a module is imported when a name in it is used.

    So the processes that draw phantoms need not load torch, and `covidmask --help` answers at once.
    `package` is its `__name__`, `places` maps each module to the names that it shows of it.
    """
    home = {name: module for module, names in places.items() for name in names}

    def get(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return sorted(home), get
