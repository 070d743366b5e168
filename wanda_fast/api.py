"""`prune`: the whole job behind one function, whose keywords are the command line's flags."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint import load as checkpoints
from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.journal import chosen_before, partial_of
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import Skeleton, open_skeleton
from wanda_fast.data.calibration import calibration_tokens, digest
from wanda_fast.data.evaluation import evaluation_set, require_zero_shot, zero_shot
from wanda_fast.errors import NotStreamableError, ResumeError
from wanda_fast.memory import out_of_memory_explained, peak_memory
from wanda_fast.model.architecture import find_blocks
from wanda_fast.model.block_source import LiveModel
from wanda_fast.model.offload import require_kind
from wanda_fast.output.finished import finished_run, nothing_to_do
from wanda_fast.output.resume import input_digests, run_identity
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.methods import make_method
from wanda_fast.pruning.patterns import parse_pattern
from wanda_fast.report import Report
from wanda_fast.run.hessian_memory import place_hessians
from wanda_fast.run.job import Job, run_in_memory, run_streamed
from wanda_fast.run.resources import choose_resources, default_device, usable_device
from wanda_fast.run.validate import context_of, require_fit, require_sequential, survey
from wanda_fast.timer import Clock, Progress

logger = logging.getLogger(__name__)

DEFAULT_SEQLEN = 2048


def prune(
    model: nn.Module | str | Path,
    *,
    prune_method: str = "wanda",
    sparsity_type: str = "unstructured",
    sparsity_ratio: float | None = None,
    dataset: str | Tensor = "wikitext2",
    nsamples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    use_variant: bool = False,
    connect_gate: str = "activated",
    update: str = "none",
    dampening: float = 0.01,
    hessian_device: str = "auto",
    measure_error: bool | None = None,
    ignore: tuple[str, ...] | list[str] = (),
    batch_size: int | None = None,
    sequential: str = "block",
    activations: str = "auto",
    device: str | torch.device | None = None,
    dtype: str = "auto",
    tokenizer=None,
    cache_dir: str | None = None,
    eval_dataset: str | Tensor | None = None,
    eval_windows: int | None = None,
    eval_zero_shot: bool = False,
    save: str | Path | None = None,
    save_model: str | Path | None = None,
    save_log: str | Path | None = None,
    save_mask: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Prune a live model in place, or a checkpoint, in one shot.

    Args:
        model: a Hugging Face causal LM (pruned in place), or the hub id, folder or GGUF file of one.
        prune_method: "magnitude", "wanda", "connect", "gated", "sparsegpt", "dense", an ablation
            ("ablate_mag_seq", "ablate_wanda_seq", "ablate_mag_iter", "ablate_wanda_iter"), or a registered
            name.
        sparsity_type: "unstructured", "N:M" (N kept of every M consecutive inputs), or a registered name.
        sparsity_ratio: fraction to prune, in [0, 1); default 0.5, and for N:M what follows from it.
        dataset: "wikitext2", "c4", "ptb", "pydoc", a local text file or folder, or token ids
            `[nsamples, seqlen]`.
        nsamples, seqlen, seed: calibration windows; seqlen defaults to 2048, or the model's context where
            that is shorter.
        use_variant: the Wanda variant's threshold (unstructured only).
        connect_gate: connect sees the gate "activated" (as published code does) or "raw".
        update: "obs": the weights that a method keeps are updated for those that it prunes, as SparseGPT does
            (it and the ablations always do); "none".
        dampening: share of the mean diagonal added to a Hessian; ten times more, up to three times, where it
            is not positive definite.
        hessian_device: where Hessians are kept and factored: "device", "host", or "auto": the device, but for
            linears so wide that a block's could take more than half of its free memory.
        measure_error: note ||(W - W') X||^2 of each linear; None: where there are Hessians anyway.
        ignore: linears to leave dense: exact names (of a linear or a module around it), globs, or "re:"
            patterns.
        batch_size: calibration sequences a forward; default: as many as make about 4096 (CPU) or 16384 (GPU)
            tokens, fewer where free memory is less; a resumed run keeps to its first choice.
        sequential: "block", as published, or "linear": one pass instead of two, in which each linear is
            pruned as soon as its input is known, and what follows sees its pruned output; a gated MLP's
            down projection is scored while the other two are dense, on an eighth of the sequences.
        activations: where the hidden states of all sequences lie: on the "device", in "host" memory, in a
            file on "disk" (in `save_model` + ".partial", or the system's folder for temporary files), or
            "auto": the first of these that has room. The results are the same.
        device: where blocks are computed; default: a GPU where there is one for a checkpoint, the model's
            own device for a live model.
        dtype: "auto", "float32", "float16" or "bfloat16", for a checkpoint.
        tokenizer: for a live model and a `dataset` that is text.
        cache_dir: for hub downloads; default Hugging Face's own.
        eval_dataset: text, file or token ids to measure perplexity on, before and after; None: not measured.
        eval_windows: measure on at most so many windows.
        eval_zero_shot: run lm-evaluation-harness after pruning.
        save: folder for the published code's log line and the report.
        save_model: folder for the pruned model, its tokenizer and the report.
        save_log: file for the summary.
        save_mask: safetensors file for the packed masks (`wanda_fast.output.masks`).
        overwrite: allow `save` and `save_model` to be folders that are not empty, `save_log` and `save_mask`
            to be files that exist.
        resume: go on with the unfinished run that `save_model` + ".partial" holds, if it does.
        progress: told of each block and phase.
    Returns: the `Report`.
    Raises: subclasses of `wanda_fast.errors.WandaFastError`, each with one sentence.
    """
    recipe = {
        name: _plain(value) for name, value in locals().items() if name not in ("tokenizer", "progress")
    }
    name = "dense" if sparsity_ratio == 0 else prune_method
    method = make_method(name, update, dampening, measure_error, connect_gate=connect_gate)
    pattern = parse_pattern(sparsity_type, sparsity_ratio or None, use_variant)
    require_sequential(sequential)
    require_kind(activations)
    recipe["sparsity_ratio"] = pattern.ratio if method.prunes else 0.0
    if resume and save_model is None:
        raise ResumeError("--resume goes on with what --save_model FOLDER was to receive: name the folder")
    live = isinstance(model, nn.Module)
    folder = save_model and Path(save_model)
    if folder:
        saving.put_back_replaced(folder)
    finished = finished_run(folder, recipe) if resume and not live else None
    _require_outputs(recipe, resume, overwrite or finished is not None)
    if eval_zero_shot:
        require_zero_shot()
    target = usable_device(device or (model.device if live else default_device()))
    clock = Clock(target)
    report = Report(recipe, seconds=clock.seconds)
    with clock.phase("load"):
        if live:
            loaded = Checkpoint(model, tokenizer, model.dtype)
        else:
            loaded = _open(str(model), dtype, cache_dir, target.type, whole=eval_zero_shot)
    model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
    blocks = find_blocks(model, tuple(ignore))
    survey(model, blocks, method, pattern, tuple(ignore), use_variant, report)
    if method.hessians is not None:
        before = chosen_before(folder, "hessians_on_host") if resume else None
        place_hessians(blocks, target, hessian_device, method.hessians, before)
        method.hessians.stored = None if live and save_model is None else loaded.dtype
    seqlen = seqlen or min(DEFAULT_SEQLEN, context_of(model))
    with clock.phase("calibration text"):
        token_ids = None
        if method.calibrates:
            token_ids = calibration_tokens(dataset, tokenizer, nsamples, seqlen, seed, cache_dir)
            require_fit(model, token_ids, "calibration")
            report.calibration = {"shape": list(token_ids.shape), "sha256": digest(token_ids)}
        evaluation = None
        if eval_dataset is not None:
            evaluation = evaluation_set(eval_dataset, tokenizer, seqlen, eval_windows, cache_dir)
            require_fit(model, evaluation.windows, "evaluation")
            report.perplexity["protocol"] = evaluation.protocol
    if not live:
        report.digests = input_digests(loaded, token_ids, evaluation)
    if finished is not None and nothing_to_do(finished, report):
        shutil.rmtree(partial_of(folder), ignore_errors=True)  # killed after its last rename
        logger.info("%s is complete: nothing to resume", folder)
        saving.save_logs(finished, save and Path(save), save_log and Path(save_log))
        return finished
    masks = {} if save_mask is not None else None
    job = Job(method, pattern, token_ids, evaluation, clock, report, progress, masks, sequential=sequential)
    if batch_size is None and resume:
        batch_size = chosen_before(folder, "batch_size")
    stored = loaded.dtype if isinstance(loaded, Skeleton) else None
    resources = choose_resources(job, model, blocks, target, stored, batch_size, activations)
    job.batch_size, job.activations = resources.batch_size, resources.activations
    report.resources, report.predicted_memory = resources.chosen, resources.predicted
    with out_of_memory_explained(), _in_eval_mode(model):
        if isinstance(loaded, Skeleton):
            source = StreamedModel(loaded, blocks, target, clock)
            on_host = method.hessians.on_host if method.hessians else frozenset()
            identity = run_identity(recipe, report.digests, target, job.batch_size, on_host)
            output = folder and StreamedOutput(folder, source, identity, resume)
            run_streamed(job, source, output)
        else:
            if resume:
                logger.warning("a model that is held in memory as a whole is pruned from the start")
            run_in_memory(job, LiveModel(model, blocks, target, clock), loaded, folder)
        if eval_zero_shot:
            with clock.phase("zero-shot"):
                report.zero_shot = zero_shot(model, tokenizer)
    report.peak_memory, report.complete = peak_memory(), True
    if folder is not None and not isinstance(loaded, Skeleton):
        saving.save_report(report, folder)  # with all that was measured since the model was saved
    saving.save_logs(report, save and Path(save), save_log and Path(save_log))
    return report


