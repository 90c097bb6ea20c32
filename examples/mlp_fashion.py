"""A two-layer perceptron that tells pictures of clothes apart: `quadriga run examples/mlp_fashion.py`."""

from torch import nn

from quadriga import Recipe, Workload, step
from quadriga.workloads import fashion_mnist


def model():
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def workload():
    data = fashion_mnist(pad=0)
    train, val, test = ((split.inputs.flatten(1), split.target) for split in (data.train, data.val, data.test))
    return Workload(
        model=model,
        train=train,
        val=val,
        test=test,
        loss="cross_entropy",
        metric="accuracy",
        name="mlp",
        baseline=Recipe((step("optimizer", kind="adam", lr=0.001), step("train", epochs=5))),
        data_note=data.note,
    )
