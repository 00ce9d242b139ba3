"""The class of a reward model: the library's sequence classifier or, where it has none for an architecture (Granite,
Cohere, OLMoE), one made here of the library's parts and in its layout."""

from __future__ import annotations

import functools
from typing import Any, cast

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

LANGUAGE_MODEL = "ForCausalLM"
"""How the names of classes end that a classifier can be made from."""


def classifier_class(config: Any) -> Any:
    """What loads a classifier with this configuration: the library's, if it has one, or our own.

    An architecture that has neither, such as one of several parts (text and images, encoder and decoder), gets the
    library's, whose error says so.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForSequenceClassification
    language_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    several = config.get_text_config() is not config or getattr(config, "is_encoder_decoder", False)
    if several or not language_model.__name__.endswith(LANGUAGE_MODEL):
        return AutoModelForSequenceClassification
    return classifier_like(language_model)


@functools.cache
def classifier_like(language_model: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The classifier beside this class: the trunk under the same name, and a bias-free linear head ``score``."""
    parent = next(base for base in language_model.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = f"{language_model.__name__.removesuffix(LANGUAGE_MODEL)}ForSequenceClassification"
    own: dict[str, Any] = {
        "base_model_prefix": language_model.base_model_prefix,
        "config_class": language_model.config_class,  # the parent's may be that of a larger model (Llama 4)
        "__module__": language_model.__module__,
    }
    return cast(type[PreTrainedModel], type(name, (GenericForSequenceClassification, parent), own))


def in_the_library(config: Any) -> bool:
    """Whether the library itself can load a classifier with this configuration."""
    return classifier_class(config) is AutoModelForSequenceClassification
