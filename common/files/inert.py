"""Training checkpoints with Python objects in them: the tensors are read, no object is built.

torch's own reader refuses a file for a single ``argparse.Namespace`` beside the weights. This one
knows a handful of names that make up tensors; every other class or function becomes an
:class:`Inert` object. No module is imported and no function that a file names is called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from common.command.cli import UserError

DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
# Nobody has these beside weights by accident.
HOSTILE_MODULES = {
    "os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "runpy", "importlib",
    "code", "ctypes", "webbrowser",
}  # fmt: skip
HOSTILE_BUILTINS = {
    "eval", "exec", "compile", "open", "__import__", "setattr", "delattr", "globals", "breakpoint",
    "input", "print",
}  # fmt: skip
LEGACY_HEADER_PICKLES = 3  # a magic number, the version, and sizes of types


class Inert(dict):
    """Stands for an object of a class that is not loaded; keeps the items it was given.

    Attributes:
        name: Full name of the class or function.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    __hash__ = object.__hash__  # may be a key

    def append(self, item: object) -> None:
        """Take an item of a list, and drop it."""

    extend = add = update = append


def read_inert(path: Path, is_zip: bool) -> object:
    """Return a checkpoint's content with an :class:`Inert` object for each Python object.

    Args:
        path: A file that :func:`common.files.untrusted.check_file` and the check of archives
            have passed.
        is_zip: Whether it is a zip archive; else it is in torch's older format.

    Raises:
        UserError: The file names a function that only a hostile file names.
        Exception: The file is damaged, in one of many ways.
    """
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            root = next(n for n in archive.namelist() if n.endswith("data.pkl"))[: -len("data.pkl")]
            if f"{root}byteorder" in archive.namelist():
                _require(archive.read(f"{root}byteorder") == b"little")
            storages: dict[str, bytearray] = {}

            def load(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
                if key not in storages:
                    storages[key] = bytearray(archive.read(f"{root}data/{key}"))
                _require(0 <= count * dtype.itemsize <= len(storages[key]))
                if not count:
                    return torch.empty(0, dtype=dtype)
                return torch.frombuffer(storages[key], dtype=dtype, count=count)

            with archive.open(f"{root}data.pkl") as file:
                return _Reader(path, file, load).load()
    with path.open("rb") as file:
        return _read_legacy(path, file)


def _read_legacy(path: Path, file: IO[bytes]) -> object:
    """Read torch's older format: pickles, then the storages that they name."""
    left = path.stat().st_size
    storages: dict[str, torch.Tensor] = {}

    def reserve(dtype: torch.dtype, key: str, count: int) -> torch.Tensor:
        nonlocal left
        if key not in storages:
            left -= count * dtype.itemsize
            _require(count >= 0 and left >= 0)
            storages[key] = torch.zeros(count, dtype=dtype)
        return storages[key]

    for _ in range(LEGACY_HEADER_PICKLES):
        _Reader(path, file, reserve).load()
    content = _Reader(path, file, reserve).load()
    for key in _Reader(path, file, reserve).load():
        storage = storages[key]
        _require(int.from_bytes(file.read(8), "little") == len(storage))
        buffer = memoryview(storage.view(torch.uint8).numpy()) if len(storage) else b""
        _require(len(storage) == 0 or file.readinto(buffer) == len(buffer))
    return content


class _Reader(pickle._Unpickler):
    """Python's own unpickler, with every step that could import, build or call replaced."""

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        path: Path,
        file: IO[bytes],
        load_storage: Callable[[torch.dtype, str, int], torch.Tensor],
    ):
        super().__init__(file, encoding="latin1")
        self._path, self._load_storage = path, load_storage

    def find_class(self, module: str, name: str) -> Inert:
        top = module.partition(".")[0]
        is_builtin = top in ("builtins", "__builtin__")
        if top in HOSTILE_MODULES or (is_builtin and name in HOSTILE_BUILTINS):
            raise object_refused(self._path, name if is_builtin else f"{module}.{name}")
        return Inert(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an extension")

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        kind, storage_type, key, _, count, *view = pid
        _require(kind == "storage" and type(count) is int)
        storage = self._load_storage(DTYPES[storage_type.name.rpartition(".")[2]], key, count)
        if view and view[0] is not None:
            _, offset, size = view[0]
            return storage[offset : offset + size]
        return storage

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _construct(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_reduce()

    def _instantiate(self, made: object, arguments: tuple) -> None:
        self.append(_construct(made, tuple(arguments)))

    def load_build(self) -> None:
        self.stack.pop()

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build


def object_refused(path: Path, name: str) -> UserError:
    """Return what is told of an object that is never loaded."""
    return UserError(
        f"{path}: holds a Python object ({name}), which is never loaded; save the model's "
        "state_dict() alone"
    )


def _construct(made: object, arguments: tuple) -> object:
    """Return a tensor or a dictionary where ``made`` stands for one of theirs; else itself."""
    _require(isinstance(made, Inert) and isinstance(arguments, tuple))
    build = _KNOWN.get(made.name)
    return Inert(made.name) if build is None else build(*arguments)


def _rebuild_tensor(
    storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *rest: Any
) -> torch.Tensor:
    _require(isinstance(storage, torch.Tensor))
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(tensor: torch.Tensor, *rest: Any) -> torch.Tensor:
    return tensor


def _rebuild_dictionary(items: Mapping | list = ()) -> dict:
    return dict(items)


_KNOWN: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "collections.OrderedDict": _rebuild_dictionary,
}


def _require(condition: bool) -> None:
    if not condition:
        raise pickle.UnpicklingError("damaged")
