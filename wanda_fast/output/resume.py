"""What makes two runs the same run: whatever decides the bytes of the output, and nothing else."""

import hashlib
import json

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import Skeleton
from wanda_fast.checkpoint.shards import SAMPLE, SAMPLES
from wanda_fast.data.calibration import digest
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.model.block_forward import described

OPTIONS = ("prune_method", "sparsity_type", "sparsity_ratio", "nsamples", "seqlen", "seed", "use_variant")
OPTIONS += ("connect_gate", "ignore", "dtype", "sequential", "update", "dampening", "measure_error")


def run_identity(
    recipe: dict,
    digests: dict[str, str | None],
    device: torch.device,
    batch_size: int,
    hessians_on_host: frozenset[int] = frozenset(),
) -> dict:
    """Options by name, and digests of model and tokens."""
    return {
        **{option: recipe[option] for option in OPTIONS},
        "batch_size": batch_size,
        "device": device.type,
        "forward": described(device),
        "hessians_on_host": sorted(hessians_on_host),  # by in_features; on a CPU they are nowhere else
        "save_mask": recipe["save_mask"] is not None,
        **digests,
    }


def input_digests(
    loaded: Skeleton | Checkpoint, token_ids: Tensor | None, evaluation: EvaluationSet | None
) -> dict[str, str | None]:
    """Of model and tokens, by the names that a journal knows; before anything is pruned."""
    return {
        "model": _model_digest(loaded),
        "calibration": None if token_ids is None else digest(token_ids),
        "evaluation": None if evaluation is None else digest(evaluation.windows),
    }


def same_options(before: dict, now: dict) -> bool:
    """Whether two recipes, one of them read from JSON, ask for the same of the same model."""
    options = (*OPTIONS, "model", "dataset", "eval_dataset", "eval_windows", "eval_zero_shot")
    options += ("batch_size", "save_mask")
    return all(before.get(option) == json.loads(json.dumps(now[option], default=str)) for option in options)


def _model_digest(loaded: Skeleton | Checkpoint) -> str:
    """Of configuration and tensors, wherever the files lie."""
    config = loaded.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    tensors = loaded.files.digest() if isinstance(loaded, Skeleton) else _sampled(loaded.model)
    described = json.dumps(config, sort_keys=True, default=str) + tensors
    return hashlib.sha256(described.encode()).hexdigest()


def _sampled(model: nn.Module) -> str:
    """As `TensorFiles.digest`, of a model in memory, whether or not it was widened for the computation."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {list(tensor.shape)}".encode())
        values = tensor.flatten()
        last = max(0, len(values) - SAMPLE)
        for place in range(SAMPLES):
            begin = last * place // (SAMPLES - 1)
            found.update(values[begin : begin + SAMPLE].double().cpu().numpy().tobytes())
    return found.hexdigest()
