"""Reads TensorFlow's checkpoints, as OpenAI published GPT-2 in them, without TensorFlow.

A `.data` file holds the values of all tensors. The `.index` file says where: it is a table of sorted keys (LevelDB's
format, uncompressed), whose values are `BundleEntryProto` messages of protocol buffers. Only what such files of one
shard contain is understood.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57
_DTYPES = {1: "<f4", 3: "<i4", 9: "<i8", 19: "<f2"}  # by number in types.proto


def read_tensors(index: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor; the values are mapped from the data file, not read.

    Raises:
        ValueError: the files are not such a checkpoint, or are corrupted.
        OSError: a file is missing or cannot be read.
    """
    table, data = index.read_bytes(), index.with_suffix(".data-00000-of-00001")
    if len(table) < _FOOTER or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError("it is not a table of TensorFlow")
    try:
        _, position = _block_handle(table, len(table) - _FOOTER)
        (offset, size), _ = _block_handle(table, position)
        for _, handle in _entries(table[offset : offset + size]):
            (offset, size), _ = _block_handle(handle, 0)
            if table[offset + size]:
                raise ValueError("it is compressed")
            for name, entry in _entries(table[offset : offset + size]):
                if name:  # the first entry describes the file
                    yield name.decode(), _tensor(data, entry)
    except (LookupError, TypeError, OverflowError) as error:
        raise ValueError("its index is corrupted") from error


def _tensor(data: Path, entry: bytes) -> Tensor:
    values = {number: value for number, value in _fields(entry) if isinstance(value, int)}
    dims = [dict(_fields(dim)) for shape in _messages(entry, 2) for dim in _messages(shape, 2)]
    shape = tuple(int(dim.get(1, 0)) for dim in dims)
    dtype = np.dtype(_DTYPES.get(values.get(1, 0), "V1"))
    if dtype.kind == "V" or values.get(3, 0) or values.get(5, 0) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("an entry is of another kind")
    return torch.from_numpy(np.memmap(data, dtype, mode="c", offset=values.get(4, 0), shape=shape or (1,)))


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a block; a key only stores how it differs from the one before."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    position, key = 0, b""
    while position < end:
        shared, position = _varint(block, position)
        added, position = _varint(block, position)
        size, position = _varint(block, position)
        key = key[:shared] + block[position : position + added]
        position += added
        yield key, block[position : position + size]
        position += size


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of the fields of a protocol-buffer message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield tag >> 3, value
            continue
        size, position = _varint(message, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
        yield tag >> 3, message[position : position + size]
        position += size


def _messages(message: bytes, number: int) -> list[bytes]:
    """Return the messages in a field of a message."""
    return [value for found, value in _fields(message) if found == number and isinstance(value, bytes)]


def _block_handle(content: bytes, position: int) -> tuple[tuple[int, int], int]:
    offset, position = _varint(content, position)
    size, position = _varint(content, position)
    return (offset, size), position


def _varint(content: bytes, position: int) -> tuple[int, int]:
    """Return the integer at a position, seven bits per byte, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
