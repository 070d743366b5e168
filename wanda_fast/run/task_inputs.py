"""What tasks need, before the work: names and data, a model that predicts tokens, memory for all of it."""

import logging

import torch
from torch import nn

from wanda_fast.checkpoint.meta_model import open_meta_model
from wanda_fast.checkpoint.model_class import predicts_tokens
from wanda_fast.data.tasks import Tasks, open_tasks, task_names
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import (
    CalibrationError,
    LiveModelError,
    NotStreamableError,
    OptionError,
    OutOfMemoryError,
    RanksError,
)
from wanda_fast.memory import free_memory
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.options.all_options import Options
from wanda_fast.run.outputs import path_of

logger = logging.getLogger(__name__)

MIB = 2**20


def read_tasks(options: Options, ranks: Ranks) -> Tasks | None:
    """The tasks that are to be measured, with their data; None if there are none.

    Raises: `OptionError`; `RanksError`; others as `open_tasks`.
    """
    names = task_names(options.eval_zero_shot, options.tasks)
    if not names:
        for name in ("tasks_path", "tasks_limit"):
            if (value := getattr(options, name)) is not None:
                raise OptionError(f"{name} {value} has no effect without tasks: pass --tasks NAME,NAME")
        return None
    if ranks.size > 1:
        raise RanksError(
            f"tasks run in one process, not in {ranks.size} ranks: save the model, and evaluate it with "
            f"wanda-fast eval"
        )
    return open_tasks(names, path_of(options.tasks_path), options.tasks_limit)


def require_measurable(model: nn.Module, tokenizer) -> None:
    """Raise an error unless tasks can be measured on the model.

    Raises: `CalibrationError` if it predicts no tokens, or has no tokenizer; `LiveModelError`.
    """
    from transformers import PreTrainedModel

    if classifies_images(model) or not predicts_tokens(model):
        raise CalibrationError(f"{type(model).__name__} predicts no tokens: no task can be measured")
    if not isinstance(model, PreTrainedModel):
        raise LiveModelError(
            f"{type(model).__name__} is not a model class of transformers: tasks cannot be measured on it"
        )
    if tokenizer is None:
        raise CalibrationError("tasks are text, and there is no tokenizer: pass a tokenizer")


def require_room(
    path: str, dtype: str, cache_dir: str | None, kind: str, dequantize: bool, device: torch.device
) -> None:
    """Raise `OutOfMemoryError` if the checkpoint is larger than the free memory; say how large it is.

    Args:
        path, dtype, cache_dir, kind, dequantize: as `open_meta_model` takes them.
        device: where the model will run.
    Raises: `CalibrationError` if the model predicts no tokens.
    """
    try:
        opened = open_meta_model(path, dtype, cache_dir, kind, dequantize)
    except NotStreamableError:
        return
    if classifies_images(opened.model) or not predicts_tokens(opened.model):
        raise CalibrationError(f"{type(opened.model).__name__} predicts no tokens: no task can be measured")
    needed = sum(parameter.numel() * parameter.itemsize for parameter in opened.model.parameters())
    for place in {torch.device("cpu"), device}:
        free = free_memory(place)
        sizes = f"{needed / MIB:,.0f} MiB, and {free / MIB:,.0f} MiB are free on {place}"
        if needed > free:
            raise OutOfMemoryError(
                f"tasks need the whole model in memory: {path} takes {sizes}; save the pruned model, and "
                f"evaluate it on a larger machine"
            )
        logger.info("tasks need the whole model in memory: it takes %s", sizes)
