"""Records from files that are tables: CSV, TSV, Parquet, and a folder that `datasets` has saved.

A row is a record with the columns as its keys. What a table has no value for in some row is left
out of that record, as it would be in JSON.

    >>> read_table(Path("questions.csv"))[0]
    {'instruction': 'Spell it right.', 'input': 'freind', 'output': 'friend'}

Parquet and arrow need pyarrow, the extra `parquet`. This module does not import torch.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_sft.common import files
from lightning_sft.common.errors import InputError
from lightning_sft.data.compressed import content_suffix, read_text

# Fields of conversations are long; the csv module would stop at 131,072 characters.
MOST_FIELD = 2**30
SEPARATORS = {".csv": ",", ".tsv": "\t"}
FOLDER_STATE = "state.json"  # what `save_to_disk` writes beside its arrow files


def is_table(path: Path) -> bool:
    """Whether a path names a table: by its ending, or as a folder of `save_to_disk`."""
    return content_suffix(path) in (*SEPARATORS, ".parquet", ".arrow") or is_saved_folder(path)


def is_saved_folder(path: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` leaves."""
    return (path / FOLDER_STATE).is_file() or (path / "dataset_dict.json").is_file()


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a table as records.

    Raises:
        InputError: Damaged, empty, ragged (names the line), or pyarrow is missing.
    """
    suffix = content_suffix(path)
    if suffix in SEPARATORS:
        return read_separated(path, SEPARATORS[suffix])
    if suffix == ".parquet":
        return _records(_read_parquet(path))
    if path.is_dir():
        tables = map(read_table, _files_of(path))
        return [record for table in tables for record in table]
    return _records(_read_arrow(path))


def read_separated(path: Path, separator: str) -> list[dict[str, Any]]:
    """The records of a CSV or TSV file in UTF-8, its first row the names of the columns.

    A byte-order mark and either kind of line end are fine, as are line ends within quotes.

    Raises:
        InputError: A row with more or fewer fields than there are columns, a column twice or
            without a name, a quote that is never closed; names the line.
    """
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a row of names and a record")
    (_, names), *rows = _rows(path, text, separator)
    _check_names(path, names)
    records = []
    for line, row in rows:
        if len(row) != len(names):
            raise InputError(
                f"{path}: line {line}: {len(row)} fields where the header has {len(names)}; quote "
                "fields that hold the separator or line ends"
            )
        records.append(dict(zip(names, row, strict=True)))
    if not records:
        raise InputError(f"{path}: there is no row behind the header")
    return records


def _rows(path: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    """Each row with the line it begins in; blank lines are left out."""
    # Line ends within quotes are the text's own, so the csv module has to see them as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    before = csv.field_size_limit(MOST_FIELD)  # of the whole process, in which others read too
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: not valid as a table ({error})") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _check_names(path: Path, names: list[str]) -> None:
    for place, name in enumerate(names):
        if not name.strip():
            raise InputError(f"{path}: line 1: column {place + 1} has no name")
        if name in names[:place]:
            raise InputError(
                f"{path}: line 1: the column {name!r} is there twice; keep one of them"
            )


def _pyarrow(module: str, path: Path) -> Any:
    """A module of pyarrow, which is an extra and takes half a second to import."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{path}: reading it needs pyarrow: {files.install_command('parquet')}"
        ) from None


def _read_parquet(path: Path) -> Any:
    parquet = _pyarrow("pyarrow.parquet", path)
    return _whole(path, lambda file: parquet.read_table(file))


def _read_arrow(path: Path) -> Any:
    ipc = _pyarrow("pyarrow.ipc", path)

    def read(file: Any) -> Any:
        try:
            return ipc.open_stream(file).read_all()  # as datasets writes
        except Exception:
            file.seek(0)
            return ipc.open_file(file).read_all()

    return _whole(path, read)


def _whole(path: Path, read: Callable[[Any], Any]) -> Any:
    """What a reader of pyarrow's makes of a regular file, or one line that says why not."""
    try:
        with files.open_regular(path) as file:
            return read(file)
    except InputError:
        raise
    except Exception as error:  # pyarrow raises its own and Python's, according to the damage
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({reason})") from None


def _files_of(folder: Path) -> list[Path]:
    """The files of a saved data set, in order.

    Raises:
        InputError: It has several splits, of which one has to be named, or is damaged.
    """
    if not (folder / FOLDER_STATE).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{FOLDER_STATE}"))
        raise InputError(
            f"{folder}: holds the splits {', '.join(splits)}; give the folder of one, and the "
            "others as data.val_path and data.test_path"
        )
    state = files.read_json(folder / FOLDER_STATE, files.MOST_SMALL)
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError):
        raise InputError(f"{folder / FOLDER_STATE}: does not name the data files") from None
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{folder / FOLDER_STATE}: {name!r} is not a file's name")
        if not (folder / name).is_file():
            raise InputError(f"{folder}: the file {name} is missing")
    if not names:
        raise InputError(f"{folder}: the data set is empty; it must hold at least one record")
    return [folder / name for name in names]


def _records(table: Any) -> list[dict[str, Any]]:
    """Records without what has no value, at the top; NaN is pandas' way of saying so."""
    return [
        {key: value for key, value in row.items() if value is not None and value == value}
        for row in table.to_pylist()
    ]
