"""The class that a checkpoint is opened as: the one that its configuration names.

`AutoModelForCausalLM` would open a reward model without its score head, and a model of text and images
without the images' part.
"""

from torch import nn

from wanda_fast.errors import CheckpointError

CAUSAL_LMS = ("ForCausalLM", "LMHeadModel")


def model_class(path: str, config) -> type:
    """The transformers class that `architectures` names.

    If the configuration names none, it is `AutoModelForImageClassification` for an image model's, as timm's
    are, and else `AutoModelForCausalLM`. So it is for a causal LM that transformers has under another name.

    Raises: `CheckpointError` if the class cannot be opened and pruned.
    """
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), None)
    if named is None:
        return _auto_class(config)
    found = getattr(transformers, named, None)
    known = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if not known and named.endswith(CAUSAL_LMS):
        return transformers.AutoModelForCausalLM
    if not known:
        raise CheckpointError(
            f"model {path} is a {named}, a class that transformers {transformers.__version__} does not have"
        )
    if getattr(config, "is_encoder_decoder", False) and not named.endswith(CAUSAL_LMS):
        raise CheckpointError(
            f"model {path} is a {named}, an encoder and a decoder: only models with one chain "
            f"of blocks are pruned"
        )
    # A causal LM of a configuration with another model_type: transformers opens it by that type.
    if found.config_class is not None and not isinstance(config, found.config_class):
        return transformers.AutoModelForCausalLM
    return found


def _auto_class(config) -> type:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as IMAGE

    if config.model_type in IMAGE:
        return transformers.AutoModelForImageClassification
    return transformers.AutoModelForCausalLM


def new_model(path: str, config, dtype) -> nn.Module:
    """The model of a configuration, with initial weights. Raises: `CheckpointError` as `model_class`."""
    import transformers

    kind = model_class(path, config)
    if kind in (transformers.AutoModelForCausalLM, transformers.AutoModelForImageClassification):
        return kind.from_config(config, dtype=dtype, trust_remote_code=False)
    return kind._from_config(config, dtype=dtype)


def predicts_tokens(model: nn.Module) -> bool:
    """Whether a perplexity can be measured: a reward model or an embedding model has no such head."""
    causal = getattr(model, "can_generate", None)
    return causal is None or bool(causal())
