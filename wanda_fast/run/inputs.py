"""What a run reads: the model, the calibration tokens, the evaluation windows."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint import load as checkpoints
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel, open_meta_model
from wanda_fast.checkpoint.model_class import predicts_tokens
from wanda_fast.checkpoint.timm_file import load_timm
from wanda_fast.data.calibration import calibration_tokens, digest
from wanda_fast.data.evaluation import EvaluationSet, evaluation_set
from wanda_fast.data.given import ids_or_rows
from wanda_fast.data.protocols import comparable_with, window_of
from wanda_fast.errors import CalibrationError, NotStreamableError
from wanda_fast.model.architecture import Block
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.options.all_options import Options
from wanda_fast.output.resume import input_digests
from wanda_fast.run.bos import begin_with, wanted_bos
from wanda_fast.run.job import Job
from wanda_fast.run.live_model import dtype_of
from wanda_fast.run.task_inputs import require_room

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN, DEFAULT_NSAMPLES = 2048, 128


def open_model(options: Options, tokenizer: object, job: Job) -> MetaModel | Checkpoint:
    """The model in memory, or the checkpoint: without its weights if it can be streamed."""
    if isinstance(options.model, nn.Module):
        with job.clock.phase("load"):
            return Checkpoint(options.model, tokenizer, dtype_of(options.model))
    path = str(options.model)
    if options.checkpoint is not None:
        with job.phase("load", "loading", str(options.checkpoint)):
            return load_timm(path, str(options.checkpoint))
    gguf = checkpoints.locate(path)[1]
    if gguf:
        logger.info("converting %s: this can take minutes", gguf)
    with job.phase("load", "converting" if gguf else "loading", gguf or path):
        loaded = _open(path, options, job.device)
    if unused := loaded.unused:
        logger.info(
            "%d tensors that %s does not take are copied unchanged (e.g. %s)",
            len(unused),
            type(loaded.model).__name__,
            unused[0],
        )
    return loaded


def _open(path: str, options: Options, device: torch.device) -> MetaModel | Checkpoint:
    """The checkpoint without its weights; loaded as a whole if its format or the evaluation needs that."""
    arguments = (path, options.dtype, options.cache_dir, device.type, options.dequantize)
    if options.eval_zero_shot or options.tasks is not None:
        require_room(*arguments, device)
        return checkpoints.load(*arguments)
    try:
        opened = open_meta_model(*arguments)
        # Hidden states of a whole validation set are far larger than an image classifier.
        if classifies_images(opened.model) and options.eval_dataset is not None:
            return checkpoints.load(*arguments)
        return opened
    except NotStreamableError as error:
        loaded = checkpoints.load(*arguments)
        logger.info("%s is held in memory as a whole, not streamed: %s", path, error)
        return loaded


def read_tokens(
    options: Options, tokenizer: object, loaded: MetaModel | Checkpoint, blocks: list[Block], job: Job
) -> None:
    """Set the job's calibration tokens and evaluation windows; note them and their digests in the report.

    The first rank reads them for all.
    """
    model, ranks, texts = loaded.model, job.ranks, {}
    if options.image_transform != "eval":
        raise CalibrationError(
            f"image_transform {options.image_transform} is for image classifiers, and {type(model).__name__} "
            f"takes tokens"
        )

    def warn(sentence: str) -> None:
        if sentence not in job.report.warnings:  # calibration and evaluation may read the same files
            logger.warning("%s", sentence)
            job.report.warnings.append(sentence)

    with job.phase("calibration text"):
        if job.method.calibrates:
            job.token_ids, is_text = ranks.from_first(lambda: _calibration(options, tokenizer, model, warn))
            texts |= {"calibration": job.token_ids} if is_text else {}
        if options.eval_dataset is not None and _has_perplexity(model, job):
            job.evaluation, is_text = ranks.from_first(lambda: _evaluation(options, tokenizer, model, warn))
            texts |= {"evaluation": job.evaluation.windows} if is_text else {}
    bos = ranks.from_first(lambda: wanted_bos(options.bos, tokenizer, loaded, blocks, job, [*texts.values()]))
    if bos is not None and "calibration" in texts:
        job.token_ids = begin_with(bos, job.token_ids)
    if bos is not None and "evaluation" in texts:
        job.evaluation = replace(job.evaluation, windows=begin_with(bos, job.evaluation.windows), bos=True)
    _note(job, bos if "calibration" in texts else None)
    if not isinstance(options.model, nn.Module):
        digests = ranks.from_first(lambda: input_digests(loaded, job.token_ids, job.evaluation))
        job.report.digests |= digests


def _note(job: Job, bos: int | None) -> None:
    """Note in the report what the model is calibrated and measured on."""
    if job.token_ids is not None:
        shape = list(job.token_ids.shape)
        job.report.calibration = {"shape": shape, "sha256": digest(job.token_ids), "bos": bos}
    if job.evaluation is not None:
        job.report.perplexity["protocol"] = job.evaluation.protocol
        job.report.perplexity["comparable"] = comparable_with(job.evaluation)


def _has_perplexity(model: nn.Module, job: Job) -> bool:
    """Whether the model predicts tokens. If it does not, the report says that nothing is measured.

    Raises: `CalibrationError` if there is nothing else to do.
    """
    if predicts_tokens(model):
        return True
    sentence = f"{type(model).__name__} predicts no tokens: it has no perplexity"
    if not job.method.prunes:
        raise CalibrationError(sentence)
    logger.warning("%s", sentence)
    job.report.warnings.append(sentence)
    return False


def _calibration(
    options: Options, tokenizer: object, model: nn.Module, warn: Callable[[str], None]
) -> tuple[Tensor, bool]:
    """Calibration tokens, and whether they are windows of a text."""
    dataset = _rows(options.dataset, options.text_column)
    nsamples, seqlen = options.nsamples or DEFAULT_NSAMPLES, _seqlen(options, model)
    _require_context(model, seqlen, "calibration", "seqlen")
    token_ids = calibration_tokens(
        dataset, tokenizer, nsamples, seqlen, options.seed, options.cache_dir, options.text_column, warn
    )
    require_fit(model, token_ids, "calibration")
    return token_ids, not isinstance(dataset, Tensor)


def _evaluation(
    options: Options, tokenizer: object, model: nn.Module, warn: Callable[[str], None]
) -> tuple[EvaluationSet, bool]:
    """Evaluation windows, and whether they are of a text."""
    dataset = _rows(options.eval_dataset, options.text_column)
    seqlen, option = _seqlen(options, model), "seqlen"
    if options.protocol is not None:
        seqlen, option = window_of(options.protocol, context_of(model)), "protocol"
    _require_context(model, seqlen, "evaluation", option)
    found = evaluation_set(
        dataset, tokenizer, seqlen, options.eval_windows, options.cache_dir, options.text_column, warn
    )
    require_fit(model, found.windows, "evaluation")
    return found, not isinstance(dataset, Tensor)


def _rows(data: object, text_column: str | None) -> object:
    """A name or path as it is; other data as token ids or rows, read once."""
    return data if isinstance(data, str | Path) else ids_or_rows(data, text_column)


def _seqlen(options: Options, model: nn.Module) -> int:
    return options.seqlen or min(DEFAULT_SEQLEN, context_of(model))


def context_of(model: nn.Module) -> int:
    """The longest sequence that the model was made for; no limit if its configuration names none."""
    config = model.config.get_text_config()
    return (
        getattr(config, "max_position_embeddings", None)
        or getattr(config, "n_positions", None)
        or sys.maxsize
    )


def _require_context(model: nn.Module, seqlen: int, what: str, option: str) -> None:
    if seqlen > (context := context_of(model)):
        raise CalibrationError(
            f"{what} windows of {seqlen} tokens exceed the model's context of {context}: lower --{option}"
        )


def require_fit(model: nn.Module, token_ids: Tensor, what: str) -> None:
    """Raise `CalibrationError` if token ids would index past the model's positions or vocabulary."""
    _require_context(model, token_ids.shape[1], what, "seqlen")
    vocabulary = model.config.get_text_config().vocab_size
    lowest, highest = token_ids.min().item(), token_ids.max().item()
    if lowest < 0 or highest >= vocabulary:
        wrong = lowest if lowest < 0 else highest
        raise CalibrationError(f"{what} token id {wrong} is outside the model's vocabulary of {vocabulary}")
