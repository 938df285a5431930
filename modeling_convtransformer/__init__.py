"""ConvTransformer v2: temporal action localization for transformers."""

from transformers import AutoConfig, AutoFeatureExtractor
from transformers.utils import is_torch_available

from .configuration_convtransformer import ConvTransformerConfig
from .feature_extraction_convtransformer import ConvTransformerFeatureExtractor

__version__ = "0.1.0"
__all__ = ["ConvTransformerConfig", "ConvTransformerFeatureExtractor"]

AutoConfig.register("convtransformer", ConvTransformerConfig)
AutoFeatureExtractor.register(ConvTransformerConfig, ConvTransformerFeatureExtractor)
# Saving copies the code: people who have only transformers load it with trust_remote_code=True.
ConvTransformerConfig.register_for_auto_class()
ConvTransformerFeatureExtractor.register_for_auto_class()

if is_torch_available():  # an exported model needs the feature extractor alone
    from transformers import AutoBackbone, AutoModel, AutoModelForObjectDetection
    from transformers.pipelines import PIPELINE_REGISTRY

    from . import modeling_convtransformer
    from .modeling_convtransformer import *  # noqa: F403
    from .pipeline_convtransformer import TemporalActionLocalizationPipeline

    for auto_class, model_class in (
        (AutoModel, modeling_convtransformer.ConvTransformerModel),
        (AutoBackbone, modeling_convtransformer.ConvTransformerBackbone),
        (AutoModelForObjectDetection, modeling_convtransformer.ConvTransformerForTemporalActionLocalization),
    ):
        auto_class.register(ConvTransformerConfig, model_class)
        model_class.register_for_auto_class(auto_class.__name__)
    PIPELINE_REGISTRY.register_pipeline(
        "temporal-action-localization",
        pipeline_class=TemporalActionLocalizationPipeline,
        pt_model=AutoModelForObjectDetection,
    )
    __all__ += [*modeling_convtransformer.__all__, "TemporalActionLocalizationPipeline"]
