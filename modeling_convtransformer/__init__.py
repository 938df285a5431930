"""ConvTransformer v2: temporal action localization for transformers."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForObjectDetection

from .configuration_convtransformer import ConvTransformerConfig
from .feature_extraction_convtransformer import ConvTransformerFeatureExtractor
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
AutoFeatureExtractor.register(ConvTransformerConfig, ConvTransformerFeatureExtractor)

__all__ = [
    "ConvTransformerConfig",
    "ConvTransformerFeatureExtractor",
    "ConvTransformerForTemporalActionLocalization",
    "ConvTransformerModel",
    "ConvTransformerModelOutput",
    "ConvTransformerPreTrainedModel",
    "ConvTransformerTemporalActionLocalizationOutput",
]
