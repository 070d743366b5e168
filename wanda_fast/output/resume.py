"""`--resume`: what makes two runs the same run, and whether a finished one leaves anything to do."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint import save as saving
from wanda_fast.checkpoint.block_loader import StreamedModel
from wanda_fast.checkpoint.journal import differences
from wanda_fast.checkpoint.load import Checkpoint
from wanda_fast.checkpoint.meta_model import MetaModel
from wanda_fast.checkpoint.shards import SAMPLE, SAMPLES
from wanda_fast.data.calibration import digest
from wanda_fast.data.evaluation import EvaluationSet
from wanda_fast.errors import ResumeError
from wanda_fast.model.block_forward import described
from wanda_fast.options.option import BYTES, RESULTS
from wanda_fast.options.signature import names_deciding
from wanda_fast.output.streamed import StreamedOutput
from wanda_fast.report.contents import Report


def run_identity(
    recipe: dict,
    digests: dict[str, str | None],
    device: torch.device,
    batch_size: int,
    hessians_on_host: frozenset[int] = frozenset(),
) -> dict:
    """What decides the output's bytes, by name: options, choices of the run, digests of model and tokens."""
    return {
        **{name: recipe[name] for name in names_deciding(BYTES)},
        "batch_size": batch_size,
        "device": device.type,
        "forward": described(device),
        # By in_features. Empty on a CPU, where Hessians are in host memory anyway.
        "hessians_on_host": sorted(hessians_on_host),
        "save_mask": recipe["save_mask"] is not None,
        **digests,
    }


def input_digests(
    loaded: MetaModel | Checkpoint, token_ids: Tensor | None, evaluation: EvaluationSet | None
) -> dict[str, str | None]:
    """Digests of model and tokens, by their names in the journal. Call it before anything is pruned."""
    return {
        "model": _model_digest(loaded),
        "calibration": None if token_ids is None else digest(token_ids),
        "evaluation": None if evaluation is None else digest(evaluation.windows),
    }


def finished_run(folder: Path, recipe: dict) -> Report | None:
    """The report of the finished run of the same recipe in `folder`; None if there is none to read."""
    if StreamedOutput.is_under_way(folder):
        return None
    try:
        report = Report.from_json((folder / saving.REPORT).read_text(encoding="utf-8"))
        return report if _same_options(report.recipe, recipe) else None
    except (OSError, ValueError, TypeError, AttributeError):  # absent, torn, or another program's file
        return None


def nothing_to_do(finished: Report, report: Report) -> bool:
    """Whether the finished run had the input of `report`, and measured and wrote all that was requested.

    Raises: `ResumeError` if it had other input and may not be overwritten.
    """
    folder, mask = report.recipe["save_model"], report.recipe["save_mask"]
    changed = differences(finished.digests, report.digests)
    if changed and not report.recipe["overwrite"]:
        raise ResumeError(
            f"{folder} holds a finished run of other input ({'; '.join(changed)}): name another folder, or "
            f"pass --overwrite"
        )
    return not changed and finished.complete and (mask is None or Path(mask).is_file())


def _same_options(before: dict, now: dict) -> bool:
    """Whether two recipes, the first of them read from JSON, request the same of the same model."""
    names = names_deciding(BYTES, RESULTS)
    return all(before.get(name) == json.loads(json.dumps(now[name], default=str)) for name in names)


def outside_digest(source: StreamedModel) -> str:
    """Digest of configuration and tensors outside of the blocks; each finished block has a digest of its own.

    A shard that was repaired where no block is finished leaves it as it is.
    """
    return _model_digest(source.meta_model, source.copied)


def _model_digest(loaded: MetaModel | Checkpoint, names: list[str] | None = None) -> str:
    """Of configuration and tensors, independent of the folder.

    Args:
        names: of the tensors; None: all.
    """
    config = loaded.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    tensors = loaded.files.digest(names) if isinstance(loaded, MetaModel) else _sampled(loaded.model)
    described = json.dumps(config, sort_keys=True, default=str) + tensors
    return hashlib.sha256(described.encode()).hexdigest()


def _sampled(model: nn.Module) -> str:
    """`TensorFiles.digest` of a model in memory. Widening to fp32 for the computation does not change it."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {list(tensor.shape)}".encode())
        values = tensor.flatten()
        last = max(0, len(values) - SAMPLE)
        for place in range(SAMPLES):
            begin = last * place // (SAMPLES - 1)
            found.update(values[begin : begin + SAMPLE].double().cpu().numpy().tobytes())
    return found.hexdigest()
