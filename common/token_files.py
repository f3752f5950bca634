"""Files of token ids: `.npy` arrays as build-nanogpt writes them, and llm.c's and modded-nanogpt's `.bin` files."""

import os
import re
import struct
import tokenize
import warnings
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple, cast

from common.cli_errors import InputError, one_line, os_error_message

if TYPE_CHECKING:
    import numpy as np

Split = Literal["val", "train"]

_SHARD_NAME = re.compile(r"(?:^|.*[_-])(?P<split>val|train)(?:[_-]\d+)?\.(?:npy|bin)")
_BIN_HEADER_BYTES = 1024
_BIN_MAGIC = 20240520
_BIN_VERSION = 1
# numpy evaluates the header of a .npy file as Python: these are the ways in which that fails.
_NPY_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, SyntaxError, tokenize.TokenError),
    *(RecursionError, MemoryError, OverflowError),
)


class Header(NamedTuple):
    """What precedes the ids in a file; `offset` is its length in bytes."""

    dtype: "np.dtype"
    tokens: int
    offset: int


def split_of(name: str) -> Split | None:
    """Return the split that a shard's file name states; None for other files."""
    match = _SHARD_NAME.fullmatch(PurePosixPath(name).name)
    return cast(Split, match["split"]) if match else None


def map_ids(path: Path) -> "np.ndarray":
    """Return the file's ids, (tokens,), read-only and memory-mapped; errors as of `read_header`."""
    import numpy as np

    dtype, tokens, offset = read_header(path)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(tokens,))


def read_header(path: Path) -> Header:
    """Return the file's header after comparing it with the size of the file.

    Raises:
        InputError: the file cannot be read, has another format, or is truncated.
    """
    try:
        with path.open("rb") as stream:
            header = (_bin_header if path.suffix == ".bin" else _npy_header)(stream, path)
            size = os.fstat(stream.fileno()).st_size
    except FileNotFoundError as error:
        raise unusable_file(path, f"it cannot be read ({error.strerror})") from None
    except OSError as error:  # such as its permissions, which are no reason to delete it
        raise InputError(os_error_message(error) or f"cannot read {path} ({error})") from None
    if size != header.offset + header.tokens * header.dtype.itemsize:
        found = (size - header.offset) // header.dtype.itemsize
        raise unusable_file(path, f"its header says {header.tokens:,} tokens, its size {found:,}")
    if not header.tokens:
        raise unusable_file(path, "it holds no tokens")
    return header


def unusable_file(path: Path, reason: str) -> InputError:
    """Return the error for a file of token ids that is missing, corrupted or of another format."""
    return InputError(
        f"{path} is not a valid shard: {reason}; "
        "delete the folder and run python -m training.prepare again, or download the file again"
    )


def _npy_header(stream: BinaryIO, path: Path) -> Header:
    import numpy as np

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header of Python 2
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    except _NPY_ERRORS as error:
        raise unusable_file(path, f"it is not a .npy file ({one_line(error, 120)})") from None
    if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise unusable_file(
            path, f"expected a one-dimensional array of uint16 or uint32, found shape {shape} of {dtype}"
        )
    return Header(dtype, shape[0], stream.tell())


def _bin_header(stream: BinaryIO, path: Path) -> Header:
    """Read llm.c's header of 256 int32 (karpathy/llm.c, dev/data/data_common.py)."""
    import numpy as np

    content = stream.read(_BIN_HEADER_BYTES)
    magic, version, tokens = struct.unpack("<3i", content[:12]) if len(content) == _BIN_HEADER_BYTES else (0, 0, 0)
    if magic != _BIN_MAGIC or version != _BIN_VERSION or tokens < 0:
        raise unusable_file(
            path,
            f"expected llm.c's GPT-2 format (magic {_BIN_MAGIC}, version {_BIN_VERSION}), "
            f"found magic {magic}, version {version}",
        )
    return Header(np.dtype("<u2"), tokens, _BIN_HEADER_BYTES)
