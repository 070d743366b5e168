"""Windows of published tables of perplexity: figures compare only if they were measured on equal windows."""

from wanda_fast.data.evaluation import EvaluationSet

# The published code for Wanda takes the model's context: 2048 for LLaMA, 4096 for LLaMA-2. Newer models'
# contexts are far longer than the windows of any table.
LONGEST = 8192
PROTOCOLS = ("wanda", "2048", "4096", str(LONGEST))
# By the window: perplexities of dense models on all of WikiText-2's test text.
PUBLISHED = {
    2048: "LLaMA-2-7B 5.47, LLaMA-3-8B 6.14",
    4096: "LLaMA-2-7B 5.12, LLaMA-3-8B 5.75",
    LONGEST: "LLaMA-3-8B 5.54",
}


def window_of(protocol: str, context: int) -> int:
    """Tokens in a window of one of PROTOCOLS, for a model with this context."""
    return min(context, LONGEST) if protocol == "wanda" else int(protocol)


def comparable_with(evaluation: EvaluationSet) -> str:
    """The published tables that the perplexity can be compared with, or why there are none."""
    seqlen = evaluation.windows.shape[1]
    reasons = {
        f"text {evaluation.label}": evaluation.label != "wikitext2 test",
        f"the first {len(evaluation.windows)} windows only": evaluation.is_limited,
        "windows begin with BOS": evaluation.bos,
        f"windows of {seqlen}": seqlen not in PUBLISHED,
    }
    if any(reasons.values()):
        return f"no published table ({', '.join(name for name, holds in reasons.items() if holds)})"
    return f"tables on WikiText-2 with windows of {seqlen} (dense {PUBLISHED[seqlen]})"
