"""One run, step by step: options, model, tokens, resources, the block loop, the report."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import nn
from torch.distributed import ProcessGroup

from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.journal import chosen_before, partial_of
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import OptionError
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.model.architecture import Block, find_blocks
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.model.block_source import LiveModel
from wanda_fast.model.rounded_products import require_multiplies, rounding_warnings
from wanda_fast.options.all_options import Options
from wanda_fast.output.resume import nothing_to_do, outside_digest, run_identity
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.pruning.expert_statistics import ExpertOptions
from wanda_fast.pruning.methods import Method, make_method, require_method
from wanda_fast.pruning.patterns import Pattern, parse_pattern
from wanda_fast.report.contents import Report
from wanda_fast.run.allocation import allocate
from wanda_fast.run.expectation import comparison, expected_row
from wanda_fast.run.hessian_memory import place_hessians
from wanda_fast.run.image_inputs import read_images
from wanda_fast.run.in_memory import run_in_memory
from wanda_fast.run.inputs import open_model, read_tokens
from wanda_fast.run.job import Job
from wanda_fast.run.live_model import device_of, plain_model
from wanda_fast.run.memory_model import Footprint, footprint
from wanda_fast.run.outputs import path_of, require_outputs, sole_writer, write_logs, write_report
from wanda_fast.run.resources import choose_resources, default_device, own_device, usable_device
from wanda_fast.run.streamed import run_streamed
from wanda_fast.run.task_inputs import read_tasks, require_measurable
from wanda_fast.run.validate import survey
from wanda_fast.timer import Clock, Progress

logger = logging.getLogger(__name__)


def prune_model(
    options: Options,
    tokenizer: object = None,
    progress: Progress | None = None,
    process_group: ProcessGroup | None = None,
) -> Report:
    """Prune the model that `options` name, measure and save what they request."""
    with plain_model(options) as options:
        method, pattern = method_and_pattern(options)
        recipe = options.recipe() | {"sparsity_ratio": pattern.ratio if method.prunes else 0.0}
        job = new_job(options, method, pattern, recipe, progress, Ranks(process_group))
        with sole_writer(options, job.ranks):
            return _prune(options, tokenizer, job)


def _prune(options: Options, tokenizer: object, job: Job) -> Report:
    """The run, once its output folder is its own."""
    ranks = job.ranks
    finished = ranks.from_first(lambda: require_outputs(options, job.report.recipe))
    row = ranks.from_first(lambda: expected_row(options, job))
    job.against = row and partial(comparison, row, job)
    job.tasks = read_tasks(options, ranks)
    loaded = open_model(options, tokenizer, job)
    blocks = find_blocks(loaded.model, options.ignored)
    survey_blocks(options, loaded, blocks, job)
    find_room_for_hessians(options, loaded, blocks, job)
    allocate(options.allocation, blocks, job)
    if classifies_images(loaded.model):
        read_images(options, tokenizer, loaded, blocks, job)
        if options.statistics is None and job.sequential == "block":
            job.sequential = "dense"
    else:
        tokenizer = tokenizer or loaded.tokenizer
        read_tokens(options, tokenizer, loaded, blocks, job)
    if job.tasks is not None:
        require_measurable(loaded.model, tokenizer)
        job.tasks.tokenizer = tokenizer
        job.report.digests |= {"tasks": job.tasks.digest} if job.report.digests else {}
    done = finished is not None and ranks.from_first(lambda: nothing_to_do(finished, job.report))
    if done:
        return ranks.from_first(lambda: _already_finished(options, finished, job))
    choose_and_note_resources(options, loaded, blocks, job)
    with out_of_memory_explained(), in_eval_mode(loaded.model):
        _run(options, loaded, blocks, job)
    if not job.report.complete:
        job.finish_report()
    return ranks.from_first(lambda: write_report(options, loaded, job.report))


def method_and_pattern(options: Options) -> tuple[Method, Pattern]:
    require_method(options.prune_method)
    name = "dense" if options.sparsity_ratio == 0 else options.prune_method
    method = make_method(
        name,
        options.update,
        options.dampening,
        options.measure_error,
        options.refine,
        options.polish,
        connect_gate=options.connect_gate,
    )
    options.require_choices()
    pattern = parse_pattern(
        options.sparsity_type,
        options.sparsity_ratio or None,
        options.use_variant,
        options.prune_granularity,
    )
    if options.statistics == "dense" and options.sequential == "linear":
        raise OptionError(
            "statistics dense and sequential linear exclude each other: with linear, each linear sees the "
            "output of pruned ones"
        )
    return method, pattern


def new_job(
    options: Options, method: Method, pattern: Pattern, recipe: dict, progress: Progress | None, ranks: Ranks
) -> Job:
    """The job before anything is read; its clock and its report begin here."""
    live = isinstance(options.model, nn.Module)
    wanted = options.device or (device_of(options.model) if live else default_device())
    clock = Clock(own_device(usable_device(wanted), ranks))
    require_multiplies(options.forward_dtype, clock.device)
    ranks.timed = partial(clock.phase, "collectives")
    return Job(
        method,
        pattern,
        token_ids=None,
        evaluation=None,
        clock=clock,
        report=Report(recipe, seconds=clock.seconds, objects=options.objects()),
        progress=progress,
        masks=None if options.save_mask is None else {},
        sequential="dense" if options.statistics == "dense" else options.sequential,
        forward_dtype=options.forward_dtype,
        expert_options=ExpertOptions(
            options.expert_shrinkage, options.expert_tokens, options.expert_weighting
        ),
        ranks=ranks,
    )


def survey_blocks(options: Options, loaded: MetaModel | Checkpoint, blocks: list[Block], job: Job) -> None:
    """Check that method and pattern fit the blocks, and note how much of the model they can prune."""
    warnings = survey(
        loaded.model, blocks, job.method, job.pattern, options.ignored, options.use_variant, job.report
    )
    job.warn(warnings + rounding_warnings(blocks, options.forward_dtype, job.method.calibrates))


def find_room_for_hessians(
    options: Options, loaded: MetaModel | Checkpoint, blocks: list[Block], job: Job
) -> None:
    """Choose where the method's Hessians are kept, if it has any."""
    use = job.method.hessians
    if use is not None:
        before = _chosen_before(options, "hessians_on_host")
        place_hessians(blocks, job.device, options.hessian_device, use, before, job.ranks)
        kept_in_memory = isinstance(options.model, nn.Module) and options.save_model is None
        weights = list({linear.parameter: None for block in blocks for linear in block.linears})
        use.rounded = {} if kept_in_memory else loaded.update_dtypes(weights)


