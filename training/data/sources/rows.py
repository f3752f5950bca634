"""The text of each row of JSON, CSV, Parquet and Arrow files. A row is held in memory, and so is a row group."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.cli_errors import InputError, did_you_mean
from training.data.sources.base import Piece
from training.data.sources.formats import Format, Member, opened
from training.data.sources.json_items import json_items
from training.data.sources.text_files import INVALID, find_encoding

if TYPE_CHECKING:
    import pyarrow

_ROWS_PER_BATCH = 1000
_MAX_FIELD_CHARACTERS = 2**31 - 1
_MAX_FIRST_LINE_CHARACTERS = 1 << 24
_MAX_SHOWN_CHARACTERS = 200
_DELIMITERS = (";", "\t", "|")  # also in .csv, such as spreadsheets write where the comma is in numbers


class _Row(NamedTuple):
    """A row, how many precede it, and where it begins in an uncompressed file of lines."""

    value: Any
    number: int
    offset: int = 0
    unit: str = "row"


def read_rows(
    stream: Any,
    format: Format,
    file: Path | Member,
    text_field: str,
    encoding: str | None,
    position: Sequence[int] = (),
) -> Iterator[Piece]:
    """Yield the text of the rows of an opened file, from the first or from a position: [offset, number].

    Raises:
        InputError: the file has another content than its ending says, or a row has no text in `text_field`.
    """
    offset, number = position or (0, 0)
    codec, mark_bytes = find_encoding(stream, encoding)
    is_lines = format.kind == "json lines" or (format.kind == "json" and _holds_lines(file, format, codec, text_field))
    stream.read(mark_bytes)
    rows: Iterator[_Row]
    # A line ends with \n alone; the csv module needs line breaks as they are.
    with io.TextIOWrapper(stream, codec, INVALID, newline="\n" if is_lines else "") as text:
        if format.kind in ("Parquet", "Arrow"):
            rows = _table_rows(stream, format, file, text_field, number or offset)  # once, the row was the offset
        elif is_lines and format.compression is None and "\n".encode(codec) == b"\n":
            stream.seek(max(offset, mark_bytes))
            rows = _json_rows(_lines_at(stream, codec, max(offset, mark_bytes)), file, number)
        elif is_lines:
            rows = _json_rows(((0, line) for line in itertools.islice(text, number, None)), file, number)
        elif format.kind == "csv":
            rows = _csv_rows(text, file, text_field, number)
        else:
            rows = (_Row(row, before) for before, row in enumerate(json_items(text, file)) if before >= number)
        for row in rows:
            where = f"{file} {row.unit} {row.number + 1:,}"
            yield Piece(text_of(row.value, text_field, where), [row.offset, row.number])


def text_of(row: Any, text_field: str, where: str) -> str:
    """Return the text of the row found at `where`; null is an empty document, anything else an `InputError`.

    `text_field` may name a field of a field: `data.text`.
    """
    value = row
    for field in [text_field] if isinstance(row, dict) and text_field in row else text_field.split("."):
        if not isinstance(row, dict):
            raise InputError(f'{where} is not a JSON object but {type(row).__name__}; write rows as {{"text": …}}')
        if not isinstance(value, dict) or field not in value:
            raise missing_field(text_field, row, where)
        value = value[field]
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"field '{text_field}' of {where} holds {type(value).__name__}, not text; name the text with --text_field"
            + (", or join the items of the lists first" if isinstance(value, list) else "")
        )
    return value or ""


class MissingFieldError(InputError):
    """A row or a table has no field of the name of the text field."""


def missing_field(text_field: str, fields: Iterable[str], where: str) -> MissingFieldError:
    """Return the error for a row without the field; it lists the fields that exist."""
    fields = list(fields)
    found = ", ".join(fields) or "no fields"
    if len(found) > _MAX_SHOWN_CHARACTERS:  # such as a document, in CSV without a header
        found = f"{found[:_MAX_SHOWN_CHARACTERS]}…"
    hint = did_you_mean(text_field, fields)
    return MissingFieldError(
        f"no field '{text_field}' in {where}, only {found}; name the field with --text_field{hint}"
    )


def column_values(column: "pyarrow.Array") -> Iterator[Any]:
    """Yield the value of each row; Parquet writers do not always validate text."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        yield from column.to_pylist()
        return
    for value in column.cast(pyarrow.large_binary()).to_pylist():
        yield None if value is None else value.decode("utf-8", INVALID)


