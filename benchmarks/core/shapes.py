"""The linears that are measured: `[out, in]` of four Llamas on a GPU, the smaller of them on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    intermediate: int
    key_value: int  # out_features of k_proj and v_proj

    def linears(self) -> dict[str, tuple[int, int]]:
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.key_value, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


MODELS = (
    Model("Llama-2-7B", 4096, 11008, 4096),
    Model("Llama-3-8B", 4096, 14336, 1024),
    Model("Llama-3-70B", 8192, 28672, 1024),
    Model("Llama-3.2-1B", 2048, 8192, 512),
)
SMOLLM2 = Model("SmolLM2-135M", 576, 1536, 192)  # for operations whose published code is slow

EXTREMES = {  # the shortest and the longest rows
    (1536, 576): "SmolLM2-135M up_proj",
    (1024, 53248): "Llama-3.1-405B down_proj, 1024 of its rows",
}
HEADLINE = {
    "cuda": ((4096, 4096), (4096, 11008)),
    "cpu": ((1024, 4096),),
}  # in all dtypes, and in the last table of a run
CPU_SHAPES = ((1024, 4096), (512, 2048), (2048, 8192))  # the published code takes seconds on larger ones
# the first also in Triton's interpreter, where 16x64 takes six times as long
QUICK_SHAPES = ((2, 32), (24, 96))
EXPERTS, QUICK_EXPERTS = (128, 768, 2048), (3, 16, 64)  # gate_proj of a block of Qwen3-30B-A3B
TOKENS = {"cuda": (2048, 16384), "cpu": (2048,)}  # of one call to a statistic


def names() -> dict[tuple[int, int], str]:
    """Each distinct shape with the first model and linear that has it."""
    found = {}
    for model in MODELS:
        for linear, shape in model.linears().items():
            found.setdefault(shape, f"{model.name} {linear}")
    return found | EXTREMES


def weights(device: str, quick: bool) -> list[tuple[int, int]]:
    """Shapes for the selections, the headline first."""
    if quick:
        return list(QUICK_SHAPES)
    shapes = list(names()) if device == "cuda" else list(CPU_SHAPES)
    return sorted(shapes, key=lambda shape: shape not in HEADLINE[device])


def widths(device: str, quick: bool) -> list[int]:
    """in_features for the column sums."""
    return list(dict.fromkeys(shape[1] for shape in weights(device, quick)))


def gated(device: str, quick: bool) -> list[tuple[int, int]]:
    """Shapes of up_proj, for the co-activation."""
    if quick:
        return list(QUICK_SHAPES)
    shapes = [model.linears()["up_proj"] for model in MODELS]
    return shapes if device == "cuda" else shapes[-1:]


def is_headline(shape: tuple[int, int], device: str, quick: bool) -> bool:
    return shape == QUICK_SHAPES[0] if quick else shape in HEADLINE[device]
