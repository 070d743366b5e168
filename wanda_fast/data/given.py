"""Data handed over from Python: strings, token ids, arrays, datasets, batches, or an iterable of these."""

from collections.abc import Iterable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from wanda_fast.data.documents import Text, find_column, is_chat, reason
from wanda_fast.errors import CalibrationError

INPUT_IDS = "input_ids"


def require_ids(ids: Tensor, form: str) -> Tensor:
    """`ids` as int64. Raise `CalibrationError` unless they are integers, and some."""
    if ids.is_floating_point() or ids.is_complex() or not ids.numel():
        raise CalibrationError(f"token ids must be integers {form}, got {ids.dtype} {list(ids.shape)}")
    return ids.long()


def ids_or_rows(data: object, text_column: str | None = None) -> Tensor | list:
    """Token ids, or rows for `Text.add_rows`.

    Args:
        data: a tensor or array of token ids; a list of strings, chats or lists of ids; a mapping or
            `datasets.Dataset` with a column `input_ids` or of text; or an iterable of these, which is read to
            its end.
        text_column: the column; None: `input_ids`, or the first of TEXT_COLUMNS.
    Raises: `CalibrationError` if it is something else, or holds both.
    """
    if isinstance(data, Tensor):
        return data
    if hasattr(data, "__array__"):
        return _of_array(data)
    names = getattr(data, "column_names", None)
    if isinstance(names, dict):
        raise CalibrationError(f"dataset holds the splits {', '.join(map(str, names))}: pass one of them")
    if isinstance(data, Mapping) or (names and hasattr(data, "__getitem__")):
        return _of_table(data, names or list(data), text_column)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return _of_items(list(data), text_column)
    raise CalibrationError(
        f"dataset is of type {type(data).__name__}: pass a name, a path, strings or token ids"
    )


def given_text(rows: list, text_column: str | None, tokenizer: object) -> Text:
    """The documents of rows from `ids_or_rows`. Raise `CalibrationError` if they hold no text."""
    text = Text("from Python", [])
    try:
        text.add_rows(rows, "dataset", text_column, tokenizer)
    except ValueError as error:
        raise CalibrationError(f"the dataset cannot be read: {reason(error)}") from error
    return text


def _of_array(data: object) -> Tensor | list:
    import numpy

    array = numpy.asarray(data)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(numpy.int64))
    return torch.from_numpy(array.copy()) if array.dtype.kind == "f" else _of_items(array.tolist(), None)


def _of_table(data: object, names: list[str], text_column: str | None) -> Tensor | list:
    """A column of token ids or of text. A mapping may be one row: its value is then one text or chat."""
    if INPUT_IDS in names and text_column in (None, INPUT_IDS):
        _require_no_padding(data["attention_mask"] if "attention_mask" in names else ())
        return ids_or_rows(data[INPUT_IDS])
    try:
        value = data[find_column(names, text_column)]
    except ValueError as error:
        raise CalibrationError(f"the dataset cannot be read: {error}") from error
    is_row = isinstance(value, (str, Mapping)) or is_chat(value) or not isinstance(value, Iterable)
    return [value] if is_row else list(value)


def _require_no_padding(mask: Iterable) -> None:
    padding = sum(int((torch.as_tensor(row) == 0).sum()) for row in mask)
    if padding:
        raise CalibrationError(
            f"the dataset holds {padding} padding tokens (its attention_mask is 0 there): pass rows of one "
            f"length without padding, or the text"
        )


def _of_items(items: list, text_column: str | None) -> Tensor | list:
    if items and all(isinstance(item, Integral) for item in items):
        return torch.tensor(items)
    ids, rows = [], []
    for item in items:
        is_row = item is None or isinstance(item, str) or is_chat(item)
        part = [item] if is_row else ids_or_rows(item, text_column)
        ids.append(part) if isinstance(part, Tensor) else rows.extend(part)
    if ids and rows:
        raise CalibrationError("the dataset mixes token ids and text: pass one kind")
    return _stacked(ids) if ids else rows


def _stacked(parts: list[Tensor]) -> Tensor:
    """Rows and batches of token ids, below each other."""
    lengths = sorted({part.shape[-1] if part.dim() else 0 for part in parts})
    if len(lengths) > 1 or not lengths[0]:
        raise CalibrationError(
            f"token ids must be rows of one length, got rows of {lengths[0]} to {lengths[-1]} tokens"
        )
    return torch.cat([part.reshape(-1, lengths[0]) for part in parts])
