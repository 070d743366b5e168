"""A model in memory before the work: out of its wrappers, not compiled, whole, and fit to be saved."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from wanda_fast.checkpoint.packed.format import METHOD
from wanda_fast.errors import AdapterError, LiveModelError, OutputError, QuantizedModelError
from wanda_fast.model.block_lists import is_of_transformers
from wanda_fast.options.all_options import Options

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# The module inside the one that torch.compile returns.
COMPILED = "_orig_mod"
# Quantised weights that transformers has converted to floating point as it loaded them.
DEQUANTIZED = ("gguf",)
ADAPTER_NAME = re.compile(r"(\.|^)(base_layer|ia3_l|lora_\w+)\.")


@contextmanager
def plain_model(options: Options) -> Iterator[Options]:
    """The options, their live model out of its wrappers and not compiled. It is compiled again at the end.

    Raises: `LiveModelError` if the model is not whole; `AdapterError`; `QuantizedModelError`; `OutputError`
        if it could not be saved.
    """
    if not isinstance(options.model, nn.Module):
        yield options
        return
    model = _unwrapped(options.model)
    require_plain(model, is_pixels(options.dataset))
    if options.save_model is not None:
        _require_savable(model)
    with _uncompiled(model):
        yield replace(options, model=model)


def require_plain(model: nn.Module, takes_pixels: bool = False) -> None:
    """Raise an error unless `model` is whole, in floating point, and can be run.

    Args:
        takes_pixels: the caller has pixel values, which any module may take; else it must be a model of
            transformers.
    """
    if not takes_pixels and not is_of_transformers(model):
        raise LiveModelError(
            f"{type(model).__name__} is not a transformers model, because it has no config of transformers: "
            f"pass the transformers model that is in it"
        )
    _refuse_adapters(model)
    _refuse_quantized(model)
    _refuse_absent(model)


def is_pixels(dataset: object) -> bool:
    """Whether data from Python are the pixel values of images, `[n, 3, height, width]`."""
    return len(getattr(dataset, "shape", ())) == 4


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif COMPILED in model._modules:
            model = model._modules[COMPILED]
        else:
            return model


def _refuse_adapters(model: nn.Module) -> None:
    names = (name for name, _ in model.named_parameters() if ADAPTER_NAME.search(name))
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        found = next(names, "its peft_config")
    elif (found := next(names, None)) is None:
        return
    raise AdapterError(
        f"{type(model).__name__} has an adapter that is not merged into its weights ({found}): merge the "
        f"adapter first (model = peft_model.merge_and_unload()), and pass the result"
    )


def _refuse_quantized(model: nn.Module) -> None:
    about = getattr(getattr(model, "config", None), "quantization_config", None)
    method = about.get("quant_method") if isinstance(about, dict) else getattr(about, "quant_method", about)
    method = getattr(method, "value", method)
    if method == METHOD:
        raise QuantizedModelError(
            f"{type(model).__name__} has packed weights: model.dequantize() makes them dense; call it first"
        )
    if about is None or method in DEQUANTIZED:
        method = None
    named = ((name, tensor) for name, tensor in model.named_parameters())
    small = next((f"{name} is {t.dtype}" for name, t in named if _is_quantized(t)), None)
    if method is not None or small is not None:
        why = ", ".join(filter(None, (method and f"quant_method {method}", small)))
        raise QuantizedModelError(
            f"{type(model).__name__} has quantised weights ({why}): prune the model in 16 bits, and quantise "
            f"the pruned model"
        )


def _is_quantized(weight: Tensor) -> bool:
    return not weight.is_floating_point() or weight.element_size() < 2


def _refuse_absent(model: nn.Module) -> None:
    """Parameters that device_map, accelerate or a sharding library keep elsewhere."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not tensors:
        raise LiveModelError(f"{type(model).__name__} has no weights")
    if on_meta := [name for name, tensor in tensors if tensor.is_meta]:
        raise LiveModelError(
            f"{len(on_meta)} of {len(tensors)} tensors of {type(model).__name__} are on the meta device, "
            f"e.g. {on_meta[0]}, since device_map or accelerate keeps them elsewhere: load it without them, "
            f"or pass the checkpoint's folder, which is pruned block by block"
        )
    # DeepSpeed leaves empty parameters on each rank; torch's FSDP and tensor parallelism make DTensors.
    for name, tensor in model.named_parameters():
        if hasattr(tensor, "ds_id") or type(tensor.data) not in (Tensor, nn.Parameter):
            kind = "a shard of DeepSpeed" if hasattr(tensor, "ds_id") else f"a {type(tensor.data).__name__}"
            raise LiveModelError(
                f"{name} of {type(model).__name__} is {kind}, not a whole tensor: save the model, and pass "
                f"the checkpoint's folder"
            )


def _require_savable(model: nn.Module) -> None:
    """Raise `OutputError` if transformers refuses to write the model's configurations."""
    if not hasattr(model, "save_pretrained"):
        raise OutputError(
            f"{type(model).__name__} has no save_pretrained, so that save_model cannot write it: leave out "
            f"save_model"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
        raise OutputError(
            f"{type(model).__name__} was converted from another format, and transformers refuses to save it: "
            f"pass the path of its file instead"
        )
    for name in ("config", "generation_config"):
        configuration = getattr(model, name, None)
        try:
            with tempfile.TemporaryDirectory() as folder:
                if configuration is not None:
                    configuration.save_pretrained(folder)
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise OutputError(
                f"{type(model).__name__} cannot be saved, because transformers refuses its {name}: {reason}"
            ) from error


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Context in which no part of the model is compiled: blocks run with other forwards, and with hooks."""
    if not any(_is_compiled(module) for module in model.modules()):
        yield
        return
    parts = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    parts = [part for part in parts if part[2] is not None and COMPILED in part[2]._modules]
    for parent, name, child in parts:
        parent._modules[name] = _unwrapped(child)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parent, name, child in parts:
            parent._modules[name] = child


def _is_compiled(module: nn.Module) -> bool:
    compiled_forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    return COMPILED in module._modules or module._compiled_call_impl is not None or compiled_forward
