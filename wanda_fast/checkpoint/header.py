"""Headers of safetensors files."""

import json
import math
import operator
from pathlib import Path

import torch

from wanda_fast.errors import CheckpointError

# Names of dtypes in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def whole_header(file: Path) -> dict[str, dict]:
    """The header of a file. Raises: `CheckpointError` if the file has fewer bytes than its header says."""
    begin, header = header_of(file)
    require_sizes(header, str(file))
    needed = begin + max((about["data_offsets"][1] for about in header.values()), default=0)
    if (size := file.stat().st_size) < needed:
        raise CheckpointError(f"{file} is truncated: it has {size} bytes, its header names {needed}")
    return header


def require_sizes(header: dict[str, dict], where: str) -> None:
    """Raise `CheckpointError` unless each tensor has as many bytes as its dtype and shape need."""
    try:
        for name, about in header.items():
            begin, end = map(operator.index, about["data_offsets"])
            if about["dtype"] in DTYPES and end - begin != bytes_needed(about):
                raise CheckpointError(
                    f"{where} is broken: {name} has {end - begin} bytes, {about['dtype']} {about['shape']} "
                    f"needs {bytes_needed(about)}"
                )
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is not a safetensors file: its header names no offsets") from error


def header_of(file: Path) -> tuple[int, dict[str, dict]]:
    """(offset of the data in the file, tensor name -> {dtype, shape, data_offsets})."""
    text, header = read_header(file)
    header.pop("__metadata__", None)
    return 8 + len(text), header


def read_header(file: Path) -> tuple[bytes, dict[str, dict]]:
    """The text of the header, and what it says, with the metadata."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing, though the checkpoint's index names it")
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise CheckpointError(
                f"{file} is not a safetensors file: its header would be {length} bytes long"
            )
        text = opened.read(length)
    return text, parse_header(text, str(file))


def parse_header(text: bytes, where: str) -> dict[str, dict]:
    """What a header says, with the metadata. Raises: `CheckpointError` that names `where` it was found."""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where} is not a safetensors file: its header is not a JSON object")
    return header


def bytes_needed(about: dict) -> int:
    return math.prod(about["shape"]) * DTYPES[about["dtype"]].itemsize
