"""Names that are imported when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a module. names: {name: the module in minit2v that has it}.

    The modules of a package are also found. Any other name is an AttributeError, or an ImportError in an import
    statement. The message names the nearest known name.
    """

    def get(name: str) -> Any:
        module = sys.modules[package]
        if name in names:
            value = getattr(import_module(f"minit2v.{names[name]}"), name)
            setattr(module, name, value)
            return value
        if not name.startswith("_"):
            if hasattr(module, "__path__") and find_spec(f"{package}.{name}") is not None:
                return import_module(f"{package}.{name}")
            from minit2v_convert.rename import nearest

            # `from minit2v import Name` also calls this, and would hide the message of an AttributeError.
            imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
            kind = ImportError if imported else AttributeError
            raise kind(f"{package} has no {name!r}{nearest(name, list(names))}", name=name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)

    def all_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, all_names
