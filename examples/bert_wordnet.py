"""A BERT-like classifier of dictionary definitions, from a `transformers` configuration with random weights.

`pip install transformers`, then `quadriga run examples/bert_wordnet.py`.
"""

from quadriga import Recipe, Workload, step
from quadriga.workloads import wordnet_glosses


def model():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8192,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=24,
        num_labels=45,
    )
    return BertForSequenceClassification(config)


def split(data):
    """A batch is a dict, as `transformers` models take it."""
    return {"input_ids": data.inputs, "attention_mask": (data.inputs != 0).long()}, data.target


def workload():
    data = wordnet_glosses(length=24, examples=12_000)
    return Workload(
        model=model,
        train=split(data.train),
        val=split(data.val),
        test=split(data.test),
        name="bert",
        batch_size=32,
        baseline=Recipe((step("optimizer", kind="adamw", lr=0.001), step("train", epochs=2))),
        data_note=data.note,
    )
