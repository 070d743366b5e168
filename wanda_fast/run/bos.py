"""Whether every window begins with the token that begins a text (BOS).

Windows are cut from the middle of a text, and published figures were measured on those. Some models, such as
Gemma's, predict far worse without the token. BOS takes the place of a window's first token, which is never
predicted: with it and without it, perplexities are of the same predictions.
"""

import logging
from contextlib import closing

import torch
from torch import Tensor

from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.checkpoint.model_class import predicts_tokens
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.data.perplexity import whole_scores
from wanda_fast.data.scores import exponential
from wanda_fast.distributed.ranks import Ranks
from wanda_fast.errors import CalibrationError
from wanda_fast.hidden_states import record_activations, scores_by_blocks
from wanda_fast.memory import out_of_memory_explained
from wanda_fast.model.architecture import Block
from wanda_fast.model.experts import sorted_by_expert
from wanda_fast.model.fused_modules import fused_modules
from wanda_fast.model.offload import Offload
from wanda_fast.run.job import Job
from wanda_fast.timer import Clock

logger = logging.getLogger(__name__)

# Models of the published tables, whose windows have none: they are not tried.
PUBLISHED_MODELS = ("llama", "opt", "bloom", "gpt_neox", "mistral", "mixtral")
# "auto" begins windows with BOS if that lowers the perplexity of the trial by more than this share.
WORTH = 0.2
TRIAL_TOKENS = 256
# Weights of the largest streamed model that is tried: it is read once more for that.
LARGEST_TRIAL = 20 * 10**9


def begin_with(token: int | None, windows: Tensor) -> Tensor:
    """Windows `[nwindows, seqlen]` with `token` in place of their first one; None: as they are."""
    if token is None:
        return windows
    windows = windows.clone()
    windows[:, 0] = token
    return windows


def wanted_bos(
    wanted: str,
    tokenizer: object,
    loaded: MetaModel | Checkpoint,
    blocks: list[Block],
    job: Job,
    texts: list[Tensor],
) -> int | None:
    """The token that every window of text begins with; None: windows stay as they are cut.

    Args:
        wanted: the option `bos`.
        texts: windows of texts, each int64 `[nwindows, seqlen]`; one of them is tried.
    Raises: `CalibrationError` if BOS is wanted and the tokenizer or the model has none, or there is no text.
    """
    token, model = getattr(tokenizer, "bos_token_id", None), loaded.model
    if wanted == "always" and not texts:
        raise CalibrationError("bos always is for text: token ids are used as they are")
    if wanted == "always" and token is None:
        raise CalibrationError(f"bos always: {type(tokenizer).__name__} has no token that begins a text")
    vocabulary = model.config.get_text_config().vocab_size
    is_known = token is not None and 0 <= token < vocabulary
    if wanted == "always" and not is_known:
        raise CalibrationError(f"bos always: token {token} is outside the model's vocabulary of {vocabulary}")
    if wanted == "always":
        return token
    if wanted == "never" or not is_known or model.config.model_type in PUBLISHED_MODELS:
        return None
    if not predicts_tokens(model):
        return None
    # The first window of a text can begin with BOS already.
    window = next((each for windows in texts for each in windows if each[0] != token), None)
    if window is None:
        return None
    weights = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(loaded, MetaModel) and weights > LARGEST_TRIAL:
        job.warn(
            [
                f"whether windows should begin with BOS is not tried on a model of {weights / 1e9:.0f} "
                f"billion weights, which would be read once more: pass bos always or never"
            ]
        )
        return None
    without, with_bos = trial(token, loaded, blocks, job, window[:TRIAL_TOKENS])
    better = with_bos < (1 - WORTH) * without
    logger.info(
        "perplexity of a window of %d: %.4g as it is, %.4g if it begins with BOS: windows %s",
        min(len(window), TRIAL_TOKENS),
        without,
        with_bos,
        "begin with it" if better else "stay as they are",
    )
    return token if better else None


def trial(
    token: int, loaded: MetaModel | Checkpoint, blocks: list[Block], job: Job, window: Tensor
) -> tuple[float, float]:
    """Perplexities of the dense model on one window, and on the window that begins with `token`."""
    both = EvaluationSet(torch.stack([window, begin_with(token, window[None])[0]]), "trial")
    with out_of_memory_explained("pass bos always or never"), job.phase("BOS trial"):
        losses = (
            _by_blocks(loaded, blocks, both, job) if isinstance(loaded, MetaModel) else _whole(loaded, both)
        )
    return exponential(losses[0]), exponential(losses[1])


def _whole(loaded: Checkpoint, windows: EvaluationSet) -> list[float]:
    training = loaded.model.training
    loaded.model.eval()
    try:
        return whole_scores(loaded.model, windows).losses
    finally:
        loaded.model.train(training)


def _by_blocks(loaded: MetaModel, blocks: list[Block], windows: EvaluationSet, job: Job) -> list[float]:
    source = StreamedModel(loaded, blocks, job.device, Clock(job.device))
    offload = Offload("device", job.device)
    with torch.no_grad(), closing(source), closing(offload):
        activations = record_activations(source, offload, None, 1, windows, pruned=False)
        for index, block in enumerate(blocks):
            with source.block(index), fused_modules(block.module), sorted_by_expert(block.experts):
                activations.dense.advance_(index, block.module)
        with source.surroundings(head=True):
            return scores_by_blocks(source, {"dense": activations.dense}, windows, Ranks())["dense"].losses
