"""Small random models of `transformers`, as workloads: architectures that no method here was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.core.workload import Workload

VOCABULARY, WIDTH, LAYERS, HEADS, INNER, POSITIONS = 50, 16, 3, 4, 24, 10
Split = tuple[Any, Tensor]
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}


def bert(*, trained: bool = True) -> Workload:
    """BERT with a classifier: dict inputs, absolute positions, post-norm."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**COMMON, intermediate_size=INNER, num_labels=3)
    return _workload("bert", lambda: BertForSequenceClassification(config), _masked(3), trained)


def llama(*, trained: bool = True) -> Workload:
    """Llama: rotary positions, two query heads to each key head, gated feed-forward, untied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**COMMON, num_key_value_heads=2, intermediate_size=INNER, use_cache=False)
    return _workload("llama", lambda: LlamaForCausalLM(config), _next_tokens, trained)


def qwen(*, trained: bool = True) -> Workload:
    """Qwen 3: norms on queries and keys, head width apart from the hidden one, head tied to the embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **COMMON, num_key_value_heads=2, head_dim=8, intermediate_size=INNER, tie_word_embeddings=True, use_cache=False
    )
    return _workload("qwen", lambda: Qwen3ForCausalLM(config), _next_tokens, trained)


def gpt2(*, trained: bool = True) -> Workload:
    """GPT-2: queries, keys and values in one `Conv1D`, learned positions, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=INNER, n_positions=32,
        bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return _workload("gpt2", lambda: GPT2LMHeadModel(config), _next_tokens, trained)


def vit(*, trained: bool = True) -> Workload:
    """ViT: a convolution cuts patches, a class token is read."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
        image_size=16, patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip

    def images(count: int, generator: torch.Generator) -> Split:
        pictures = torch.randn(count, 1, 16, 16, generator=generator)
        return {"pixel_values": pictures}, torch.randint(3, (count,), generator=generator)

    return _workload("vit", lambda: ViTForImageClassification(config), images, trained)


def whisper(*, trained: bool = True) -> Workload:
    """Whisper: encoder and decoder with cross attention, convolutions over a spectrogram."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS, num_mel_bins=8,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=INNER,
        max_source_positions=12, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip

    def speech(count: int, generator: torch.Generator) -> Split:
        tokens = torch.randint(3, VOCABULARY, (count, POSITIONS + 1), generator=generator)
        sound = torch.randn(count, 8, 24, generator=generator)
        return {"input_features": sound, "decoder_input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    return _workload("whisper", lambda: WhisperForConditionalGeneration(config), speech, trained)


ZOO: dict[str, Callable[..., Workload]] = {
    "bert": bert,
    "llama": llama,
    "qwen": qwen,
    "gpt2": gpt2,
    "vit": vit,
    "whisper": whisper,
}


def _masked(classes: int) -> Callable[[int, torch.Generator], Split]:
    def make(count: int, generator: torch.Generator) -> Split:
        tokens = torch.randint(VOCABULARY, (count, POSITIONS), generator=generator)
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask}, torch.randint(classes, (count,), generator=generator)

    return make


def _next_tokens(count: int, generator: torch.Generator) -> Split:
    tokens = torch.randint(VOCABULARY, (count, POSITIONS + 1), generator=generator)
    return {"input_ids": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def _workload(
    name: str, build: Callable[[], nn.Module], make: Callable[[int, torch.Generator], Split], trained: bool
) -> Workload:
    generator = torch.Generator().manual_seed(1)
    data = {split: make(count, generator) for split, count in (("train", 24), ("val", 24), ("test", 24))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    metric = "accuracy" if data["val"][1].dim() == 1 else "bits_per_byte"
    return Workload(model=model, **data, metric=metric, batch_size=12, trained=trained, name=f"zoo_{name}", classes_dim=-1)
