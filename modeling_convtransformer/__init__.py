"""ConvTransformer v2: temporal action localization for transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

from .configuration_convtransformer import ConvTransformerConfig
from .modeling_convtransformer import (
    ConvTransformerForTemporalActionLocalization,
    ConvTransformerModel,
    ConvTransformerModelOutput,
    ConvTransformerPreTrainedModel,
    ConvTransformerTemporalActionLocalizationOutput,
)

__version__ = "0.1.0"

AutoConfig.register("convtransformer", ConvTransformerConfig)
AutoModel.register(ConvTransformerConfig, ConvTransformerModel)
AutoModelForObjectDetection.register(ConvTransformerConfig, ConvTransformerForTemporalActionLocalization)

__all__ = [
    "ConvTransformerConfig",
    "ConvTransformerForTemporalActionLocalization",
    "ConvTransformerModel",
    "ConvTransformerModelOutput",
    "ConvTransformerPreTrainedModel",
    "ConvTransformerTemporalActionLocalizationOutput",
]
