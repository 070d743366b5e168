"""The published Wanda's image classifiers, straight: per-block loops over a live model of transformers.

It shares no code with `wanda_fast`. Source: locuslab/wanda, image_classifiers/prune_utils.py: `prune_vit`,
`prune_deit`, `prune_convnext`, `compute_mask`. There the statistics are of the dense model; `sequential`
runs every block again, pruned, before the next one, as the published code for language models does.
"""

import torch
from torch import nn

LAYERS = {
    "vit": lambda model: [list(layers_of(model.vit))],
    "deit": lambda model: [list(layers_of(model.deit))],
    "beit": lambda model: [list(layers_of(model.beit))],
    "dinov2": lambda model: [list(model.dinov2.encoder.layer)],
    "convnext": lambda model: [list(stage.layers) for stage in model.convnext.encoder.stages],
    "swin": lambda model: [list(stage.blocks) for stage in model.swin.encoder.layers],
    "timm_vit": lambda model: [list(model.blocks)],
    "timm_convnext": lambda model: [list(stage.blocks) for stage in model.stages],
    "timm_swin": lambda model: [list(stage.blocks) for stage in model.layers],
}


def layers_of(body):
    """Where transformers 5.23 has them, and where earlier versions may."""
    return body.layers if hasattr(body, "layers") else body.encoder.layer


@torch.no_grad()
def prune_published(model, kind, images, metric, pattern, granularity="row", sequential=False):
    """Prune in place. Returns masks by name of linear, True where pruned.

    One forward of the whole model for each block, up to the block's own: nothing is cached or recorded.
    """
    names, masks = {module: name for name, module in model.named_modules()}, {}
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for block in [block for stage in LAYERS[kind](model) for block in stage]:
        linears = [module for module in block.modules() if is_matrix(module)]
        squares = squares_of_inputs(model, linears, images, None if sequential else dense)
        for linear in linears:
            weight = linear.weight.flatten(1)
            scores = weight.abs()
            if metric == "wanda":
                scores = scores * squares[linear].sqrt()
            mask = compute_mask(scores, pattern, granularity)
            weight[mask] = 0
            masks[names[linear]] = mask
    return masks


def squares_of_inputs(model, linears, images, dense):
    """By linear, the sum of x_j^2 over images and positions; in a forward with weights `dense`, if given."""
    squares = {linear: torch.zeros(linear.weight.shape[1]) for linear in linears}

    def add(linear, args, _output):
        x = args[0].movedim(1, -1) if isinstance(linear, nn.Conv2d) else args[0]
        squares[linear] += x.reshape(-1, x.shape[-1]).square().sum(dim=0)

    handles = [linear.register_forward_hook(add) for linear in linears]
    now = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if dense is not None:
        model.load_state_dict(dense)
    model(images)
    model.load_state_dict(now)
    for handle in handles:
        handle.remove()
    return squares


def is_matrix(module):
    """`nn.Linear`, or a 1x1 convolution, which the published models have as `nn.Linear`."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def compute_mask(scores, pattern, granularity):
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        groups = scores.reshape(-1, m)
        lowest = groups.sort(dim=1, stable=True).indices[:, : m - n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True).view_as(scores)
    if granularity == "layer":
        return scores <= scores.flatten().sort().values[int(scores.numel() * float(pattern))]
    lowest = scores.sort(dim=1, stable=True).indices[:, : int(scores.shape[1] * float(pattern))]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