def evaluate(
    model: str,
    *,
    dataset: str | None = "wikitext2",
    seqlen: int | None = None,
    eval_windows: int | None = None,
    eval_zero_shot: bool = False,
    device: str | torch.device | None = None,
    dtype: str = "auto",
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Perplexity and zero-shot accuracy of a checkpoint, as they are; the keywords are those of `prune`."""
    return prune(
        model,
        prune_method="dense",
        eval_dataset=dataset,
        seqlen=seqlen,
        eval_windows=eval_windows,
        eval_zero_shot=eval_zero_shot,
        device=device,
        dtype=dtype,
        cache_dir=cache_dir,
        progress=progress,
    )


def _require_outputs(recipe: dict, resume: bool, may_replace: bool) -> None:
    """Refuse before the work what cannot be written after it, or would be lost."""
    save, folder, log, mask = (
        recipe[option] and Path(recipe[option]) for option in ("save", "save_model", "save_log", "save_mask")
    )
    if folder:
        saving.require_empty(folder, may_replace, resume)
    if folder and mask:
        saving.require_outside(mask, folder)
    may_replace = may_replace or (resume and StreamedOutput.is_under_way(folder))  # they may be its own
    if save:
        saving.require_empty(save.resolve(), may_replace, resume)
    for file in filter(None, (log, mask)):
        saving.require_free(file, may_replace)


def _open(path: str, dtype: str, cache_dir: str | None, device: str, whole: bool) -> Skeleton | Checkpoint:
    """The checkpoint without its weights, to be streamed, or with them where that cannot be."""
    if whole:  # zero-shot tasks ask the whole model
        return checkpoints.load(path, dtype, cache_dir, device)
    try:
        return open_skeleton(path, dtype, cache_dir, device)
    except NotStreamableError as error:
        loaded = checkpoints.load(path, dtype, cache_dir, device)
        logger.info("%s is held in memory as a whole, not streamed: %s", path, error)
        return loaded


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _plain(value: object) -> object:
    """A flag's value as the recipe keeps it: tensors and modules by what they are, not what they hold."""
    if isinstance(value, Tensor):
        return f"token ids {list(value.shape)}"
    return type(value).__name__ if isinstance(value, nn.Module) else value
