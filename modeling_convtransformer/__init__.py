"""ConvTransformer v2: temporal action localization for transformers."""

from transformers import AutoConfig, AutoFeatureExtractor, AutoProcessor
from transformers.utils import is_torch_available

from .configuration_convtransformer import ConvTransformerConfig
from .feature_extraction_convtransformer import ConvTransformerFeatureExtractor
from .processing_convtransformer import ConvTransformerProcessor

__version__ = "0.1.0"
__all__ = ["ConvTransformerConfig", "ConvTransformerFeatureExtractor", "ConvTransformerProcessor"]

AutoConfig.register("convtransformer", ConvTransformerConfig)
AutoFeatureExtractor.register(ConvTransformerConfig, ConvTransformerFeatureExtractor)
# Saving copies the code: people who have only transformers load it with trust_remote_code=True.
ConvTransformerConfig.register_for_auto_class()
ConvTransformerFeatureExtractor.register_for_auto_class()
ConvTransformerProcessor.register_for_auto_class()


class _ConfigWithTokenizer(ConvTransformerConfig):
    """AutoProcessor finds the processor by its name, in checkpoints that name one; for others it stays the feature extractor."""


AutoProcessor.register(_ConfigWithTokenizer, ConvTransformerProcessor)

if is_torch_available():  # an exported model needs the feature extractor alone
    from transformers import AutoBackbone, AutoModel, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection
    from transformers.pipelines import PIPELINE_REGISTRY

    from . import modeling_convtransformer
    from .modeling_convtransformer import *  # noqa: F403
    from .pipeline_convtransformer import MomentRetrievalPipeline, TemporalActionLocalizationPipeline
    from .streaming import ConvTransformerStream

    for auto_class, model_class in (
        (AutoModel, modeling_convtransformer.ConvTransformerModel),
        (AutoBackbone, modeling_convtransformer.ConvTransformerBackbone),
        (AutoModelForObjectDetection, modeling_convtransformer.ConvTransformerForTemporalActionLocalization),
        (AutoModelForZeroShotObjectDetection, modeling_convtransformer.ConvTransformerForMomentRetrieval),
    ):
        auto_class.register(ConvTransformerConfig, model_class)
        model_class.register_for_auto_class(auto_class.__name__)
    PIPELINE_REGISTRY.register_pipeline(
        "temporal-action-localization",
        pipeline_class=TemporalActionLocalizationPipeline,
        pt_model=AutoModelForObjectDetection,
    )
    PIPELINE_REGISTRY.register_pipeline(
        "moment-retrieval", pipeline_class=MomentRetrievalPipeline, pt_model=AutoModelForZeroShotObjectDetection
    )
    __all__ += [*modeling_convtransformer.__all__, "ConvTransformerStream"]
    __all__ += ["MomentRetrievalPipeline", "TemporalActionLocalizationPipeline"]
