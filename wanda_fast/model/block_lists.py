"""Finds a model's repeated blocks: elements of one list, or of one for each stage of an image classifier."""

from torch import nn

from wanda_fast.errors import NoPrunableBlockError
from wanda_fast.model.find_experts import find_experts
from wanda_fast.model.linears import is_linear

LISTS = (nn.ModuleList, nn.Sequential)


def is_of_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "get_text_config")


def classifies_images(model: nn.Module) -> bool:
    """Whether a model takes images: an image classifier of transformers, or a module of another library."""
    named = any("ForImageClassification" in kind.__name__ for kind in type(model).__mro__)
    return named or not is_of_transformers(model)


def block_chains(model: nn.Module) -> list[list[str]]:
    """Names of the model's blocks in their order; those of a chain follow each other directly.

    The blocks are the elements of the list with the most weights. For a model of text that is an
    `nn.ModuleList`; if transformers says which part is the language model, one in that part. For an image
    classifier it can be an `nn.Sequential`, a list of stages gives way to the lists in its stages, and
    elements without prunable weights, such as a downsampling, are no blocks.

    Raises: `NoPrunableBlockError` if there is none.
    """
    if classifies_images(model) and (lists := _repeated(model)):
        best = _heaviest(lists)
        paths = _in_stages(best, model.get_submodule(best))
        return [chain for path in paths for chain in _without_gaps(path, model.get_submodule(path))]
    lists = {
        name: prunable_weights(each)
        for name, each in model.named_modules()
        if isinstance(each, nn.ModuleList) and len(each)
    }
    # An image encoder can hold more weight than the language model.
    language = _language_modules(model)
    decoding = {
        name: weights for name, weights in lists.items() if weights and model.get_submodule(name) in language
    }
    best = _heaviest(decoding or lists)
    if best is None or not lists[best]:
        owners = {type(owner).__name__ for owner in model.modules() if list(owner.parameters(recurse=False))}
        raise NoPrunableBlockError(
            f"{type(model).__name__} has no repeated block with prunable weights; "
            f"its weights are in {', '.join(sorted(owners))}"
        )
    return [[f"{best}.{index}" for index in model.get_submodule(best)._modules]]


def prunable_weights(module: nn.Module) -> int:
    stacks = [stack for each in find_experts(module) for stack in (each.first.stack, each.down.stack)]
    weights = [child.weight for child in module.modules() if is_linear(child)]
    return sum(weight.numel() for weight in [*weights, *stacks])


def _heaviest(lists: dict[str, int]) -> str | None:
    # An outer list has at least the weights of its inner lists. It comes first, so it wins a tie.
    return max(lists, key=lists.get, default=None)


def _language_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the language model, if transformers says which part that is; otherwise all modules."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return set((decoder if isinstance(decoder, nn.Module) else model).modules())


def _repeated(root: nn.Module) -> dict[str, int]:
    """The weights of each list whose elements with weights are of one class, and no linears themselves."""
    found = {}
    for name, each in root.named_modules():
        if isinstance(each, LISTS) and not any(is_linear(element) for element in each):
            weights = {element: prunable_weights(element) for element in each}
            if len({type(element) for element in each if weights[element]}) == 1:
                found[name] = sum(weights.values())
    return found


def _in_stages(name: str, stages: nn.Module) -> list[str]:
    """The list in each of these stages that has most of its weights; the list itself if it is of blocks."""
    found = []
    for index, stage in stages.named_children():
        lists = _repeated(stage)
        inner = _heaviest(lists)
        if weights := prunable_weights(stage):
            if inner is None or 2 * lists[inner] <= weights:
                return [name]
            found.append(".".join(filter(None, (name, index, inner))))
    return found


def _without_gaps(path: str, elements: nn.Module) -> list[list[str]]:
    """The names of the elements with prunable weights, in one chain as long as no other stands between."""
    chains: list[list[str]] = [[]]
    for index, element in elements._modules.items():
        if prunable_weights(element):
            chains[-1].append(f"{path}.{index}")
        else:
            chains.append([])
    return [chain for chain in chains if chain]
