"""Reports for the tests of pages: of real runs on tiny models, and made up for what these do not have."""

import json
import random

import wanda_fast
from tests.tiny_models import FAMILIES, token_ids
from wanda_fast.options.all_options import Options
from wanda_fast.report.contents import LinearReport, RankReport, Report

# Markup, quotes, a template's braces, the end of a script, other alphabets, a line separator of JavaScript.
NASTY = "</script><script>alert(\"x\")</script> & <b title='y'>{{ 7 * 7 }}</b> <!-- übung 模型 \u2028"

NODES = ("node0", "node1")


def content_of(report: Report) -> dict:
    return json.loads(report.to_json())


def of_experts() -> dict:
    """Of a run on a tiny model with experts, its error measured."""
    model = FAMILIES["qwen3_moe"]()
    ids = token_ids(model, 4, 32)
    return content_of(wanda_fast.prune(model, dataset=ids, measure_error=True, eval_dataset=ids, seqlen=32))


def full(blocks: int = 6, experts: int = 3, seed: int = 0) -> dict:
    """With every field that a report can have, and those that later versions add; nothing is measured."""
    draw = random.Random(seed)
    kinds = ["self_attn.q_proj", "mlp.gate_proj", *(f"mlp.experts.{at}.up_proj" for at in range(experts))]
    linears = {
        f"model.layers.{block}.{kind}": LinearReport(
            sparsity=round(draw.uniform(0.4, 0.6), 4),
            weights=4096,
            seconds=draw.uniform(1e-4, 1e-2),
            operation="prune_rows_",
            backend="cpu",
            statistic="add_sq_norm_",
            statistic_backend="cpu",
            error=draw.uniform(1, 1e5),
            relative_error=draw.uniform(0, 0.1),
            tokens=draw.randrange(2000) if "experts" in kind else None,
            fallback="magnitude" if draw.random() < 0.1 else None,
        )
        for block in range(blocks)
        for kind in kinds
    }
    recipe = Options(model="org/tiny", dataset="c4", eval_dataset="wikitext2", sparsity_ratio=0.5).recipe()
    tasks = {"arc_easy": (0.54, 0.41), "piqa": (0.68, 0.60)}
    report = Report(
        recipe,
        linears,
        perplexity={
            "protocol": "wikitext2, 4 windows",
            "dense": 12.5,
            "pruned": 20.0,
            "kl": 0.31,
            "flips": 0.2,
        },
        zero_shot={task: _task(*found) for task, found in tasks.items()},
        seconds={"load": 3.5, "dense pass": 20.0, "selection": 1.5},
        resources={"batch_size": 4, "activations": "host", "why": "the first with room"},
        predicted_memory={"host": 2**28, "cuda:0": 2**31},
        peak_memory={"host": 2**30, "cuda:0": 2**31},
        warnings=["2 experts saw few tokens"],
        digests={"model": "ab" * 32, "calibration": None},
        ranks=[
            RankReport(f"node{at}", {"load": 3.0, "collectives": 1.0}, {"host": 2**30}, 0) for at in (0, 1)
        ],
        complete=True,
    )
    errors = {f"model.layers.{block}": 0.01 * (block + 1) for block in range(blocks)}
    return content_of(report) | {"block_output_error": errors}


def _task(dense: float, pruned: float) -> dict:
    return {which: {"acc": acc, "acc_stderr": 0.01} for which, acc in (("dense", dense), ("pruned", pruned))}
