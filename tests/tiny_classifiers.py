"""Tiny image classifiers of transformers, with the same random weights in every run, and random images."""

import torch
import transformers as hf

CLASSES, SIDE = 10, 16
SIZES = dict(image_size=SIDE, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(num_labels=CLASSES, initializer_range=0.2)
VIT = SIZES | dict(intermediate_size=72)
STAGES = dict(image_size=SIDE, patch_size=2, num_labels=CLASSES, initializer_range=0.2)
KINDS = {
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)),
    "deit": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**VIT)),
    "beit": lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT, use_relative_position_bias=True)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(**STAGES, num_stages=3, depths=[1, 2, 1], hidden_sizes=[16, 24, 32])
    ),
    "swin": lambda: hf.SwinForImageClassification(
        hf.SwinConfig(**STAGES, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2)
    ),
}  # fmt: skip


def build(kind, seed=0):
    """float32, in eval mode; biases, norms and layer scales are drawn too, so that an error there shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    # ConvNeXt's layer scale begins at 1e-6, which would hide the blocks from each other.
                    parameter.add_(0.2 + 0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def images(count, side=SIDE, seed=1):
    """Pixel values [count, 3, side, side]."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
