"""Small random models of the families in transformers that a CPU can build, by introspection of the
installed package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto

V, E, HEADS, LENGTH = 53, 32, 4, 9
IMAGE, PATCH, MEL = 32, 8, 16
MAX_PARAMETERS = 3_000_000

# The first mapping that has a family decides its class to train.
MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

# Sizes by names of config fields; the first match counts.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"(bos|cls|mask|sep|decoder_start)_token_id", 1),
    (r"pad_token_id|padding_idx", 0),
    (r"eos_token_id", 2),
    (r"(\w+_token)_(id|index)", V - 1),
    (r"hidden_size_per_layer_input", 8),
    (r"\w*vocab_size(_per_layer_input)?", V),
    (r"\w*(dropout|_drop|drop_rate|dropout_rate|layerdrop|pdrop|dropout_prob|jitter\w*)", 0.0),
    (r"mask_time_prob|mask_feature_prob|router_jitter_noise|drop_path\w*", 0.0),
    (r"apply_spec_augment|layerdrop|use_timm_backbone|use_pretrained_backbone", False),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num", 2),
    (r"num_global_key_value_heads", 2),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|nhead)|num_\w+_heads", HEADS),
    (r"head_dim|d_kv|attention_head_dim|kv_channels|global_head_dim|v_head_dim", E // HEADS),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim|qk_head_dim|index_head_dim", E // HEADS),
    (r"linear_(key|value)_head_dim|mamba_(d_head|head_dim)", E // HEADS),
    (r"linear_num_(key|value)_heads|index_n_heads|mamba_n_heads", HEADS),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|decay_low_rank_dim|gate_low_rank_dim", 16),
    (
        r"\w*intermediate_size|\w*ffn_dim|d_ff|n_inner|d_inner|ffn_hidden_size|mlp_dim|\w*ffn_size",
        48,
    ),
    (r"dim_feedforward|inner_dim|hidden_features|encoder_ffn|classifier_proj_size", 48),
    (r"num_hidden_layers|num_layers|n_layers?|num_decoder_layers|num_encoder_layers", 2),
    (r"(\w+_)?(encoder_layers|decoder_layers|num_hidden_layers|num_layers|depth)", 2),
    (r"num_hidden_groups|inner_group_num|num_nextn_predict_layers|num_blocks", 1),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|emb_dim|embedding_size|hidden_dim)", E),
    (r"(\w+_)(hidden_size|hidden_dim|d_model|embed_dim|projection_dim|embedding_size)", E),
    (r"projection_dim|output_dim|rnn_hidden_size|d_embed|embedding_dim|attention_hidden_size", E),
    (r"lru_width|conv_dim_out|dim_model|word_embed_proj_dim|text_embed_dim|output_hidden_size", E),
    (r"\w*(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r"\w*experts_per_tok|moe_k|num_selected_experts|moe_topk|top_k|moe_top_k", 2),
    (r"n_group|topk_group|num_expert_groups", 1),
    (r"max_source_positions", 32),
    (r"max_target_positions|max_position_embeddings|n_positions|max_seq_len\w*|context_length", 64),
    (r"sliding_window|attention_window|local_attention|window_size|attention_chunk_size", 8),
    (r"\w*image_size|input_size|crop_size|pretrain_img_size", IMAGE),
    (r"\w*patch_size|encoder_stride", PATCH),
    (r"num_mel_bins|feature_size|input_feat_per_channel", MEL),
    (r"num_queries|num_query_tokens|num_latents|encoder_seq_length", 6),
    (r"state_size|mamba_d_state|ssm_state_size|time_step_rank", 8),
    (r"num_conv_pos_embeddings|num_conv_pos_embedding_groups", 4),
)

# Sizes that do not follow from names of fields.
EXCEPTIONS: dict[str, dict[str, Any]] = {}


def families() -> dict[str, str]:
    """Returns the class to train for each type of model."""
    found: dict[str, str] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            name = names if isinstance(names, str) else names[0]
            found.setdefault(model_type, name)
    return found


def _small(name: str, default: object) -> tuple[bool, Any]:
    for pattern, value in SIZES:
        if re.fullmatch(pattern, name):
            return not isinstance(default, (list, tuple, dict, str)), value
    return False, None


def small_config(config_class: type[PreTrainedConfig], **options: Any) -> PreTrainedConfig:
    """Returns a config with small sizes and no dropout."""
    sizes: dict[str, Any] = {}
    subs = getattr(config_class, "sub_configs", {})
    for name, parameter in inspect.signature(config_class).parameters.items():
        known, value = _small(name, parameter.default)
        if known and name not in subs:
            sizes[name] = value
    for name, sub in subs.items():
        if sub is not transformers.AutoConfig:
            sizes[name] = small_config(sub).to_dict()
        else:
            default = getattr(config_class(), name, None)
            if isinstance(default, PreTrainedConfig):
                sizes[name] = small_config(type(default)).to_dict()
    return config_class(**{**sizes, **options})


def build(model_type: str) -> nn.Module:
    """Builds a random model of the family, always the same."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    config = small_config(config_class, **EXCEPTIONS.get(model_type, {}))
    model_class = getattr(transformers, families()[model_type])
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count} Parameters are too many.")
    torch.manual_seed(0)
    model: nn.Module = model_class(config).train()
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, V - 8, (2, LENGTH), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "input_ids": ids,
        "decoder_input_ids": ids.flip(1),
        "pixel_values": noise(2, 3, IMAGE, IMAGE),
        "input_features": noise(2, MEL, 64),
        "input_values": noise(2, 4000),
        "bbox": torch.arange(4).expand(2, LENGTH, 4) + 1,
    }


def inputs(model: Any) -> Iterator[dict[str, Tensor]]:
    """Returns possible inputs of the model, the fullest text first."""
    takes = inspect.signature(model.forward).parameters
    every = {name: t for name, t in _tensors(model).items() if name in takes}
    labels = {"labels": every["input_ids"]} if {"labels", "input_ids"} <= takes.keys() else {}
    text = [name for name in ("input_ids", "bbox") if name in every]
    decoder = [name for name in ("decoder_input_ids",) if name in every]
    others = [n for n in every if n not in (*text, *decoder)]
    choices: list[list[str]] = [text, text + decoder]
    for name in others:
        choices += [[*text, name], [name], [name, *decoder], [*text, *decoder, name]]
    for names in choices:
        if names:
            chosen = {name: every[name] for name in names}
            if labels and "input_ids" in chosen:
                yield {**chosen, **labels}
            yield chosen


def loss_of(output: Any) -> Tensor:
    """Reduces all floating-point tensors of the output to a number."""
    total = torch.zeros(())
    for tensor in _flat(output):
        if tensor.is_floating_point() and tensor.requires_grad:
            weight = torch.linspace(0.1, 2.0, max(1, tensor.numel())).sin()[: tensor.numel()]
            total = (
                total + (tensor.float().flatten() * weight).sum() / max(1, tensor.numel()) ** 0.5
            )
    return total


def _flat(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _flat(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _flat(value)


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 2) -> list[float]:
    """Returns the losses of SGD steps on the same batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        torch.manual_seed(1)
        optimizer.zero_grad()
        loss = loss_of(model(**{name: tensor.clone() for name, tensor in batch.items()}))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
