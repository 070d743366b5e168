"""Packed folders, written straight from the format's description."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


def prune_(model, sparsity=0.5, uneven=(), seed=0):
    """Zero weights of a model's blocks, at random: the same number in each row, except in weights named
    in `uneven`."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "layers." not in name:
            continue
        scores = torch.rand(weight.shape, generator=generator)
        ranks = scores.argsort(-1).argsort(-1)
        chosen = ranks < int(sparsity * weight.shape[-1])
        if any(part in name for part in uneven):
            chosen = scores < sparsity
        weight.data[chosen] = 0
    return model


def parts(name, weight):
    """The tensors of a packed weight: bits, values and, if rows have different counts, offsets."""
    kept = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32).ne(0)
    counts = kept.sum(-1).flatten()
    bits = np.packbits(kept.numpy(), axis=-1, bitorder="little")
    found = {"bits": torch.from_numpy(bits), "values": weight[kept]}
    if len(set(counts.tolist())) == 1:
        found["values"] = found["values"].view(*weight.shape[:-1], -1)
    else:
        found["offsets"] = torch.tensor([0, *counts.cumsum(0).tolist()])
    return {f"{name}.{part}": tensor for part, tensor in found.items()}


def pack(folder, out):
    """Pack each weight of a saved model that has zeros. Returns the configuration's entries."""
    folder, out, weights = Path(folder), Path(out), {}
    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            if tensor.dim() >= 2 and tensor.eq(0).float().mean() > 0.1:
                tensors |= (packed := parts(name, tensor))
                weights[name] = {
                    "shape": list(tensor.shape),
                    "values": list(packed[f"{name}.values"].shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
            else:
                tensors[name] = tensor
        save_file(tensors, out / file.name.replace("model", "packed"), metadata={"format": "pt"})
        file.unlink()
    if sharded := (index := out / "model.safetensors.index.json").exists():
        index.unlink()
        files = {name: file.name for file in out.glob("packed-*") for name in load_file(file)}
        (out / "packed.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    about = {"quant_method": "wanda_packed", "version": 1, "sharded": sharded, "weights": weights}
    configure(out, about)
    return weights


def configure(folder, about):
    """Replace the quantisation part of a folder's config.json."""
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": about}))
