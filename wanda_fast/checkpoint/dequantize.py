"""`--dequantize`: quantised checkpoints whose weights transformers turns into 16 bits."""

from wanda_fast.errors import QuantizedModelError

# Formats that transformers dequantises without other packages.
METHODS = ("fp8", "mxfp4")


def dequantizing(path: str, config) -> object | None:
    """transformers' quantizer for a configuration, which is told to dequantise; None if it names no format.

    Raises: `QuantizedModelError` if transformers cannot dequantise the format here.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    holder = _holder(config)
    if holder is None:
        return None
    about = holder.quantization_config = dict(holder.quantization_config) | {"dequantize": True}
    try:
        quantizer = AutoHfQuantizer.from_config(about, pre_quantized=True)
        quantizer.validate_environment()
    except (ImportError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise QuantizedModelError(
            f"model {path} has quantised weights ({about.get('quant_method')}), which transformers cannot "
            f"dequantise here: {error}"
        ) from error
    return quantizer


def forget_quantization(config) -> None:
    """Remove the format from a configuration, whose model then has plain weights."""
    if holder := _holder(config):
        del holder.quantization_config


def _holder(config):
    """The configuration, or the language model's part of it, that names a format of quantised weights."""
    parts = (config, config.get_text_config())
    return next((part for part in parts if getattr(part, "quantization_config", None)), None)
