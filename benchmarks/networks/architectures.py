"""Architectures of `transformers`, each from a small random configuration."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from networks._make import CLASSES, Draw, Split, workload
from quadriga.testing.zoo import ZOO

VOCABULARY, LENGTH = 50, 10
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = {**TEXT, "use_cache": False}
LABELS = {"num_labels": CLASSES}
SPEECH = {
    **SIZES, **LABELS, "num_hidden_layers": 2, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8,
    "mask_time_prob": 0.0, "vocab_size": VOCABULARY,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "decoder_start_token_id": 1, "use_cache": False,
}  # fmt: skip
PYRAMID = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]}


def masked(count: int, generator: torch.Generator) -> Split:
    """Tokens with a mask, and classes."""
    words = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}, labels(count, generator)


def following(count: int, generator: torch.Generator) -> Split:
    """Tokens, and the tokens after them."""
    words = torch.randint(3, VOCABULARY, (count, LENGTH + 1), generator=generator)
    return {"input_ids": words[:, :-1].contiguous()}, words[:, 1:].contiguous()


def translated(count: int, generator: torch.Generator) -> Split:
    """Tokens of two languages."""
    inputs, target = following(count, generator)
    source = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    return {"input_ids": source, "decoder_input_ids": inputs["input_ids"]}, target


def floats(key: str, *shape: int) -> Draw:
    """One input of floats, and classes."""

    def draw(count: int, generator: torch.Generator) -> Split:
        return {key: torch.randn(count, *shape, generator=generator)}, labels(count, generator)

    return draw


def labels(count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count]."""
    return torch.randint(CLASSES, (count,), generator=generator)


IMAGE, SOUND = floats("pixel_values", 3, 32, 32), floats("input_values", 400)
Architecture = tuple[str, dict[str, Any], Draw]
ARCHITECTURES: dict[str, Architecture] = {
    "roberta": ("RobertaForSequenceClassification", {**TEXT, **LABELS, "max_position_embeddings": 40}, masked),
    "albert": ("AlbertForSequenceClassification", {**TEXT, **LABELS, "embedding_size": 8}, masked),
    "electra": ("ElectraForSequenceClassification", {**TEXT, **LABELS, "embedding_size": 8}, masked),
    "mpnet": ("MPNetForSequenceClassification", {**TEXT, **LABELS}, masked),
    "modernbert": ("ModernBertForSequenceClassification", {**TEXT, **LABELS, "cls_token_id": 1, "sep_token_id": 2}, masked),
    "bert_masked": ("BertForMaskedLM", TEXT, following),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, **LABELS},
        masked,
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        {**TEXT, **LABELS, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
        masked,
    ),
    "mistral": ("MistralForCausalLM", {**LANGUAGE, "num_key_value_heads": 2}, following),
    "gemma2": ("Gemma2ForCausalLM", {**LANGUAGE, "num_key_value_heads": 2, "head_dim": 8}, following),
    "phi": ("PhiForCausalLM", LANGUAGE, following),
    "phi3": ("Phi3ForCausalLM", {**LANGUAGE, "num_key_value_heads": 2}, following),
    "gpt_neox": ("GPTNeoXForCausalLM", LANGUAGE, following),
    "opt": ("OPTForCausalLM", {**{k: v for k, v in LANGUAGE.items() if k != "intermediate_size"}, "ffn_dim": 24}, following),
    "bloom": ("BloomForCausalLM", {**LANGUAGE, "n_layer": 3, "n_head": 4}, following),
    "falcon": ("FalconForCausalLM", LANGUAGE, following),
    "mixtral": ("MixtralForCausalLM", {**LANGUAGE, "num_key_value_heads": 2, "num_local_experts": 2}, following),
    "olmo2": ("Olmo2ForCausalLM", LANGUAGE, following),
    "mamba": ("MambaForCausalLM", {**LANGUAGE, "num_hidden_layers": 2, "state_size": 4}, following),
    "t5": ("T5ForConditionalGeneration", T5, translated),
    "t5_gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        translated,
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "use_cache": False,
            "max_position_embeddings": 32,
        },
        translated,
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], **LABELS},
        IMAGE,
    ),
    "regnet": (
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "groups_width": 8, **LABELS},
        IMAGE,
    ),
    "convnext2": (
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, **LABELS},
        IMAGE,
    ),
    "mobilenet2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, **LABELS}, IMAGE),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, **LABELS},
        IMAGE,
    ),
    "deit": ("DeiTForImageClassification", {**SIZES, **LABELS, "image_size": 32, "patch_size": 8}, IMAGE),
    "beit": (
        "BeitForImageClassification",
        {**SIZES, **LABELS, "image_size": 32, "patch_size": 8, "use_relative_position_bias": True},
        IMAGE,
    ),
    "dinov2": ("Dinov2ForImageClassification", {**SIZES, **LABELS, "image_size": 32, "patch_size": 8}, IMAGE),
    "segformer": (
        "SegformerForImageClassification",
        {**PYRAMID, "sr_ratios": [2, 1], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], **LABELS},
        IMAGE,
    ),
    "poolformer": ("PoolFormerForImageClassification", {**PYRAMID, "padding": [2, 1], **LABELS}, IMAGE),
    "spectrogram": (
        "ASTForAudioClassification",
        {
            **SIZES, **LABELS, "patch_size": 4, "max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4,
        },
        floats("input_values", 16, 8),
    ),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", SPEECH, SOUND),
    "conformer": ("Wav2Vec2ConformerForSequenceClassification", {**SPEECH, "position_embeddings_type": "relative"}, SOUND),
    "hubert": ("HubertForSequenceClassification", SPEECH, SOUND),
}  # fmt: skip


def build(name: str, config: dict[str, Any]) -> nn.Module:
    """The model of that class with drawn weights."""
    import transformers

    cls = getattr(transformers, name)
    return cls(cls.config_class(**config))  # type: ignore[no-any-return]


WORKLOADS: dict[str, Callable[..., Any]] = {
    **ZOO,
    **{name: partial(workload, name, partial(build, cls, config), draw) for name, (cls, config, draw) in ARCHITECTURES.items()},
}
