"""The pretrained MiniLM encoder, fine-tuned to classify WordNet's definitions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quadriga.core.data import TensorData
from quadriga.core.errors import BadInput
from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads import fetch
from quadriga.workloads.few import checked
from quadriga.workloads.glosses import CLASSES, Row, note, rows

LENGTH = 32  # tokens, with [CLS] and [SEP]
WORDS = 24  # of a definition, so that the splits are those of lstm_wordnet
SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
UNUSED = ("pooler.", "embeddings.position_ids")  # sentence embeddings are means, and positions are counted


class Encoder(nn.Module):
    """A BERT encoder, the mean of its states over the words that are there, and a linear layer.

    Args:
        config: sizes of `transformers.BertConfig` that are not its defaults.
        classes: of the last layer.

    Source: Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084 (mean pooling).
    """

    def __init__(self, config: Mapping[str, Any], classes: int = CLASSES) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(**config), add_pooling_layer=False)
        self.fc = nn.Linear(self.bert.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # both [batch, length] int64 → [batch, classes]
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        there = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.fc((states * there).sum(1) / there.sum(1))


def pretrained(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Encoder:
    """The encoder with the given weights under a new last layer.

    Raises:
        RuntimeError: a weight is missing, unknown or of another shape.
    """
    model = Encoder(config)
    model.bert.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}, strict=True)
    return model


def encode(tokenizer: Any, found: list[Row]) -> TensorData:
    """Rows of (label, words) as {"input_ids", "attention_mask"}, both int64 [n, LENGTH], with labels int64 [n]."""
    made = tokenizer.encode_batch_fast([" ".join(words) for _, words in found])
    ids, mask = torch.tensor([e.ids for e in made]), torch.tensor([e.attention_mask for e in made])
    return TensorData({"input_ids": ids, "attention_mask": mask}, torch.tensor([label for label, _ in found]))


def read_tokenizer(path: Path) -> Any:
    """A tokenizer that cuts and pads on the right to LENGTH.

    Raises:
        BadInput: `transformers`, which brings it, is not installed.
    """
    try:
        import tokenizers
        import transformers  # noqa: F401 (the encoder; better missed now than when the model is built)
    except ImportError as error:
        raise BadInput("minilm_wordnet needs the package transformers", 'pip install "quadriga[text]"') from error
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return tokenizer


def workload(examples: int = 20_000, held_out: int | None = None) -> Workload:
    """The definitions of lstm_wordnet as 32 word pieces with their mask, 45 classes; one epoch of fine-tuning by AdamW.

    `quadriga fetch minilm_wordnet` brings weights and tokenizer.

    Args:
        examples: keep that many training examples, of 98,761.
        held_out: keep that many examples of val and of test; all by default.

    Raises:
        BadInput: the weights are not in the cache, or `transformers` is not installed.
    """
    files = fetch.fetched("minilm")
    tokenizer = read_tokenizer(files["tokenizer.json"])
    held_out = checked(held_out, "held_out")
    counts = {"train": checked(examples, "examples"), "val": held_out, "test": held_out}
    splits = {name: found[: counts[name]] for name, found in rows(WORDS).items()}
    steps = (step("optimizer", kind="adamw", lr=0.0002), step("schedule", kind="linear", warmup=0.05), step("train", epochs=1))
    return Workload(
        model=partial(pretrained, load_file(files["model.safetensors"]), SIZES),
        train=encode(tokenizer, splits["train"]),
        val=encode(tokenizer, splits["val"]),
        test=encode(tokenizer, splits["test"]),
        name="minilm_wordnet",
        batch_size=32,
        baseline=Recipe(steps, "baseline"),
        data_note={**note(splits), "weights": fetch.note("minilm")},
    )
