"""ConvTransformerConfig: every choice of the model as one typed, validated field.

The field names are those that users of ActionFormer's YAML files (v1) and of its successors already write; Hugging
Face's names for the same things work too (`attribute_map`).
"""

import ast
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

if TYPE_CHECKING:
    # Never imported. transformers looks for such lines to find the files that belong to a class: with these, whichever
    # class is saved, all files travel, and what was loaded from the Hub can be published again.
    from .feature_extraction_convtransformer import ConvTransformerFeatureExtractor  # noqa: F401
    from .modeling_convtransformer import ConvTransformerModel  # noqa: F401
    from .pipeline_convtransformer import TemporalActionLocalizationPipeline  # noqa: F401
    from .processing_convtransformer import ConvTransformerProcessor  # noqa: F401

# What a checkpoint says to someone who has only transformers: the classes behind Auto* and the pipeline.
_AUTO_MAP = {
    "AutoConfig": "configuration_convtransformer.ConvTransformerConfig",
    "AutoFeatureExtractor": "feature_extraction_convtransformer.ConvTransformerFeatureExtractor",
    "AutoModel": "modeling_convtransformer.ConvTransformerModel",
    "AutoBackbone": "modeling_convtransformer.ConvTransformerBackbone",
    "AutoModelForObjectDetection": "modeling_convtransformer.ConvTransformerForTemporalActionLocalization",
    "AutoModelForZeroShotObjectDetection": "modeling_convtransformer.ConvTransformerForMomentRetrieval",
}
_PIPELINES = {
    "temporal-action-localization": {
        "impl": "pipeline_convtransformer.TemporalActionLocalizationPipeline",
        "pt": ["AutoModelForObjectDetection"],
    },
    "moment-retrieval": {
        "impl": "pipeline_convtransformer.MomentRetrievalPipeline",
        "pt": ["AutoModelForZeroShotObjectDetection"],
    },
}
_IS_REMOTE_CODE = __name__.startswith("transformers_modules.")

# The largest sizes that any real model of this family comes near. A config.json beyond them is a typo or an attack,
# and is refused before a single tensor is made.
_SIZE_LIMITS = {
    "n_embd": 65_536,
    "n_head": 1_024,
    "n_embd_ks": 1_023,
    "max_len": 16_777_216,
    "scale_factor": 64,
    "fpn_dim": 65_536,
    "head_dim": 65_536,
    "head_num_layers": 64,
    "head_kernel_size": 1_023,
    "text_dim": 65_536,
    "decoder_dim": 65_536,
    "decoder_layers": 64,
    "projection_dim": 65_536,
}
_MAX_INPUT_WIDTH = 1_048_576
_MAX_LAYERS = 256
_MAX_STRIDE = 2**24
_MAX_LABELS = 1_000_000
_MAX_PARAMETERS = 20_000_000_000

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# v1's own defaults (libs/core/config.py of its release), for the keys of v1 YAML files that belong to the model.
_V1_DEFAULTS = {
    "dataset": {"input_dim": 2304, "num_classes": 97, "max_seq_len": 2304},
    "model": {
        "backbone_type": "convTransformer",
        "fpn_type": "identity",
        "backbone_arch": [2, 2, 5],
        "scale_factor": 2,
        "regression_range": [[0, 4], [4, 8], [8, 16], [16, 32], [32, 64], [64, 10000]],
        "n_head": 4,
        "n_mha_win_size": -1,
        "embd_kernel_size": 3,
        "embd_dim": 512,
        "embd_with_ln": True,
        "fpn_dim": 512,
        "fpn_with_ln": True,
        "fpn_start_level": 0,
        "head_dim": 512,
        "head_kernel_size": 3,
        "head_num_layers": 3,
        "head_with_ln": True,
        "use_abs_pe": False,
        "use_rel_pe": False,
    },
    "train_cfg": {
        "center_sample": "radius",
        "center_sample_radius": 1.5,
        "loss_weight": 1.0,
        "cls_prior_prob": 0.01,
        "init_loss_norm": 2000,
        "head_empty_cls": [],
        "dropout": 0.0,
        "droppath": 0.1,
        "label_smoothing": 0.0,
    },
}

# v1 YAML key -> our field
_V1_FIELDS = {
    "dataset": {"input_dim": "n_in", "num_classes": "num_labels", "max_seq_len": "max_len"},
    "model": {
        "backbone_type": "backbone_type",
        "fpn_type": "fpn_type",
        "backbone_arch": "arch",
        "scale_factor": "scale_factor",
        "regression_range": "regression_range",
        "n_head": "n_head",
        "n_mha_win_size": "mha_win_size",
        "embd_kernel_size": "n_embd_ks",
        "embd_dim": "n_embd",
        "embd_with_ln": "with_ln",
        "fpn_dim": "fpn_dim",
        "fpn_with_ln": "fpn_with_ln",
        "fpn_start_level": "fpn_start_level",
        "head_dim": "head_dim",
        "head_kernel_size": "head_kernel_size",
        "head_num_layers": "head_num_layers",
        "head_with_ln": "head_with_ln",
        "use_abs_pe": "use_abs_pe",
        "use_rel_pe": "use_rel_pe",
    },
    "train_cfg": {
        "center_sample": "center_sample",
        "center_sample_radius": "center_sample_radius",
        "loss_weight": "loss_weight",
        "cls_prior_prob": "cls_prior_prob",
        "init_loss_norm": "init_loss_norm",
        "head_empty_cls": "empty_labels",
        "dropout": "proj_pdrop",
        "droppath": "path_pdrop",
        "label_smoothing": "label_smoothing",
    },
}