def _lines_at(stream: io.BufferedReader, codec: str, offset: int) -> Iterator[tuple[int, str]]:
    for line in stream:
        yield offset, line.decode(codec, INVALID)
        offset += len(line)


def _json_rows(lines: Iterable[tuple[int, str]], file: Path | Member, number: int) -> Iterator[_Row]:
    for before, (offset, line) in enumerate(lines, start=number):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise InputError(f"{file} line {before + 1:,} is not valid JSON ({error})") from None
        yield _Row(row, before, offset, "line")


def _holds_lines(file: Path | Member, format: Format, codec: str, text_field: str) -> bool:
    """Return whether a .json file holds JSON lines: its first line is an object, with text or with lines after it."""
    with opened(file, format) as stream, io.TextIOWrapper(stream, codec, "replace", newline="\n") as text:
        first = text.readline(_MAX_FIRST_LINE_CHARACTERS).removeprefix("\ufeff")
        rest = text.readline(_MAX_FIRST_LINE_CHARACTERS)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (bool(rest.strip()) or text_field.split(".")[0] in row)


def _csv_rows(text: io.TextIOBase, file: Path | Member, text_field: str, number: int) -> Iterator[_Row]:
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    first = text.readline()
    usual = "\t" if ".tsv" in file.name.lower() else ","
    fitting = (mark for mark in (usual, *_DELIMITERS) if text_field in next(csv.reader([first], delimiter=mark), []))
    rows = csv.reader(itertools.chain([first], text), delimiter=next(fitting, usual), strict=True)
    try:
        header = next(rows, [])
        if text_field not in header:
            raise missing_field(text_field, header, str(file))
        column = header.index(text_field)
        for before, row in enumerate(filter(None, rows)):
            if before < number:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{file} line {rows.line_num:,} has {len(row)} fields, its header {len(header)}; quote the fields "
                    "that hold the delimiter"
                )
            yield _Row({text_field: row[column]}, before)
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num:,} is not valid CSV ({error})") from None


def _table_rows(stream: Any, format: Format, file: Path | Member, text_field: str, first: int) -> Iterator[_Row]:
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet

    row = 0
    batches: Any
    if format.kind == "Parquet":
        parquet = pyarrow.parquet.ParquetFile(stream)
        schema, groups = parquet.schema_arrow, list(range(parquet.num_row_groups))
        while groups and row + parquet.metadata.row_group(groups[0]).num_rows <= first:
            row += parquet.metadata.row_group(groups.pop(0)).num_rows
        batches = parquet.iter_batches(batch_size=_ROWS_PER_BATCH, row_groups=groups, columns=[text_field])
    elif stream.peek(6)[:6] == b"ARROW1":  # otherwise the streaming format, which `datasets` writes
        reader = pyarrow.ipc.open_file(stream)
        schema, batches = reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    else:
        batches = pyarrow.ipc.open_stream(stream)
        schema = batches.schema
    name, *inner = [text_field] if text_field in schema.names else text_field.split(".")
    kind = schema
    for field in (name, *inner):
        if not isinstance(kind, pyarrow.Schema | pyarrow.StructType) or field not in kind.names:
            raise missing_field(text_field, schema.names, str(file))
        kind = kind.field(field).type
    for batch in batches:
        column = batch.column(name)
        for value in column_values(pyarrow.compute.struct_field(column, inner) if inner else column):
            if row >= first:
                yield _Row({text_field: value}, row)
            row += 1
