"""A network of timm, trained by its user: `mobilenetv3_small_050` for one channel and 64 pixels, on 8,000 pictures of clothes.

    python benchmarks/networks/mobilenetv3_fashion.py      # six epochs of AdamW, once; keeps the weights under out/networks/
    quadriga run benchmarks/networks/mobilenetv3_fashion.py:workload --floor -0.5pt --minimize latency --budget 12m

Needs `timm` and `torchvision`, of which Quadriga asks for neither; `make bench-timm` brings both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from of_timm import load_timm
from torch import nn

from quadriga import Workload
from quadriga.workloads.fashion import Splits, enlarged, fashion_mnist

WEIGHTS = Path(__file__).resolve().parents[2] / "out/networks/mobilenetv3_fashion.pt"
EXAMPLES, SIDE, BATCH, EPOCHS = 8000, 64, 32, 6


def network() -> nn.Module:
    """Untrained."""
    return load_timm().create_model("mobilenetv3_small_050", in_chans=1, num_classes=10)


def data() -> Splits:
    """Fashion-MNIST enlarged to 1×64×64, of train the first 8,000."""
    return enlarged(fashion_mnist(pad=0), SIDE, EXAMPLES)


def workload() -> Workload:
    """The network as its user trained it.

    Raises:
        FileNotFoundError: it was not trained yet.
    """
    model, splits = network(), data()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return Workload(
        model=model.eval(), train=splits.train, val=splits.val, test=splits.test, loss="cross_entropy", metric="accuracy",
        name="mobilenetv3_fashion", batch_size=BATCH, trained=True, invariances=frozenset({"horizontal_flip"}),
        data_note=splits.note,
    )  # fmt: skip


def train() -> None:
    """Six epochs of AdamW with a rate that falls to zero."""
    torch.manual_seed(0)
    model, splits = network(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = EPOCHS * -(-len(splits.train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for epoch in range(EPOCHS):
        model.train()
        for rows in torch.randperm(len(splits.train)).split(BATCH):
            batch = splits.train.batch(rows)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.inputs), batch.target).backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(model, splits):.2f} % on val", flush=True)
    WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), WEIGHTS)


@torch.no_grad()
def accuracy(model: nn.Module, splits: Splits) -> float:
    """On val, in percent."""
    model.eval()
    batches = [splits.val.batch(rows) for rows in torch.arange(len(splits.val)).split(256)]
    right = sum(int((model(b.inputs).argmax(1) == b.target).sum()) for b in batches)
    return 100 * right / len(splits.val)


if __name__ == "__main__":
    train()
