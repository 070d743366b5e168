"""One-shot pruning of transformers: magnitude, Wanda and its variant, CoNNect, gated, SparseGPT; any N:M."""

from wanda_fast import errors
from wanda_fast.api import evaluate, prune, sweep
from wanda_fast.data.perplexity import perplexity
from wanda_fast.inference.registration import register_with_transformers
from wanda_fast.inference.semi_structured import accelerate
from wanda_fast.output.kept_zeros import keep_zeros
from wanda_fast.output.packing import pack, unpack
from wanda_fast.pruning.methods import Method
from wanda_fast.pruning.patterns import Pattern
from wanda_fast.pruning.registry import register_method, register_pattern
from wanda_fast.pruning.statistics import Statistic
from wanda_fast.report.contents import Report
from wanda_fast.report.sweep import Sweep

__all__ = [
    "Method",
    "Pattern",
    "Report",
    "Statistic",
    "Sweep",
    "accelerate",
    "errors",
    "evaluate",
    "keep_zeros",
    "pack",
    "perplexity",
    "prune",
    "register_method",
    "register_pattern",
    "sweep",
    "unpack",
]

register_with_transformers()
