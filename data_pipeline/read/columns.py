"""Find columns of tables by the names in a recipe. `data.text` is a column of that name, or field `text` of column
`data`.
"""

from __future__ import annotations

from typing import Any


def names_of(fields: Any, prefix: str = "") -> list[str]:
    """The names of the columns of an Arrow schema, and of the fields inside them."""
    found = []
    for field in fields:
        found.append(prefix + field.name)
        found += names_of(_inner(field.type), f"{prefix}{field.name}.")
    return found


def place_of(fields: Any, name: str) -> list[str] | None:
    """The column to which a name leads, and the fields inside it. None if there is no such column.

    As with keys in JSON, a column whose own name contains dots takes precedence over a field of another column.
    """
    types = {field.name: field.type for field in fields}
    if name in types:
        return [name]
    for end in (i for i, character in enumerate(name) if character == "."):
        if name[:end] in types and (rest := place_of(_inner(types[name[:end]]), name[end + 1 :])):
            return [name[:end], *rest]
    return None


def values(table: Any, name: str) -> Any:
    """The values of a column of an Arrow table or batch, or of a field in a column. Raises KeyError."""
    import pyarrow.compute

    place = place_of(table.schema, name)
    if place is None:
        raise KeyError(name)
    column = table.column(table.schema.get_field_index(place[0]))
    for inner in place[1:]:
        column = pyarrow.compute.struct_field(column, [_index(column.type, inner)])
    return column


def _index(struct: Any, name: str) -> int:
    """The number of a field. Names would not do, because pyarrow reads a name with dots as a path."""
    return next(i for i in range(struct.num_fields) if struct.field(i).name == name)


def _inner(kind: Any) -> list[Any]:
    from pyarrow.types import is_struct

    return [kind.field(i) for i in range(kind.num_fields)] if is_struct(kind) else []
