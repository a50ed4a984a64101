"""A `.pt` file in, its tensors and plain values out, and back, without running anything that the file names.

Such a file is a zip archive: raw numbers, and a stream of instructions for Python's own serialiser that may name any
function of any module and call it. Here that stream is read as data. A name is never looked up, only compared with the
two that a tensor needs, and every instruction that is not in the table below is refused, so there is nothing that a
file could make run. Decision 0006 says what else was weighed.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.errors import ArtefactError
from pilotfish.runs import atomic_path

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}


_DAMAGE = (
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    struct.error,
)
"""What a cut or changed file leads to."""


class _Refused(Exception):
    """Why a stream is not read."""


class _Name(NamedTuple):
    """What the stream would have imported."""

    module: str
    name: str


_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_DICT = _Name("collections", "OrderedDict")


def read_archive(path: Path) -> Any:
    """Reads a tensor, or a dict or list of tensors, numbers and texts, as PyTorch saves them by default.

    An object of a class becomes the dict of its attributes, under the class's name as the key `"class"`.

    Raises:
        ArtefactError: the file is no such archive, is damaged, or holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (stream,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            folder = stream.removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise _Refused("it is compressed")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise _Refused("its numbers are not little-endian")
            return _Stream(archive.read(stream), lambda key: archive.read(f"{folder}data/{key}")).value()
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
    except _Refused as error:
        raise ArtefactError(
            f"{path} is not read: {error}. Save plain tensors again by PyTorch's default, or convert it to safetensors"
        ) from error
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is not a whole PyTorch archive: {error}; copy it again") from error


def write_archive(path: Path, matrix: Float[Tensor, "row column"]) -> None:
    """Writes one float32 matrix as PyTorch would, atomically, so that its loader of weights alone reads it."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def whole(*values: int) -> bytes:
        return b"".join(b"J" + struct.pack("<i", value) for value in values)

    def name(of: _Name) -> bytes:
        return f"c{of.module}\n{of.name}\n".encode()

    rows, columns = matrix.shape
    storage = text("storage") + name(_Name("torch", "FloatStorage")) + text("0") + text("cpu") + whole(matrix.numel())
    sizes = b"(" + whole(rows, columns) + b"t(" + whole(columns, 1) + b"t"
    arguments = b"((" + storage + b"tQ" + whole(0) + sizes + b"\x89" + name(_DICT) + b")Rt"
    entries = {
        "data.pkl": b"\x80\x02" + name(_TENSOR) + arguments + b"R.",
        "byteorder": b"little",
        "data/0": matrix.detach().cpu().to(torch.float32).contiguous().numpy().astype("<f4").tobytes(),
        "version": b"3\n",
    }
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{entry}"), content)


class _Stream:
    """A stack, marks on it, and values kept for later: what the instructions work on."""

    def __init__(self, stream: bytes, numbers: Callable[[str], bytes]) -> None:
        self._stream, self._numbers = stream, numbers
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._kept: dict[int, Any] = {}

    def value(self) -> Any:
        while (code := self._take(1)) != b".":
            if code not in _INSTRUCTIONS:
                raise _Refused(f"tensors and plain values need no instruction {code!r} (byte {self._at - 1})")
            _INSTRUCTIONS[code](self)
        (value,) = self._stack
        return value

    def _version(self) -> None:
        self._take(1)

    def _take(self, size: int) -> bytes:
        taken = self._stream[self._at : self._at + size]
        if len(taken) < size:
            raise EOFError("it ends early")
        self._at += size
        return taken

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return number

    def _line(self) -> str:
        end = self._stream.index(b"\n", self._at)
        return self._take(end + 1 - self._at)[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _last(self, count: int) -> tuple[Any, ...]:
        return tuple(self._stack.pop() for _ in range(count))[::-1]

    def _set_items(self, values: list[Any]) -> None:
        if not all(isinstance(key, str | int) for key in values[::2]):
            raise _Refused("it holds a dict with keys that are neither texts nor whole numbers")
        self._stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _call(self) -> None:
        function, arguments = self._last(2)
        if function == _TENSOR:
            self._push(_tensor(*arguments[:4]))
        elif function == _DICT and not arguments:
            self._push({})
        else:
            raise _Refused(f"it asks to call {'.'.join(function)}")

    def _object(self) -> None:
        kind, arguments = self._last(2)
        if not isinstance(kind, _Name) or arguments:
            raise _Refused("it asks to make an object with arguments")
        self._push({"class": kind.name})

    def _storage(self) -> None:
        kind, (module, name), key, _, size = self._stack.pop()
        if kind != "storage" or module != "torch" or name not in _DTYPES or not isinstance(key, str):
            raise _Refused(f"it holds numbers that are none of {', '.join(_DTYPES)}")
        numbers = torch.frombuffer(bytearray(self._numbers(key)), dtype=_DTYPES[name])
        if len(numbers) != size:
            raise _Refused(f"a storage of {size} numbers has {len(numbers)}")
        self._push(numbers)


def _tensor(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride) < 0 or math.prod(size) > len(numbers) or last >= len(numbers):
        raise _Refused(f"a tensor does not fit its {len(numbers)} numbers")
    return numbers.as_strided(size, stride, offset).clone()


_INSTRUCTIONS: dict[bytes, Callable[[_Stream], None]] = {
    b"\x80": _Stream._version,
    b"(": lambda s: s._marks.append(len(s._stack)),
    b"c": lambda s: s._push(_Name(s._line(), s._line())),
    b"q": lambda s: s._kept.update({s._number("<B"): s._stack[-1]}),
    b"r": lambda s: s._kept.update({s._number("<I"): s._stack[-1]}),
    b"h": lambda s: s._push(s._kept[s._number("<B")]),
    b"j": lambda s: s._push(s._kept[s._number("<I")]),
    b"N": lambda s: s._push(None),
    b"\x88": lambda s: s._push(True),
    b"\x89": lambda s: s._push(False),
    b"K": lambda s: s._push(s._number("<B")),
    b"M": lambda s: s._push(s._number("<H")),
    b"J": lambda s: s._push(s._number("<i")),
    b"\x8a": lambda s: s._push(int.from_bytes(s._take(s._number("<B")), "little", signed=True)),
    b"G": lambda s: s._push(s._number(">d")),
    b"X": lambda s: s._push(s._take(s._number("<I")).decode()),
    b")": lambda s: s._push(()),
    b"\x85": lambda s: s._push(s._last(1)),
    b"\x86": lambda s: s._push(s._last(2)),
    b"\x87": lambda s: s._push(s._last(3)),
    b"t": lambda s: s._push(tuple(s._since_mark())),
    b"]": lambda s: s._push([]),
    b"a": lambda s: s._stack[-2].append(s._last(1)[0]),
    b"e": lambda s: s._stack[s._marks[-1] - 1].extend(s._since_mark()),
    b"}": lambda s: s._push({}),
    b"s": lambda s: s._set_items(list(s._last(2))),
    b"u": lambda s: s._set_items(s._since_mark()),
    b"Q": _Stream._storage,
    b"R": _Stream._call,
    b"\x81": _Stream._object,
    b"b": lambda s: s._set_items([item for pair in s._last(1)[0].items() for item in pair]),
}
"""Instruction of the serialiser's protocol 2 to what it does here; all others are refused."""
