"""A sweep, step by step: one model pruned by many settings, read and calibrated once.

The blocks of the model are dense again after each setting: a model in memory is left as it was.
"""

from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.distributed.torchrun import is_running
from wanda_fast.errors import RanksError, SweepError
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.model.architecture import Block, find_blocks
from wanda_fast.model.block_lists import classifies_images
from wanda_fast.model.block_source import LiveModel
from wanda_fast.options.all_options import Options
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.report.contents import Report
from wanda_fast.report.sweep import Sweep
from wanda_fast.run.inputs import open_model, read_tokens
from wanda_fast.run.job import Job
from wanda_fast.run.live_model import is_pixels, plain_model
from wanda_fast.run.outputs import path_of, sole_writer
from wanda_fast.run.prune_model import (
    choose_and_note_resources,
    find_room_for_hessians,
    in_eval_mode,
    method_and_pattern,
    new_job,
    survey_blocks,
)
from wanda_fast.run.settings import Setting
from wanda_fast.run.sweep_job import run_settings
from wanda_fast.run.sweep_memory import sweep_footprint
from wanda_fast.timer import Clock, Progress

NO_IMAGES = (
    "a sweep measures its models block by block, which gives no accuracy: prune an image classifier with "
    "each setting by itself"
)


def sweep_model(
    options: Options, settings: list[Setting], tokenizer: object = None, progress: Progress | None = None
) -> Sweep:
    """Prune the blocks of the model that `options` name by every setting, and measure what they give."""
    _require_one_model(options)
    with plain_model(options) as options:
        jobs = _jobs(options, settings, progress)
        with sole_writer(options, Ranks()):
            return _sweep(options, tokenizer, jobs)


def _require_one_model(options: Options) -> None:
    if options.resume:
        raise SweepError("a sweep keeps nothing to continue with, so it takes no --resume: start it again")
    if is_running():
        raise RanksError("a sweep runs in one process: start it without torchrun")
    if is_pixels(options.dataset):
        raise SweepError(NO_IMAGES)


def _jobs(options: Options, settings: list[Setting], progress: Progress | None) -> dict[str, Job]:
    """A job for each setting, by its name. Those of one method have the same object for it."""
    jobs, methods, said = {}, {}, set()
    for setting in settings:
        own = replace(setting.options(options), save_model=_folder_of(setting, options))
        method, pattern = method_and_pattern(own)
        method = methods.setdefault(method.name, method)
        recipe = own.recipe() | {"sparsity_ratio": pattern.ratio}
        job = new_job(own, method, pattern, recipe, progress, Ranks())
        # The log has a sentence once, the reports have it each.
        jobs[setting.name] = replace(job, said=said)
    return jobs


def _folder_of(setting: Setting, options: Options) -> Path | None:
    """Where the setting's model is saved, e.g. wanda-2of4, wanda-unstructured-0.5."""
    if options.save_model is None:
        return None
    return Path(options.save_model) / setting.name.replace(":", "of").replace(" ", "-")


def _sweep(options: Options, tokenizer: object, jobs: dict[str, Job]) -> Sweep:
    """The sweep, once its output folders are its own."""
    every = list(jobs.values())
    _require_free(options, every)
    shared = _shared_job(every)
    loaded = open_model(options, tokenizer, shared)
    if classifies_images(loaded.model):
        raise SweepError(NO_IMAGES)
    if options.save_model is not None and not isinstance(loaded, MetaModel):
        raise SweepError(
            f"a sweep saves models that are read block by block, and this {type(loaded.model).__name__} is "
            f"held in memory as a whole: leave out save_model, or prune it with each setting by itself"
        )
    blocks = find_blocks(loaded.model, options.ignored)
    for job in every:
        survey_blocks(options, loaded, blocks, job)
    for job in {job.method.name: job for job in every}.values():
        find_room_for_hessians(options, loaded, blocks, job)
    read_tokens(options, tokenizer or loaded.tokenizer, loaded, blocks, shared)
    choose_and_note_resources(options, loaded, blocks, shared, partial(sweep_footprint, every))
    for job in every:
        _share(shared, job)
    with out_of_memory_explained(), in_eval_mode(loaded.model):
        _run(loaded, blocks, shared, every)
    sweep = Sweep({name: job.report for name, job in jobs.items()}, shared.clock.seconds)
    if options.save is not None:
        saving.save_sweep(sweep, Path(options.save))
    return sweep


def _require_free(options: Options, jobs: list[Job]) -> None:
    folders = [options.save_model, options.save, *(job.report.recipe["save_model"] for job in jobs)]
    for folder in filter(None, folders):
        saving.restore_replaced(Path(folder))
        saving.require_empty(Path(folder), options.overwrite)


def _shared_job(jobs: list[Job]) -> Job:
    """What the settings share: reading, calibration, the dense model's evaluation; with its own clock."""
    calibrating = (job for job in jobs if job.method.calibrates)
    clock = Clock(jobs[0].device)
    report = Report({}, seconds=clock.seconds)
    return replace(next(calibrating, jobs[0]), clock=clock, report=report, masks=None)


def _share(shared: Job, job: Job) -> None:
    """Give a setting's job what was read and chosen for all."""
    report, known = job.report, shared.report
    job.batch_size, job.activations, job.evaluation = shared.batch_size, shared.activations, shared.evaluation
    report.perplexity, report.digests = dict(known.perplexity), dict(known.digests)
    report.resources, report.predicted_memory = known.resources, known.predicted_memory
    report.warnings += known.warnings
    if job.method.calibrates:
        job.token_ids, report.calibration = shared.token_ids, known.calibration
    elif known.digests:
        report.digests["calibration"] = None


def _run(loaded: MetaModel | Checkpoint, blocks: list[Block], shared: Job, jobs: list[Job]) -> None:
    if not isinstance(loaded, MetaModel):
        run_settings(shared, jobs, LiveModel(loaded.model, blocks, shared.device, shared.clock), [])
        return
    with closing(StreamedModel(loaded, blocks, shared.device, shared.clock)) as source, ExitStack() as opened:
        folders = [path_of(job.report.recipe["save_model"]) for job in jobs]
        outputs = [
            opened.enter_context(StreamedOutput(folder, source, {"sweep": True}, resumable=False))
            for folder in folders
            if folder is not None
        ]
        run_settings(shared, jobs, source, outputs)
