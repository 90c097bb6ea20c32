"""A two-layer LSTM that classifies WordNet's definitions."""

from __future__ import annotations

from torch import Tensor, nn

from quadriga.core.recipe import Recipe, step
from quadriga.core.workload import Workload
from quadriga.workloads.few import few
from quadriga.workloads.glosses import CLASSES, wordnet_glosses


class Classifier(nn.Module):
    """Embedding, two LSTM layers, and a linear layer on the last word's state."""

    def __init__(self, vocabulary: int = 8192, embedding: int = 64, hidden: int = 128, classes: int = CLASSES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, tokens: Tensor) -> Tensor:  # tokens[batch, length] int64, padded on the left → [batch, classes]
        states, _ = self.lstm(self.embedding(tokens))
        return self.fc(states[:, -1])


def workload(examples: int | None = None, held_out: int | None = None) -> Workload:
    """24 words a definition, 45 classes, trained by Adam.

    Args:
        examples: keep that many training examples; all by default, about 95,000.
        held_out: keep that many examples of val and of test; all by default.
    """
    data = few(wordnet_glosses(length=24, size=8192, examples=examples), None, held_out)  # the vocabulary is that of `examples`
    return Workload(
        model=Classifier,
        train=data.train,
        val=data.val,
        test=data.test,
        name="lstm_wordnet",
        batch_size=64,
        baseline=Recipe((step("optimizer", kind="adam", lr=0.002), step("train", epochs=3)), "baseline"),
        data_note=data.note,
    )
