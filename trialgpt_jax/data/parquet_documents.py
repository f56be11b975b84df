"""Parquet -> documents, a row each, in batches of at most 256 rows and about 64 MiB."""

import codecs
import contextlib
from collections.abc import Iterator

from trialgpt_jax import UserError
from trialgpt_jax.data.records import Context, Document, document, failed, too_large, unusable

_BATCH_ROWS, _BATCH_BYTES = 256, 64 << 20


def parquet_documents(context: Context, start: int = 0) -> Iterator[Document]:
    """The rows of the file `context.raw` from number `start` on.

    Raises UserError if the file has no column `text_field`, or several, or one of another type than text.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # With `buffer_size` a column chunk is read a page at a time
        table = pyarrow.parquet.ParquetFile(context.raw, buffer_size=1 << 20)
        columns = _columns(context, table)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if number + rows <= start:
                number += rows
                continue
            n_bytes = _bytes_of(table.metadata.row_group(group), columns)
            if n_bytes > 2 * rows * context.limit + (1 << 20):  # before anything is decoded; headers repeat values
                for row in range(number, number + rows):
                    yield too_large(context, row, f"{context.name}, row {row}")
                number += rows
                continue
            batch_rows = min(_BATCH_ROWS, max(1, rows * _BATCH_BYTES // max(n_bytes, 1)))
            for batch in table.iter_batches(batch_rows, [group], columns):
                for text, source in zip(_texts(batch, columns[0], context.limit), _sources(batch), strict=True):
                    where = f"{context.name}, row {number}"
                    if isinstance(text, bytes):
                        text = text.removeprefix(codecs.BOM_UTF8)
                    if text is _TOO_LARGE:
                        yield too_large(context, number, where, source)
                    else:
                        yield document(context, number, text, where, source)
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None):
            yield failed(context, number, error, f", row {number}")
        else:
            why = f"{context.name}: damaged parquet, row {number} ({' '.join(str(error).split())[:200]})"
            yield unusable(context, number, "damaged file", why)


def count_rows(name: str, path: str) -> int:
    """The number of rows of a local parquet file, from its footer; UserError if the file is not parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its rows cannot be counted, because the file is damaged ({why})") from None


def _columns(context: Context, table) -> list[str]:
    """The columns to read, that of the text first; UserError if there is none or it is not text."""
    import pyarrow

    field, schema = context.options["text_field"], table.schema_arrow
    option = "(data.source_options.text_field)"
    if (same := schema.names.count(field)) > 1:
        raise UserError(f"{context.name} has {same} columns `{field}` {option}; rename all but one")
    if same:
        found = schema.field(field).type
    else:
        found = _nested(schema, field.split("."))
        if found is None:
            inner = [f"{f.name}.{i.name}" for f in schema if pyarrow.types.is_struct(f.type) for i in f.type]
            names = ", ".join([*schema.names, *inner][:40])
            raise UserError(f"{context.name} has no column `{field}` {option}, but {names}")
    if pyarrow.types.is_dictionary(found):
        found = found.value_type
    if not (_is_text(found) or pyarrow.types.is_null(found)):
        hint = f"; its fields are named as {field}.{found[0].name}" if pyarrow.types.is_struct(found) else ""
        raise UserError(f"{context.name}: the column `{field}` {option} is {str(found)[:100]}, not text{hint}")
    has_source = schema.names.count("source") == 1 and field.split(".")[0] != "source"
    return [field] + ["source"] * has_source


def _nested(schema, names: list[str]):
    """The type of a field in structs; None if there is none."""
    import pyarrow

    if schema.names.count(names[0]) != 1:
        return None
    found = schema.field(names[0]).type
    for name in names[1:]:
        if not pyarrow.types.is_struct(found) or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def _is_text(kind) -> bool:
    import pyarrow

    types = pyarrow.types
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(check(kind) for check in (*checks, types.is_binary_view, types.is_fixed_size_binary))


_TOO_LARGE = object()


def _texts(batch, field: str, limit: int) -> list:
    """The values of the text column: strings, or bytes where they are not UTF-8; None; `_TOO_LARGE`."""
    names = [field] if field in batch.schema.names else field.split(".")
    column = batch.column(names[0])
    for name in names[1:]:
        index = column.type.get_field_index(name)
        column = column.flatten()[index]  # with the nulls of the struct
    return _values(column, limit)


def _values(column, limit: int) -> list:
    import pyarrow
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        values = _values(column.dictionary, limit)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    if pyarrow.types.is_null(column.type):
        return [None] * len(column)
    if pyarrow.types.is_string_view(column.type) or pyarrow.types.is_binary_view(column.type):
        column = column.cast(pyarrow.large_binary())  # other functions know no views
    lengths = pyarrow.compute.binary_length(column)
    if (pyarrow.compute.max(lengths).as_py() or 0) <= limit:
        with contextlib.suppress(UnicodeDecodeError):
            return column.to_pylist()
    data = column.cast(pyarrow.large_binary())
    return [
        None if length is None else data[i].as_py() if length <= limit else _TOO_LARGE
        for i, length in enumerate(lengths.to_pylist())
    ]


def _sources(batch) -> list:
    """The values of the column `source` as Python objects; its types of times and numbers as text."""
    import pyarrow

    if "source" not in batch.schema.names[1:]:
        return [""] * len(batch)
    column = batch.column(batch.schema.names.index("source"))
    if pyarrow.types.is_temporal(column.type) or pyarrow.types.is_decimal(column.type):
        try:
            column = column.cast(pyarrow.string())  # Python's own types have other ranges
        except pyarrow.ArrowInvalid:  # an unknown time zone
            return [str(column.type) if valid else None for valid in column.is_valid().to_pylist()]
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):  # not UTF-8; times within a list
        return [_source(value) for value in column]


def _source(value) -> object:
    try:
        return value.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError):
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else str(value.type)


def _bytes_of(group, columns: list[str]) -> int:
    """Bytes of the columns in a row group, decompressed."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    names = tuple(f"{name}." for name in columns)
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(names))
