"""The text of each row of JSON, CSV, Parquet and Arrow files. A row is held in memory, and so is a row group."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.cli_errors import InputError, did_you_mean
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


class Row(NamedTuple):
    """The text of a row, where the row begins in an uncompressed file of lines, and how many precede it."""

    text: str
    offset: int
    number: int


def read_rows(
    stream: Any,
    format: Format,
    file: Path | Member,
    text_field: str,
    encoding: str | None,
    *,
    offset: int = 0,
    number: int = 0,
) -> Iterator[Row]:
    """Yield the rows of an opened file, from a row's `offset` and `number` on.

    Raises:
        InputError: the file has another content than its ending says, or a row has no text in `text_field`.
    """
    if format.kind in ("Parquet", "Arrow"):
        # Earlier versions kept the row as the offset.
        yield from _table_rows(stream, format, file, text_field, number or offset)
        return
    codec, mark_bytes = find_encoding(stream, encoding)
    is_lines = format.kind == "json lines" or (format.kind == "json" and _holds_lines(file, format, codec, text_field))
    if is_lines and format.compression is None and "\n".encode(codec) == b"\n":
        stream.seek(max(offset, mark_bytes))
        yield from _json_rows(_lines_at(stream, codec, max(offset, mark_bytes)), file, text_field, number)
        return
    stream.read(mark_bytes)
    # A line ends with \n alone, as above; the csv module needs line breaks as they are.
    with io.TextIOWrapper(stream, codec, INVALID, newline="\n" if is_lines else "") as text:
        if is_lines:
            lines = ((0, line) for before, line in enumerate(text) if before >= number)
            yield from _json_rows(lines, file, text_field, number)
        elif format.kind == "csv":
            yield from _csv_rows(text, file, text_field, number)
        else:
            for before, row in enumerate(json_items(text, file)):
                if before >= number:
                    yield Row(text_of(row, text_field, f"{file} row {before + 1:,}"), 0, before)


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


def _json_rows(lines: Iterable[tuple[int, str]], file: Path | Member, text_field: str, number: int) -> Iterator[Row]:
    for before, (offset, line) in enumerate(lines, start=number):
        if line.isspace():
            continue
        where = f"{file} line {before + 1:,}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
            raise InputError(f"{where} is not valid JSON ({error})") from None
        yield Row(text_of(row, text_field, where), offset, before)


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


def _csv_rows(text: io.TextIOBase, file: Path | Member, text_field: str, number: int) -> Iterator[Row]:
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
            yield Row(row[column], 0, before)
    except csv.Error as error:
        raise InputError(f"{file} line {rows.line_num:,} is not valid CSV ({error})") from None


def _table_rows(stream: Any, format: Format, file: Path | Member, text_field: str, first: int) -> Iterator[Row]:
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
                text = text_of({text_field: value}, text_field, f"{file} row {row + 1:,}")
                yield Row(text, 0, row)
            row += 1
