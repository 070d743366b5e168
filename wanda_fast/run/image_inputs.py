"""What a run on an image classifier reads: calibration images, and images to measure accuracy on."""

import logging
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from wanda_fast.checkpoint.image_processor import in_words, load_image_processor, timm_processor
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.data.accuracy import LabelledImages, labelled
from wanda_fast.data.calibration import digest
from wanda_fast.data.images import as_indices, find_images
from wanda_fast.data.pixels import PixelReader, read_all
from wanda_fast.data.text import NAMES
from wanda_fast.data.training_transform import TrainingTransform, drawn_from
from wanda_fast.errors import CalibrationError, OptionError
from wanda_fast.model.architecture import Block
from wanda_fast.model.image_shapes import image_shapes
from wanda_fast.options.all_options import Options
from wanda_fast.output.resume import input_digests
from wanda_fast.run.job import Job

logger = logging.getLogger(__name__)

DEFAULT_NSAMPLES = 4096


def read_images(
    options: Options,
    processor: Callable | None,
    loaded: MetaModel | Checkpoint,
    blocks: list[Block],
    job: Job,
) -> None:
    """Set the job's calibration images and those of the evaluation; note them in the report.

    Args:
        processor: the model's image processor; None: the one in its folder.
    """

    def warn(sentence: str) -> None:
        if sentence not in job.report.warnings:  # the dense and the pruned model see the same images
            logger.warning("%s", sentence)
            job.report.warnings.append(sentence)

    with job.phase("calibration images"):
        if job.method.calibrates:
            job.token_ids = _calibration(options, processor, loaded.model, job, warn)
            job.report.calibration = {
                "shape": list(job.token_ids.shape),
                "sha256": digest(job.token_ids),
                "transform": options.image_transform,
            }
            job.image_shapes = image_shapes(loaded.model, blocks, job.token_ids.shape[1:])
        if options.eval_dataset is not None:
            job.labelled = _evaluation(options, processor, loaded.model, warn)
            job.report.accuracy["protocol"] = job.labelled.protocol
    if not isinstance(options.model, nn.Module):
        job.report.digests |= input_digests(loaded, job.token_ids, None)


def _calibration(
    options: Options, processor: Callable | None, model: nn.Module, job: Job, warn: Callable[[str], None]
) -> Tensor:
    _refuse_text(options.dataset, model)
    images = find_images(options.dataset, "calibration", options.cache_dir)
    if isinstance(images, Tensor):
        if options.image_transform != "eval":
            raise CalibrationError("image_transform train is for images: pixel values are used as they are")
        return images
    if not 0 <= options.seed < 2**32:
        raise OptionError(f"seed must be in [0, 2^32) for images, got {options.seed}")
    wanted = options.nsamples or DEFAULT_NSAMPLES
    if images.count < wanted and options.nsamples is not None:
        warn(f"{images.label} has {images.count} images, fewer than nsamples {wanted}: all are used")
    processor, indices = _processor(options, processor, model), as_indices(images, wanted, options.seed)
    tell = partial(job.count_images, "images")
    if options.image_transform == "eval":
        return read_all(PixelReader(images, processor, warn), indices, tell)
    with drawn_from(options.seed):
        return read_all(PixelReader(images, TrainingTransform(processor), warn, threads=1), indices, tell)


def _evaluation(
    options: Options, processor: Callable | None, model: nn.Module, warn: Callable[[str], None]
) -> LabelledImages:
    _refuse_text(options.eval_dataset, model)
    images = find_images(options.eval_dataset, "evaluation", options.cache_dir)
    if isinstance(images, Tensor):
        raise CalibrationError(
            "pixel values have no classes, so accuracy cannot be measured: name a folder of class folders or "
            "a dataset with a label column as eval_dataset"
        )
    processor = _processor(options, processor, model)
    return labelled(PixelReader(images, processor, warn), model, options.eval_windows, in_words(processor))


def _refuse_text(dataset: object, model: nn.Module) -> None:
    if isinstance(dataset, str) and dataset in NAMES:
        raise CalibrationError(
            f"dataset {dataset} is text, and {type(model).__name__} takes images: name a folder of images, a "
            f"dataset of the hub, or digits"
        )


def _processor(options: Options, given: Callable | None, model: nn.Module) -> Callable:
    if given is not None:
        return given
    if options.checkpoint is not None:
        return timm_processor(model)
    if isinstance(options.model, nn.Module):
        raise CalibrationError(
            "images of a folder or dataset need the model's image processor: pass it as tokenizer, or pass "
            "pixel values [n, 3, height, width]"
        )
    return load_image_processor(str(options.model), options.cache_dir)
