"""Local files of text: which files a folder holds, and their rows, by format, compression and encoding."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wanda_fast.data.documents import Text, find_column, reason
from wanda_fast.errors import CalibrationError, MissingDependencyError

# The first that a file begins with; UTF-32 before UTF-16, whose mark is the beginning of the other's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Formats with columns and a compression of their own.
COLUMNAR = (".parquet", ".arrow")
ARROW_FILE = b"ARROW1"
UNREADABLE = (OSError, ValueError, EOFError, zlib.error)


def read_files(path: Path, text_column: str | None, tokenizer: object) -> Text:
    """The documents of a file, or of all files of a folder, in the order of their names.

    Args:
        text_column: of files with columns; None: the first of TEXT_COLUMNS.
        tokenizer: renders chats by its template.
    Raises: `CalibrationError` if a file cannot be read, or holds no text.
    """
    text = Text(str(path), [])
    for file in _files_of(path, text) if path.is_dir() else [path]:
        _read_file(file, text, text_column, tokenizer)
    return text


def _files_of(folder: Path, text: Text) -> list[Path]:
    """The files of text in a folder. `.json` files beside others describe those (dataset_info.json)."""
    if (splits := folder / "dataset_dict.json").is_file():
        raise CalibrationError(
            f"dataset folder {folder} holds several splits ({splits.name}): name the folder of one"
        )
    found = sorted(
        file
        for file in folder.rglob("*")
        if _kind(file) in READERS and not _is_hidden(file.relative_to(folder)) and not file.is_dir()
    )
    if not found:
        raise CalibrationError(f"dataset folder {folder} holds no {', '.join(READERS)} file")
    others = [file for file in found if _kind(file) != ".json"]
    if others and len(others) < len(found):
        text.notes.append(
            f"{folder}: .json files not read, because it holds other files of text: "
            f"{len(found) - len(others)}"
        )
    return others or found


def _is_hidden(file: Path) -> bool:
    """Also `cache-*.arrow`, in which `Dataset.map` keeps its results beside the data."""
    return any(part.startswith(".") for part in file.parts) or file.match("cache-*.arrow")


def _read_file(file: Path, text: Text, text_column: str | None, tokenizer: object) -> None:
    kind = _kind(file)
    if kind not in READERS:
        raise CalibrationError(f"dataset file {file} is not of a known kind: {', '.join(READERS)}")
    try:
        text.add_rows(READERS[kind](file, text_column), str(file), text_column, tokenizer)
    # Not readable, of another encoding or format, or without a column of text.
    except UNREADABLE as error:
        raise CalibrationError(f"dataset file {file} cannot be read: {reason(error)}") from error


def _kind(file: Path) -> str:
    """The suffix that names the format, in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in OPENERS and suffixes[-2] not in COLUMNAR:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


@contextmanager
def _lines(file: Path) -> Iterator[io.TextIOBase]:
    """A file of text, decompressed, in the encoding that its byte order mark names, or else UTF-8."""
    with OPENERS.get(file.suffix.lower(), _open_plain)(file) as stream:
        head = stream.peek(4)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8")
        yield io.TextIOWrapper(stream, encoding=encoding)


def _open_plain(file: Path) -> io.BufferedReader:
    return file.open("rb")


def _open_zst(file: Path) -> io.BufferedReader:
    return io.BufferedReader(_pyarrow(file).input_stream(str(file), compression="zstd"))


def _pyarrow(file: Path) -> object:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"dataset file {file} needs pyarrow, which is not installed: pip install pyarrow"
        ) from error
    return pyarrow


def _read_plain(file: Path, _text_column: str | None) -> list[str]:
    with _lines(file) as lines:
        return [lines.read()]


def _read_jsonl(file: Path, _text_column: str | None) -> list[object]:
    with _lines(file) as lines:
        return _json_lines(lines)


def _read_json(file: Path, _text_column: str | None) -> list[object]:
    """An array of rows, one row, or JSON Lines, which C4's files are."""
    with _lines(file) as lines:
        content = lines.read()
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        return _json_lines(io.StringIO(content))
    return whole if isinstance(whole, list) else [whole]


def _json_lines(lines: Iterable[str]) -> list[object]:
    return [_json_line(line, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _json_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error


def _read_parquet(file: Path, text_column: str | None) -> list[object]:
    parquet = _pyarrow(file).parquet
    column = find_column(parquet.read_schema(file).names, text_column)
    return parquet.read_table(file, columns=[column]).to_pylist()


def _read_arrow(file: Path, text_column: str | None) -> list[object]:
    """Arrow's stream, which `Dataset.save_to_disk` writes, or its file format."""
    arrow = _pyarrow(file)
    with arrow.OSFile(str(file)) as opened:
        is_file = opened.read(len(ARROW_FILE)) == ARROW_FILE
        opened.seek(0)
        table = (arrow.ipc.open_file if is_file else arrow.ipc.open_stream)(opened).read_all()
    return table.select([find_column(table.column_names, text_column)]).to_pylist()


OPENERS: dict[str, Callable] = {".gz": gzip.open, ".zst": _open_zst}
READERS: dict[str, Callable] = {
    ".txt": _read_plain,
    ".raw": _read_plain,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
