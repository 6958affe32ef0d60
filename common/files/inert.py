"""Training checkpoints with Python objects in them: the tensors are read, no object is built.

torch's own reader refuses a file for a single ``argparse.Namespace`` beside the weights. Here a
handful of names make up tensors and dictionaries; every other class or function becomes a subclass
of :class:`Inert`. No module is imported and no function that a file names is called.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from common.command.cli import UserError

# Nobody has these beside weights by accident.
HOSTILE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "runpy", "importlib",
    "code", "ctypes", "webbrowser",
}  # fmt: skip
HOSTILE_BUILTINS = {
    "eval", "exec", "compile", "open", "__import__", "setattr", "delattr", "globals", "breakpoint",
    "input", "print",
}  # fmt: skip


class _Dictionary(dict):
    """An ``OrderedDict`` of a file, without the attributes that it may bring."""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


class Inert(_Dictionary):
    """Stands for an object of a class that is not loaded; keeps the items it was given."""

    name = ""  # full name of the class or function
    dump_patches = False  # torch's older format asks the class of a module for it
    __hash__ = object.__hash__  # may be a key

    def __init__(self, *arguments: object):
        super().__init__()

    def append(self, item: object) -> None:
        """Drop an item of a list."""

    extend = add = update = append


def read_inert(path: Path) -> object:
    """Return the content of a checkpoint, with an :class:`Inert` object for each Python object.

    What only a hostile file names is a UserError; a damaged file raises any exception.
    """

    class Unpickler(pickle._Unpickler):  # the one in C sizes its memo by what the file claims
        dispatch = _LOADERS

        def find_class(self, module: str, name: str) -> Any:
            full, is_builtin = f"{module}.{name}", module in ("builtins", "__builtin__")
            is_hostile = is_builtin and name in HOSTILE_BUILTINS
            if is_hostile or module.partition(".")[0] in HOSTILE_MODULES:
                raise object_refused(path, name if is_builtin else full)
            return _KNOWN.get(full) or type("Inert", (Inert,), {"name": full})

    reader = SimpleNamespace(
        __name__="inert",
        Unpickler=Unpickler,
        load=lambda file, **options: Unpickler(file, **options).load(),
    )
    with path.open("rb") as file:
        return torch.load(
            file, map_location="cpu", pickle_module=reader, weights_only=False, encoding="latin1"
        )


def object_refused(path: Path, name: str) -> UserError:
    """Return the error for an object that is never loaded."""
    return UserError(
        f"{path}: holds a Python object ({name}), which is never loaded; save the model's "
        "state_dict() alone"
    )


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *rest: Any):
    whole = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    return whole.as_strided(size, stride, offset)  # unlike `set_`, refuses to reach beyond


# A bytearray is allocated before it is read, as large as the file claims.
_LOADERS = {code: load for code, load in pickle._Unpickler.dispatch.items()
            if code != pickle.BYTEARRAY8[0]}  # fmt: skip
_KNOWN = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "collections.OrderedDict": _Dictionary,
}
