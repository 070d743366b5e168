"""What makes two runs the same run: whatever decides the bytes of the output, and nothing else."""

import hashlib
import json

from torch import Tensor

from wanda_fast.block_forward import described
from wanda_fast.calibration import digest
from wanda_fast.evaluation import EvaluationSet
from wanda_fast.sources import StreamedModel

OPTIONS = ("prune_method", "sparsity_type", "sparsity_ratio", "nsamples", "seqlen", "seed", "use_variant")
OPTIONS += ("connect_gate", "ignore", "dtype", "sequential", "update", "dampening")


def run_identity(
    recipe: dict,
    source: StreamedModel,
    token_ids: Tensor | None,
    evaluation: EvaluationSet | None,
    batch_size: int,
    hessians_on_host: frozenset[int] = frozenset(),
) -> dict:
    """Options by name, and digests of model and tokens."""
    return {
        **{option: recipe[option] for option in OPTIONS},
        "batch_size": batch_size,
        "device": source.device.type,
        "forward": described(source.device),
        "hessians_on_host": sorted(hessians_on_host),  # by in_features; on a CPU they are nowhere else
        "save_mask": recipe["save_mask"] is not None,
        "model": _model_digest(source),
        "calibration": None if token_ids is None else digest(token_ids),
        "evaluation": None if evaluation is None else digest(evaluation.windows),
    }


def same_options(before: dict, now: dict) -> bool:
    """Whether two recipes, one of them read from JSON, ask for the same of the same model."""
    options = (*OPTIONS, "model", "dataset", "eval_dataset", "eval_windows", "batch_size", "save_mask")
    return all(before.get(option) == json.loads(json.dumps(now[option], default=str)) for option in options)


def _model_digest(source: StreamedModel) -> str:
    """Of configuration and tensors, wherever the files lie."""
    config = source.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    described = json.dumps(config, sort_keys=True, default=str) + source.skeleton.files.digest()
    return hashlib.sha256(described.encode()).hexdigest()
