"""The command line's flags: their types, and their help."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="Hub id, folder or .gguf file of a causal LM.")]
CacheDir = Annotated[str | None, typer.Option(help="For hub downloads. Default: Hugging Face's own cache.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, float16 or bfloat16.")]
EvalDataset = Annotated[
    str,
    typer.Option(
        help="Text for perplexity: wikitext2, ptb, c4, pydoc (its last fifth), a local file, or none. "
        "auto: wikitext2 for hub datasets, else the same as --dataset."
    ),
]
EvalWindows = Annotated[
    int | None, typer.Option(min=1, help="Measure perplexity on at most so many windows.")
]
Seqlen = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens a window. Default: 2048, or the model's context where shorter."),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="A .py file or module that registers methods or patterns; repeatable."),
]
EvalZeroShot = Annotated[
    bool,
    typer.Option("--eval-zero-shot", help="Zero-shot tasks by lm-evaluation-harness (the eval extra)."),
]
ModelArgument = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file of a causal LM.")]

# of prune alone
Seed = Annotated[int, typer.Option(help="Seed of the calibration windows.")]
Nsamples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
SparsityRatio = Annotated[
    float | None, typer.Option(help="Fraction to prune, in [0, 1). Default: 0.5, or 1 - N/M for N:M.")
]
SparsityType = Annotated[
    str, typer.Option(help="unstructured, N:M (N kept of every M inputs), or a registered pattern.")
]
PruneMethod = Annotated[
    str,
    typer.Option(
        help="magnitude, wanda, connect (or wanda_connect), gated, sparsegpt, dense, ablate_mag_seq, "
        "ablate_wanda_seq, ablate_mag_iter, ablate_wanda_iter, or a registered method."
    ),
]
UseVariant = Annotated[
    bool, typer.Option("--use-variant", help="The Wanda variant's threshold (unstructured only).")
]
Save = Annotated[
    Path | None, typer.Option(help="Folder for log_METHOD.txt (the published line) and wanda_fast.json.")
]
SaveModel = Annotated[
    Path | None, typer.Option(help="Folder for the pruned model, which from_pretrained loads.")
]
SaveLog = Annotated[Path | None, typer.Option(help="File for the results.")]
SaveMask = Annotated[
    Path | None, typer.Option(help="File for the packed masks (safetensors), for apply-mask and verify.")
]
Dataset = Annotated[
    str,
    typer.Option(
        help="Calibration text: wikitext2, c4, ptb, pydoc (the standard library's help, no download), "
        "or a .txt, .jsonl or .parquet file or folder."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Sequences a forward. Default: about 4096 (CPU) or 16384 (GPU) tokens, if they fit."
    ),
]
Sequential = Annotated[
    str,
    typer.Option(help="block, as published, or linear: one pass, each linear sees its pruned forerunners."),
]
Activations = Annotated[
    str,
    typer.Option(help="Where hidden states lie: device, host, disk, or auto, the first that has room."),
]
ConnectGate = Annotated[str, typer.Option(help="connect's gate: activated (as the published code) or raw.")]
Update = Annotated[
    str,
    typer.Option(help="obs: update what a method keeps for what it prunes, as sparsegpt does; or none."),
]
Dampening = Annotated[
    float, typer.Option(help="Share of a Hessian's mean diagonal that is added before it is factored.")
]
HessianDevice = Annotated[
    str,
    typer.Option(help="Where Hessians are: device, host, or auto: host for those too wide for a GPU."),
]
MeasureError = Annotated[
    bool | None,
    typer.Option(
        "--measure-error/--no-measure-error",
        help="Print each linear's ||(W - W')X||^2. Default: with sparsegpt and --update obs, by block.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Linears to leave dense: a name, a glob, or re:REGEX; repeatable."),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Allow folders to save to that are not empty, and files that exist."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run of the same --save-model folder.")
]