def _already_finished(options: Options, finished: Report, job: Job) -> Report:
    # A run that was killed after its last rename has left its working folder.
    shutil.rmtree(partial_of(Path(options.save_model)), ignore_errors=True)
    logger.info("%s is complete: nothing to resume", options.save_model)
    finished.expected = job.against(finished.perplexity) if job.against else {}
    return write_logs(options, finished)


def choose_and_note_resources(
    options: Options,
    loaded: MetaModel | Checkpoint,
    blocks: list[Block],
    job: Job,
    terms: Callable[..., Footprint] = footprint,
) -> None:
    """Set the job's batch size and where its hidden states are kept; `terms` as in `choose_resources`."""
    streamed = isinstance(loaded, MetaModel)
    stored, converted = (loaded.dtype, loaded.converted) if streamed else (None, frozenset())
    batch_size = options.batch_size
    if batch_size is None:
        batch_size = _chosen_before(options, "batch_size")
    resources = choose_resources(
        job, loaded.model, blocks, job.device, stored, batch_size, options.activations, converted, terms
    )
    job.batch_size, job.activations = resources.batch_size, resources.activations
    job.report.resources, job.report.predicted_memory = resources.chosen, resources.predicted
    if job.method.hessians is not None:
        job.report.resources["passes"] = job.method.hessians.passes


def _chosen_before(options: Options, name: str) -> object:
    """What the unfinished run that this one resumes has chosen; None if there is none."""
    return chosen_before(Path(options.save_model), name) if options.resume else None


def _run(options: Options, loaded: MetaModel | Checkpoint, blocks: list[Block], job: Job) -> None:
    folder = path_of(options.save_model)
    if isinstance(loaded, MetaModel):
        source = StreamedModel(loaded, blocks, job.device, job.clock, job.ranks.of_machine())
        output = folder and StreamedOutput(
            folder,
            source,
            job.ranks.from_first(lambda: _identity(job, source)),
            options.resume,
            job.ranks,
            packed=options.save_packed,
        )
        run_streamed(job, source, output)
        return
    if options.resume:
        logger.warning("a model that is held in memory as a whole is pruned from the start")
    run_in_memory(
        job, LiveModel(loaded.model, blocks, job.device, job.clock), loaded, folder, options.save_packed
    )


def _identity(job: Job, source: StreamedModel) -> dict:
    on_host = job.method.hessians.on_host if job.method.hessians else frozenset()
    digests = job.report.digests | {"model": outside_digest(source)}
    return run_identity(job.report.recipe, digests, job.device, job.batch_size, on_host)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