# Keys of v1 YAML files that say nothing about the model.
_V1_OTHER_KEYS = {
    "dataset": {
        "crop_ratio",
        "default_fps",
        "downsample_rate",
        "feat_folder",
        "feat_stride",
        "file_ext",
        "file_prefix",
        "force_upsampling",
        "json_file",
        "num_frames",
        "trunc_thresh",
    },
    # v1's recorded config.txt repeats some of the other sections inside `model`.
    "model": {"max_buffer_len_factor", "input_dim", "num_classes", "max_seq_len", "train_cfg", "test_cfg"},
    "train_cfg": {"clip_grad_l2norm"},
}

# What separates v1 from our defaults once the field names are translated.
_V1_SETTINGS = {
    "use_rope": False,
    "use_swiglu": False,
    "use_rms_norm": False,
    "mask_conv_inputs": False,
}


@strict
class ConvTransformerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a ConvTransformer: the temporal action localization family of ActionFormer
    (Zhang et al., ECCV 2022, https://arxiv.org/abs/2202.07925) with modern transformer parts, each one field.
    `ConvTransformerConfig()` is the "balanced" model; v1 is `configuration/v1_compatible.yaml`.

    Args:
        n_in (`int` or list of `int`, defaults to 2048; HF name `input_dim`):
            Width of an input feature. A list names the widths of several streams that lie side by side in the
            input; each gets its own projection (`stream_dims`) and the results are concatenated.
        stream_dims (list of `int`, *optional*):
            Width of each stream after its projection; only with a list in `n_in`. Default: `n_embd` in equal parts.
        n_embd (`int`, defaults to 256; HF name `hidden_size`):
            Width of the model.
        n_head (`int`, defaults to 4; HF name `num_attention_heads`):
            Number of query heads.
        n_kv_head (`int`, *optional*; HF name `num_key_value_heads`):
            Number of key/value heads. `None`: as many as query heads (MHA); fewer: grouped (GQA); 1: MQA.
        n_embd_ks (`int`, defaults to 3):
            Kernel size of the embedding convolutions (odd).
        max_len (`int`, defaults to 2304; HF name `max_position_embeddings`):
            Length of the sequences in training, in features. No limit at inference: it is the size of the position
            tables and the length that v1 pads to.
        arch (three `int`, defaults to `(2, 2, 5)`):
            Number of embedding convolutions, of stem blocks, of branch blocks. Each branch block adds a level to
            the pyramid.
        mha_win_size (`int` or list of `int`, defaults to -1):
            Full width of the attention window (odd), in steps of the level; one for all levels or one for each
            (`1 + arch[2]`). 1 or less: global attention.
        scale_factor (`int`, defaults to 2):
            Stride of a branch block (even).
        with_ln (`bool`, defaults to `True`):
            Norm after the embedding convolutions.
        backbone_type (`str`, defaults to `"convTransformer"`):
            `"convTransformer"`, or `"conv"` for v1's backbone of residual convolution blocks, without attention.
        attn_pdrop, proj_pdrop, path_pdrop (`float`, default to 0, 0 and 0.1):
            Dropout on attention weights, on projections and MLPs, and drop path (stochastic depth). Drop path
            brings a learned scale for each channel, as in v1, which exists only where the rate is above 0.
        use_rope (`bool`, defaults to `True`), rope_parameters (`dict`, *optional*):
            Rotary positions (https://arxiv.org/abs/2104.09864), counted in steps of the level, and their settings as
            everywhere in transformers (`rope_theta`, `rope_type`, ...). For recordings longer than `max_len`:
            `{"rope_type": "linear", "dynamic" or "yarn", "factor": 4.0}`. "dynamic" (NTK) goes by each sample's own
            length, which is known only at its end: with `is_causal`, too, it needs the whole recording.
        use_abs_pe, use_learned_pe (`bool`, default to `False`):
            Sinusoidal, or learned, positions added once after the embedding; stretched linearly beyond `max_len`.
        use_rel_pe (`bool`, defaults to `False`), rel_pe_max_distance (`int`, defaults to 64):
            A learned bias for each head and offset inside the attention window
            (https://arxiv.org/abs/1803.02155). Global attention has one for each offset up to this many steps of
            the level, and what is farther away has the bias of the last: any length. 0: windows only, as in v1.
        use_swiglu (`bool`, defaults to `True`):
            SwiGLU MLP (https://arxiv.org/abs/2002.05202) of 2/3 of 4 times the width, up to a multiple of 64;
            else a GELU MLP of 4 times the width.
        use_rms_norm, use_batch_norm (`bool`, default to `True` and `False`):
            RMSNorm (https://arxiv.org/abs/1910.07467) or batch norm over valid positions; with neither, LayerNorm.
        norm_eps (`float`, defaults to 1e-5):
            Epsilon of the norms.
        mask_conv_inputs (`bool`, defaults to `True`):
            Mask padded steps before every convolution, so that a sample gives the same result alone and padded.
            `False` is v1, where what padding holds leaks into the last valid steps.
        is_causal (`bool`, defaults to `False`):
            Attention, convolutions and pooling look only back.
        fpn_type (`str`, defaults to `"identity"`):
            Neck: `"identity"` (a norm on each level) or `"fpn"` (top-down feature pyramid).
        fpn_dim (`int`, *optional*), fpn_with_ln (`bool`, defaults to `True`), fpn_start_level (`int`, defaults to 0):
            Width of the neck (default `n_embd`), its norm, and the first pyramid level that the detector uses.
        head_dim (`int`, *optional*), head_num_layers, head_kernel_size (`int`, default to 3), head_with_ln (`bool`):
            Width (default `n_embd`), depth, kernel size (odd) and norm of the classification and regression heads.
            (v1's name. It is not the width of an attention head, which is `n_embd // n_head`.)
        regression_range (list of pairs, *optional*):
            For each level of the detector, the shortest and longest distance (in features) from a point to the farther
            end of a segment that the level is trained on. Default: `[0, 4], [4, 8], ...`, the last open to 10000.
        center_sample (`str`, defaults to `"radius"`), center_sample_radius (`float`, defaults to 1.5):
            `"radius"`: a point is positive near a segment's centre, within this many strides; `"none"`: anywhere inside.
        loss_weight (`float`, defaults to 1.0):
            Weight of the regression loss; 0 or less balances it against the classification loss.
        cls_prior_prob (`float`, defaults to 0.01):
            Score that the classification head starts from.
        init_loss_norm (`float`, defaults to 2000):
            Start of the moving number of positives that both losses are divided by.
        label_smoothing (`float`, defaults to 0):
            Label smoothing of the classification loss.
        empty_labels (list of `int`, defaults to `()`):
            Classes without data, whose score starts from 1e-6.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Moment retrieval: the text encoder, any text model of transformers. Without it, queries are given as embeddings.
        freeze_text_encoder (`bool`, defaults to `True`):
            The text encoder does not learn.
        text_dim (`int`, *optional*):
            Width of the queries' embeddings. Default: that of the text encoder.
        decoder_dim (`int`, *optional*), decoder_layers (`int`, defaults to 1):
            Width and number of the blocks in which the pyramid attends to a query. The width is what a query costs, beside
            the recording: default `n_embd / 8`, up to a multiple of two channels a head.
        projection_dim (`int`, *optional*):
            Width of the space in which queries and points of the pyramid are compared to search many recordings. Default: no
            such head.
        out_features (list of `str`, *optional*), out_indices (list of `int`, *optional*):
            Levels that `ConvTransformerBackbone` returns, by name (`"stem"`, `"stage1"`, ...) or number (0 is the
            finest). Default: the coarsest.

    Raises:
        `ValueError`: settings that contradict one another, or a size that no real model has.
        `huggingface_hub.errors.StrictDataclassFieldValidationError`: a value of a wrong type.
    """

    model_type = "convtransformer"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["loss_dict", "hidden_states", "attentions"]
    attribute_map = {
        "input_dim": "n_in",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "max_len",
    }

    n_in: int | list[int] | tuple[int, ...] = 2048
    stream_dims: list[int] | tuple[int, ...] | None = None
    n_embd: int = 256
    n_head: int = 4
    n_kv_head: int | None = None
    n_embd_ks: int = 3
    max_len: int = 2304
    arch: list[int] | tuple[int, ...] = (2, 2, 5)
    mha_win_size: int | list[int] | tuple[int, ...] = -1
    scale_factor: int = 2
    with_ln: bool = True
    backbone_type: Literal["convTransformer", "conv"] = "convTransformer"

    attn_pdrop: float | int = 0.0
    proj_pdrop: float | int = 0.0
    path_pdrop: float | int = 0.1
    use_rope: bool = True
    rope_parameters: dict | None = None
    use_abs_pe: bool = False
    use_learned_pe: bool = False
    use_rel_pe: bool = False
    rel_pe_max_distance: int = 64
    use_swiglu: bool = True
    use_rms_norm: bool = True
    use_batch_norm: bool = False
    norm_eps: float | int = 1e-5
    mask_conv_inputs: bool = True
    is_causal: bool = False

    fpn_type: Literal["identity", "fpn"] = "identity"
    fpn_dim: int | None = None
    fpn_with_ln: bool = True
    fpn_start_level: int = 0
    head_dim: int | None = None
    head_num_layers: int = 3
    head_kernel_size: int = 3
    head_with_ln: bool = True
    regression_range: list | tuple | None = None

    center_sample: Literal["radius", "none"] = "radius"
    center_sample_radius: float | int = 1.5
    loss_weight: float | int = 1.0
    cls_prior_prob: float | int = 0.01
    init_loss_norm: float | int = 2000
    label_smoothing: float | int = 0.0
    empty_labels: list[int] | tuple[int, ...] = ()

    text_config: dict | PreTrainedConfig | None = None
    freeze_text_encoder: bool = True
    text_dim: int | None = None
    decoder_dim: int | None = None
    decoder_layers: int = 1
    projection_dim: int | None = None

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        # A pipeline named in config.json is one that transformers asks permission for. Code that is installed needs none.
        if not _IS_REMOTE_CODE:
            kwargs.pop("custom_pipelines", None)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        # `use_flash_attn` of the YAML files is how attention is computed, not what the model is: it is not stored.
        use_flash_attn = kwargs.pop("use_flash_attn", None)
        if use_flash_attn is not None and not isinstance(use_flash_attn, bool):
            raise ValueError(f"use_flash_attn is {use_flash_attn!r}; expected true (sdpa) or false (eager).")
        if use_flash_attn is not None and kwargs.get("attn_implementation") is None:
            kwargs["attn_implementation"] = "sdpa" if use_flash_attn else "eager"
        # The base class makes a dictionary of `num_labels` entries: look at the number first.
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and (type(num_labels) is not int or not 0 < num_labels <= _MAX_LABELS):
            raise ValueError(f"num_labels is {num_labels!r}; expected an int from 1 to {_MAX_LABELS:,}.")
        if isinstance(self.rope_parameters, dict):
            self.rope_parameters = dict(self.rope_parameters)  # the base class writes into it: keep the caller's whole
        if num_labels is not None and self.id2label is not None and num_labels != len(self.id2label):
            raise ValueError(
                f"num_labels is {num_labels}, but id2label names {len(self.id2label)} classes; give one of them."
            )
        if isinstance(self.text_config, dict):
            self.text_config = _text_config_of(self.text_config)
        for alias, field in self.attribute_map.items():
            given = getattr(self, field)
            if alias in kwargs and given not in (type(self).__dataclass_fields__[field].default, kwargs[alias]):
                raise ValueError(
                    f"{alias} is {kwargs[alias]!r} and {field} {given!r}; they are one field, give one of them."
                )
        super().__post_init__(**kwargs)
        names = {name: index for index, name in self.id2label.items()}
        if self.label2id is None:
            self.label2id = names
        elif {name: int(index) for name, index in self.label2id.items()} != names:
            raise ValueError(f"label2id {self.label2id} contradicts id2label {self.id2label}; give id2label only.")
        self.validate_architecture()  # here too, because what runs after construction is not raised as a ValueError
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers; fields that `kwargs` replaces are validated together with the others."""
        if kwargs.get("id2label") is not None and kwargs.get("label2id") is None:
            kwargs["label2id"] = {name: int(index) for index, name in kwargs["id2label"].items()}
        elif kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or {})):
            # another number of classes: the saved names go
            config_dict = {key: value for key, value in config_dict.items() if key not in ("id2label", "label2id")}
        if "arch" in kwargs and not {"out_features", "out_indices"} & set(kwargs):
            # another number of levels: the saved choice among them goes
            config_dict = {
                key: value for key, value in config_dict.items() if key not in ("out_features", "out_indices")
            }
            kwargs["out_features"] = None
        if isinstance(kwargs.get("rope_parameters"), dict):
            # other frequencies for trained weights: what is not given is as they were trained
            saved = config_dict.get("rope_parameters") or {}
            kept = {"rope_theta": saved["rope_theta"]} if "rope_theta" in saved else {}
            config_dict = {**config_dict, "rope_parameters": {**kept, **kwargs.pop("rope_parameters")}}
        if isinstance(kwargs.get("text_config"), dict):
            config_dict = {**config_dict, "text_config": kwargs.pop("text_config")}
        windows = config_dict.get("mha_win_size", -1)
        has_windows = max(windows if isinstance(windows, list | tuple) else [windows], default=-1) > 1
        if config_dict.get("use_rel_pe") and has_windows and "rel_pe_max_distance" not in {**config_dict, **kwargs}:
            # saved before global attention could have a bias: of windows only
            config_dict = {**config_dict, "rel_pe_max_distance": 0}
        result = super().from_dict(config_dict, **kwargs)
        (result[0] if isinstance(result, tuple) else result).validate_architecture()
        return result

    # How the backbone is spread over devices, by name of module (`from_pretrained(distributed_config=...)`). Properties
    # too: they follow from the fields.

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """Tensor parallelism: each device has some of the heads and of the MLPs' hidden channels."""
        if self.backbone_type != "convTransformer":
            return None
        plan = {f"attn.{name}_proj": "colwise" for name in ("q", "k", "v")} | {"attn.o_proj": "rowwise"}
        plan |= {"mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
        if self.use_swiglu:
            plan["mlp.gate_proj"] = "colwise"
        parts = [part for part, blocks in (("stem", self.arch[1]), ("branch", self.arch[2])) if blocks]
        widths = {"stem": self.relative_bias_widths[:1], "branch": self.relative_bias_widths[1:]}
        whole = {f"{part}.*.{name}": style for part in parts for name, style in plan.items()}
        for part in parts:
            if max(widths[part]) > 0:
                # One row a head; the attention that adds them sees its own rows.
                whole |= {f"{part}.*.attn.relative_bias": "colwise", f"{part}.*.attn": "local_params"}
        return whole

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:
        """FSDP2: what is gathered as a whole, and freed after use."""
        parts = [part for part, blocks in (("stem", self.arch[1]), ("branch", self.arch[2])) if blocks]
        return {"embedding": "free_full_weight"} | {f"{part}.*": "free_full_weight" for part in parts}

    # What follows from the fields. Properties, because fields can change after construction
    # (`from_pretrained(folder, n_head=8)`), and because a derived value that is stored can contradict its source.

    @property
    def num_levels(self) -> int:
        """Levels of the pyramid that the backbone returns."""
        return 1 + self.arch[2]

    @property
    def num_hidden_layers(self) -> int:
        """Stem and branch blocks."""
        return self.arch[1] + self.arch[2]

    @property
    def depths(self) -> list[int]:
        """Blocks of each stage after the stem: one, which shortens the sequence."""
        return [1] * self.arch[2]

    @property
    def stage_names(self) -> list[str]:
        """Names of the levels of the pyramid, finest first."""
        return ["stem", *(f"stage{level}" for level in range(1, self.num_levels))]

    @property
    def strides(self) -> list[int]:
        """Stride of each level of the backbone, in features."""
        return [self.scale_factor**level for level in range(self.num_levels)]

    @property
    def window_sizes(self) -> list[int]:
        """Attention window of each level, in steps of that level; 1 or less is global."""
        if isinstance(self.mha_win_size, int):
            return [self.mha_win_size] * self.num_levels
        return list(self.mha_win_size)

    @property
    def relative_bias_widths(self) -> list[int]:
        """Number of offsets for which attention has a learned bias, for each level; 0 = no bias."""
        if not self.use_rel_pe:
            return [0] * self.num_levels
        beyond = 2 * self.rel_pe_max_distance + 1 if self.rel_pe_max_distance else 0
        return [window if window > 1 else beyond for window in self.window_sizes]

    @property
    def stream_widths(self) -> list[int]:
        """Input width of each stream; one entry if there is a single stream."""
        return [self.n_in] if isinstance(self.n_in, int) else list(self.n_in)

    @property
    def projected_stream_widths(self) -> list[int] | None:
        """Width of each stream after its projection, or `None` where there is a single stream without projection."""
        if isinstance(self.n_in, int):
            return None
        if self.stream_dims is not None:
            return list(self.stream_dims)
        share, rest = divmod(self.n_embd, len(self.n_in))
        return [share + (stream < rest) for stream in range(len(self.n_in))]

    @property
    def intermediate_size(self) -> int:
        """Hidden width of the MLPs."""
        return self.mlp_width(self.n_embd)

    def mlp_width(self, width: int) -> int:
        """Hidden width of an MLP between tensors of this width."""
        return math.ceil(8 * width / 3 / 64) * 64 if self.use_swiglu else 4 * width

    @property
    def text_width(self) -> int | None:
        """Width of the queries' embeddings; `None` where nothing says it."""
        if self.text_dim is not None or self.text_config is None:
            return self.text_dim
        return getattr(self.text_config, "hidden_size", None)

    @property
    def decoder_width(self) -> int:
        """Width of the decoder of moment retrieval."""
        if self.decoder_dim is not None:
            return self.decoder_dim
        step = 2 * self.n_head  # rotary positions turn pairs of channels
        return math.ceil(self.n_embd / 8 / step) * step

    @property
    def neck_width(self) -> int:
        return self.n_embd if self.fpn_dim is None else self.fpn_dim

    @property
    def head_width(self) -> int:
        return self.n_embd if self.head_dim is None else self.head_dim

    @property
    def detector_strides(self) -> list[int]:
        """Stride of each level that the heads see, in features."""
        return self.strides[self.fpn_start_level :]

    @property
    def detector_ranges(self) -> list[tuple[float, float]]:
        """Regression range of each level that the heads see, in features."""
        if self.regression_range is not None:
            return [tuple(pair) for pair in self.regression_range]
        highs = [4.0 * stride for stride in self.detector_strides]
        return list(zip([0.0, *highs[:-1]], [*highs[:-1], 10000.0], strict=True))

    @property
    def receptive_field(self) -> tuple[float, float]:
        """
        How far a point of the detector looks back and ahead at most, in features; infinite with global attention. What
        lies farther away changes nothing (but for absolute positions, which count from the first step).
        """
        sides = 2 if self.is_causal else 1  # a causal convolution has both its halves behind
        reach = sides * self.arch[0] * (self.n_embd_ks // 2)
        reaches = []
        for level, (stride, window) in enumerate(zip(self.strides, self.window_sizes, strict=True)):
            finer = self.strides[max(level - 1, 0)]
            if self.backbone_type == "conv":
                block = sides * (finer + stride)
            else:
                attention = stride * (window // 2) if window > 1 else math.inf
                block = sides * finer * (self.scale_factor // 2 if level else 1) + attention
            blocks = 1 if level else self.arch[1]
            reach += blocks * block if blocks else 0  # (none of global attention: 0 * infinity is not a number)
            reaches.append(reach)
        if self.fpn_type == "fpn":  # what a coarser step brings to a finer one stands up to a stride before it
            reaches = [
                max(
                    farthest + coarser for farthest, coarser in zip(reaches[level:], self.strides[level:], strict=True)
                )
                + (sides - 1) * stride
                for level, stride in enumerate(self.strides)
            ]
        heads = sides * self.head_num_layers * (self.head_kernel_size // 2)
        levels = list(zip(reaches, self.strides, strict=True))[self.fpn_start_level :]
        reach = max(farthest + heads * stride for farthest, stride in levels)
        return (reach, 0.0 if self.is_causal else reach)

    @property
    def use_flash_attn(self) -> bool:
        return self._attn_implementation != "eager"

    @use_flash_attn.setter
    def use_flash_attn(self, value: bool):
        self._attn_implementation = "sdpa" if value else "eager"

    def validate_architecture(self):
        """Refuses contradictions and absurd sizes. One validator, because the later checks rely on the earlier ones."""
        self._check_sizes()
        self._check_attention()
        self._check_pyramid()
        self._check_loss()
        self._check_text()
        self.validate_rope()
        self._check_parallel()

    def _check_sizes(self):
        for field, limit in _SIZE_LIMITS.items():
            value = getattr(self, field)
            if value is not None and not 1 <= value <= limit:
                raise ValueError(f"{field} is {value}; expected 1 to {limit:,}.")
        if len(self.arch) != 3:
            raise ValueError(
                f"arch is {self.arch}; expected three counts (embedding convs, stem blocks, branch blocks): (2, 2, 5)."
            )
        if min(self.arch) < 0 or sum(self.arch) > _MAX_LAYERS:
            raise ValueError(f"arch is {self.arch}; expected three counts of 0 or more, {_MAX_LAYERS} layers at most.")
        if self.arch[2] * math.log2(self.scale_factor) > math.log2(_MAX_STRIDE):
            raise ValueError(
                f"arch {self.arch} with scale_factor {self.scale_factor} makes the coarsest stride "
                f"{self.scale_factor}**{self.arch[2]}; expected at most {_MAX_STRIDE:,}. Use fewer branch blocks."
            )
        if not isinstance(self.mha_win_size, int) and len(self.mha_win_size) != self.num_levels:
            raise ValueError(
                f"mha_win_size has {len(self.mha_win_size)} entries, but there are {self.num_levels} levels "
                f"(1 + arch[2]); give {self.num_levels} windows, or one for all."
            )
        if max(self.window_sizes) > _MAX_STRIDE:
            raise ValueError(
                f"mha_win_size is {self.mha_win_size}; expected at most {_MAX_STRIDE:,}, or -1 for global attention."
            )
        if not 0 <= self.rel_pe_max_distance <= _MAX_STRIDE:
            raise ValueError(f"rel_pe_max_distance is {self.rel_pe_max_distance}; expected 0 to {_MAX_STRIDE:,}.")
        if self.stream_dims is not None and len(self.stream_dims) != len(self.stream_widths):
            raise ValueError(
                f"stream_dims {self.stream_dims} and n_in {self.n_in} differ in length; give one width a stream."
            )
        if self.stream_dims is not None and isinstance(self.n_in, int):
            raise ValueError(f"stream_dims {self.stream_dims} needs a list in n_in: n_in=[{self.n_in}] would work.")
        if not isinstance(self.n_in, int) and not self.n_in:
            raise ValueError("n_in is an empty list; give the width of each stream, or one int.")
        if self.stream_dims is None and len(self.stream_widths) > self.n_embd:
            wider = math.ceil(len(self.stream_widths) / (2 * self.n_head)) * 2 * self.n_head
            raise ValueError(
                f"n_in lists {len(self.stream_widths)} streams, more than the {self.n_embd} channels of n_embd that they "
                f"share; n_embd={wider}, or the width of each in stream_dims, would work."
            )
        for pair in self.regression_range or ():
            if not isinstance(pair, list | tuple) or [type(end) in (int, float) for end in pair] != [True, True]:
                raise ValueError(f"regression_range has the entry {pair!r}; expected pairs such as [0, 4].")
        for field, widths in (("n_in", self.stream_widths), ("stream_dims", self.projected_stream_widths or [1])):
            if min(widths) < 1 or sum(widths) > _MAX_INPUT_WIDTH:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; expected widths from 1 to {_MAX_INPUT_WIDTH:,} in all."
                )
        if self.num_labels > _MAX_LABELS:
            raise ValueError(f"id2label has {self.num_labels:,} entries; expected at most {_MAX_LABELS:,}.")
        if self.num_labels < 1 or min(self.id2label) != 0 or max(self.id2label) != self.num_labels - 1:
            raise ValueError(
                f"id2label has {self.num_labels} entries with the keys {list(self.id2label)[:10]} ...; expected the "
                "classes 0, 1, 2, ... without a gap."
            )
        if (parameters := self._estimate_parameters()) > _MAX_PARAMETERS:
            raise ValueError(
                f"These settings make a model of about {parameters:.1e} parameters; expected at most "
                f"{_MAX_PARAMETERS:.0e}. Check n_in, n_embd, fpn_dim, head_dim, arch and max_len for a typo."
            )

    def _check_attention(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}; "
                f"n_head={_nearest_divisor(self.n_embd, self.n_head)} would work."
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(
                f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}; "
                f"n_kv_head={_nearest_divisor(self.n_head, self.n_kv_head)} would work."
            )
        if self.use_rope and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"use_rope turns pairs of channels, but n_embd {self.n_embd} / n_head {self.n_head} is odd "
                f"({self.n_embd // self.n_head}); use another n_head, or use_rope=False."
            )
        for window in self.window_sizes:
            if window > 1 and window % 2 == 0:
                raise ValueError(
                    f"mha_win_size {self.mha_win_size} has an even window; a window is a full width with the step "
                    f"itself in the middle, so it is odd: {window + 1} would work."
                )
        if self.use_rel_pe and max(self.relative_bias_widths) == 0:
            raise ValueError(
                f"use_rel_pe is true, but with rel_pe_max_distance 0 it is for windows only, and mha_win_size "
                f"{self.mha_win_size} is global; rel_pe_max_distance=64 or mha_win_size=9 would work."
            )
        if self.use_abs_pe and self.use_learned_pe:
            raise ValueError(
                "use_abs_pe and use_learned_pe are both true; choose one: use_learned_pe=False would work."
            )
        if self.use_rms_norm and self.use_batch_norm:
            raise ValueError(
                "use_rms_norm and use_batch_norm are both true; there is one norm: use_rms_norm=False would work."
            )

    def _check_pyramid(self):
        if self.scale_factor % 2:
            raise ValueError(
                f"scale_factor is {self.scale_factor}; strides are even (kernel stride + 1): 2 would work."
            )
        for field in ("n_embd_ks", "head_kernel_size"):
            if getattr(self, field) % 2 == 0:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; kernels are odd: {getattr(self, field) + 1} would work."
                )
        if self.arch[0] == 0 and sum(self.projected_stream_widths or self.stream_widths) != self.n_embd:
            raise ValueError(
                f"arch {self.arch} has no embedding convolution, so the input width must be n_embd {self.n_embd}, "
                f"but it is {sum(self.projected_stream_widths or self.stream_widths)}; use arch=(1, ...)."
            )
        if not 0 <= self.fpn_start_level < self.num_levels:
            raise ValueError(
                f"fpn_start_level is {self.fpn_start_level}; expected 0 to {self.num_levels - 1} (arch[2] = {self.arch[2]})."
            )
        if self.fpn_type == "identity" and self.neck_width != self.n_embd:
            raise ValueError(
                f"fpn_type 'identity' keeps the width, but fpn_dim is {self.fpn_dim} and n_embd {self.n_embd}; "
                f"fpn_dim={self.n_embd} or fpn_type='fpn' would work."
            )
        levels = self.num_levels - self.fpn_start_level
        ranges = self.detector_ranges
        if len(ranges) != levels:
            raise ValueError(
                f"regression_range has {len(ranges)} entries, but the detector has {levels} levels "
                f"(1 + arch[2] - fpn_start_level); give {levels} pairs, or None for [0, 4], [4, 8], ..."
            )
        for low, high in ranges:
            if not 0 <= low < high:
                raise ValueError(
                    f"regression_range has the pair [{low}, {high}]; expected 0 <= low < high, such as [0, 4]."
                )

    def _check_loss(self):
        for field in ("attn_pdrop", "proj_pdrop", "path_pdrop", "label_smoothing"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; expected 0 <= {field} < 1.")
        if not 0 < self.cls_prior_prob < 1:
            raise ValueError(f"cls_prior_prob is {self.cls_prior_prob}; expected a probability between 0 and 1: 0.01.")
        for field in ("norm_eps", "init_loss_norm", "center_sample_radius"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; expected a positive number.")
        if not math.isfinite(self.loss_weight):
            raise ValueError(f"loss_weight is {self.loss_weight}; expected a finite number.")
        unknown = [label for label in self.empty_labels if not 0 <= label < self.num_labels]
        if unknown:
            raise ValueError(f"empty_labels has {unknown}, but there are {self.num_labels} classes (id2label).")

    def _check_text(self):
        if self.decoder_width % self.n_head or (self.use_rope and self.decoder_width // self.n_head % 2):
            step = self.n_head * (2 if self.use_rope else 1)
            raise ValueError(
                f"decoder_dim is {self.decoder_dim}; expected a multiple of {step} (n_head {self.n_head}"
                f"{', and rotary positions turn pairs of channels' if self.use_rope else ''}): "
                f"{max(round(self.decoder_width / step), 1) * step} would work."
            )
        width = getattr(self.text_config, "hidden_size", None)
        if self.text_config is not None and width is None:
            raise ValueError(
                f"text_config is of type {self.text_config.model_type!r}, which has no hidden_size: a model of text and something "
                "else? Give the config of its text model: text_config.get_text_config()."
            )
        if self.text_config is not None and self.text_dim not in (None, width):
            raise ValueError(
                f"text_dim is {self.text_dim}, but the text encoder (text_config) has hidden_size {width}; leave text_dim out."
            )

    def _check_parallel(self):
        """`from_pretrained(distributed_config=...)` puts its argument here before it makes the model."""
        parallel = getattr(self, "distributed_config", None)
        if (getattr(parallel, "pp_size", None) or 1) > 1:
            raise ValueError(
                f"distributed_config has pp_size={parallel.pp_size}, which transformers can do for causal language models "
                "only; modeling_convtransformer.parallel.Pipeline (examples/train_pipeline_parallel.py) would work."
            )
        size = getattr(parallel, "tp_size", None) or 1
        if size == 1 or parallel.tp_plan == {}:
            return
        if self.backbone_type != "convTransformer":
            raise ValueError(
                f"distributed_config has tp_size={size}, but backbone_type {self.backbone_type!r} has no heads and no MLPs "
                f"to spread over devices; fsdp_size={size} would work."
            )
        # Each device has whole heads, and with them the keys and values that they read.
        heads = math.gcd(self.n_head, self.n_kv_head or self.n_head)
        if heads % size:
            most = max(divisor for divisor in range(1, size + 1) if heads % divisor == 0)
            raise ValueError(
                f"distributed_config has tp_size={size}, by which n_head {self.n_head} and n_kv_head {self.n_kv_head} (None: "
                f"as many) must be divisible; tp_size={most} would work, or fsdp_size={size} with any number of heads."
            )

    def validate_rope(self):
        """As in transformers, with the width of an attention head where it looks for `head_dim`."""
        if not self.use_rope:
            return
        parameters = self.rope_parameters or {}
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in _ROPE_TYPES:
            raise ValueError(f"rope_parameters has rope_type {rope_type!r}; expected one of {', '.join(_ROPE_TYPES)}.")
        for field in ("rope_theta", "factor"):
            value = parameters.get(field, 1.0)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"rope_parameters has {field} {value!r}; expected a positive number.")
        if rope_type == "dynamic" and self.n_embd // self.n_head == 2:
            raise ValueError(
                f"rope_parameters has rope_type 'dynamic', which slows all pairs of channels of a head but the first, and "
                f"n_embd {self.n_embd} / n_head {self.n_head} leaves one pair; rope_type 'linear' would work."
            )
        head_dim = self.head_dim
        object.__setattr__(self, "head_dim", self.n_embd // self.n_head)
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(f"rope_parameters: {error.args[0]}") from error
        finally:
            object.__setattr__(self, "head_dim", head_dim)

    def _estimate_parameters(self) -> float:
        """Number of parameters to within a few percent, as a float: absurd settings cannot overflow it."""
        width, neck, head = float(self.n_embd), float(self.neck_width), float(self.head_width)
        streams = sum(a * b for a, b in zip(self.stream_widths, self.projected_stream_widths or [0], strict=False))
        first = sum(self.projected_stream_widths or self.stream_widths)
        embedding = self.n_embd_ks * width * (first + max(self.arch[0] - 1, 0) * width)
        blocks = self.num_hidden_layers * 12 * width * width
        necks = (width + 3) * neck * self.num_levels if self.fpn_type == "fpn" else 0
        towers = 2 * self.head_kernel_size * ((self.head_num_layers - 1) * head * max(head, neck))
        outputs = self.head_kernel_size * head * (self.num_labels + 2)
        table = self.max_len * width if self.use_learned_pe or self.use_abs_pe else 0
        bias = self.n_head * self.num_hidden_layers * max(self.relative_bias_widths)
        return streams + embedding + blocks + necks + towers + outputs + table + bias

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """As in transformers; names every class and the pipeline, whichever class is saved."""
        self.auto_map = dict(_AUTO_MAP)
        self.custom_pipelines = {task: dict(info) for task, info in _PIPELINES.items()}
        try:
            super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            if not _IS_REMOTE_CODE:
                del self.custom_pipelines

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "ConvTransformerConfig":
        """
        Reads the model's part of a YAML file in one of three dialects:

        - ours (`configuration/*.yaml`): `model` holds the fields of this class;
        - the earlier v2's: `model` holds `backbone_type` and a `backbone` mapping (what it leaves out is our default);
        - v1's (`configs/*.yaml` of ActionFormer's release, or the config.txt that its training script records):
          `dataset`, `model` with `embd_dim`, `backbone_arch`, ..., and `train_cfg` (what it leaves out is v1's default).

        Args:
            path: the file.
            overrides: fields that replace the file's.

        Raises:
            ValueError: the file is not a mapping, or a key is neither a field nor a known key of its dialect.
        """
        content = read_recipe(path)
        if not isinstance(content.get("model", {}), dict):
            raise ValueError(f"{path}: expected a mapping with a `model` section, as in configuration/balanced.yaml.")
        model = content.get("model", {})
        if not model and "dataset" not in content:
            raise ValueError(f"{path}: no `model` section, only {', '.join(map(str, content)) or 'nothing'}.")
        if "backbone" in model or model.get("backbone_type") == "convTransformerv2":
            fields = _fields_of_earlier_v2(path, content)
        elif any(section in content for section in ("dataset", "train_cfg", "test_cfg")):
            fields = _fields_of_v1(path, content)
        else:
            fields = dict(model)
        if "id2label" in overrides:
            fields.pop("num_labels", None)
        fields.update(overrides)
        known = {field for field in cls.__dataclass_fields__ if not field.startswith("_")}
        known |= set(cls.attribute_map) | {"num_labels", "use_flash_attn", "attn_implementation"}
        if unknown := sorted(str(field) for field in set(fields) - known):
            raise ValueError(
                f"{path}: unknown fields in `model`: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
            )
        return cls(**fields)


def read_recipe(path: str | Path) -> dict:
    """
    The content of a YAML file, or of a config.txt of v1, which holds a Python dictionary.

    Raises:
        ValueError: the file is neither, or holds no mapping.
    """
    import yaml  # PyYAML comes with transformers

    text = Path(path).read_text(encoding="utf-8")
    try:
        content = ast.literal_eval(text) if str(path).endswith(".txt") else yaml.safe_load(text)
    except (yaml.YAMLError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not a YAML file, nor a config.txt of v1 ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping with a `model` section, as in configuration/balanced.yaml.")
    return content


def _known_keys(path, section: str, given: Any) -> dict:
    """A section of a v1 file, checked: a misspelt key would otherwise leave a default in its place."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"{path}: `{section}` is {given!r}; expected a mapping.")
    known = set(_V1_FIELDS[section]) | _V1_OTHER_KEYS[section]
    if unknown := [str(key) for key in given if key not in known]:
        raise ValueError(
            f"{path}: unknown keys in `{section}`: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
        )
    return given


def _fields_of_v1(path, content: dict) -> dict:
    """Our fields for a YAML file of v1, whose silent keys have v1's defaults."""
    fields = dict(_V1_SETTINGS)
    for section, names in _V1_FIELDS.items():
        given = _known_keys(path, section, content.get(section))
        values = {**_V1_DEFAULTS[section], **{key: value for key, value in given.items() if key in names}}
        fields.update({names[key]: value for key, value in values.items()})
    if isinstance(fields["n_embd"], list | tuple):
        fields["stream_dims"] = fields["n_embd"]
        fields["n_embd"] = sum(fields["n_embd"])
    windows = fields["mha_win_size"]
    # The step itself is in the middle of a window: v1's 8 does what its 9 does.
    odd = [w + 1 if w > 1 and w % 2 == 0 else w for w in (windows if isinstance(windows, list) else [windows])]
    fields["mha_win_size"] = odd if isinstance(windows, list) else odd[0]
    if max(odd) <= 1:
        fields["use_rel_pe"] = False  # v1 has it only inside windows and ignores it elsewhere
    elif fields["use_rel_pe"] and min(odd) <= 1:
        fields["rel_pe_max_distance"] = 0
    if fields["backbone_type"] == "conv":
        fields["use_abs_pe"] = fields["use_rel_pe"] = False  # ignored there too
    return fields


def _fields_of_earlier_v2(path, content: dict) -> dict:
    """Our fields for a YAML file of the earlier v2: a nested `backbone`, the rest as in v1."""
    model = dict(content["model"])
    backbone = dict(model.pop("backbone", None) or {})
    if model.pop("backbone_type", "convTransformerv2") != "convTransformerv2":
        backbone = {**_V1_SETTINGS, **backbone}
    fields = {}
    for section, names in _V1_FIELDS.items():
        given = _known_keys(path, section, model if section == "model" else content.get(section))
        fields.update({names[key]: value for key, value in given.items() if key in names})
    fields.update(backbone)
    if isinstance(fields.get("n_embd"), list | tuple):
        fields["stream_dims"] = fields["n_embd"]
        fields["n_embd"] = sum(fields["n_embd"])
    return fields


def _text_config_of(fields: dict) -> PreTrainedConfig:
    """The config of a text model, from what `to_dict` or a user says of it."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError(
            f"text_config has model_type {model_type!r}; expected the type of a text model of transformers, such as 'bert', "
            "or its config: AutoConfig.from_pretrained(...)."
        )
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        # (transformers' own words list all types)
        raise ValueError(f"text_config has model_type {model_type!r}, which transformers cannot make.") from error


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


__all__ = ["ConvTransformerConfig"]
