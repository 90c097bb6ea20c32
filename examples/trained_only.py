"""A model that comes trained, with data to judge it by and none to train it: `quadriga run examples/trained_only.py`.

It stands for your own checkpoint. Here 512 fixed random features are followed by a layer fitted by least squares.
"""

import torch
from torch import nn

from quadriga import Workload
from quadriga.workloads import fashion_mnist


def fitted(images, labels):
    torch.manual_seed(0)
    hidden, last = nn.Linear(784, 512), nn.Linear(512, 10)
    with torch.no_grad():
        features = torch.cat([torch.relu(hidden(images)), torch.ones(len(images), 1)], 1)
        wanted = nn.functional.one_hot(labels, 10).float()
        gram = features.T @ features + 10 * torch.eye(513)
        solution = torch.linalg.solve(gram, features.T @ wanted)  # [513, 10]
        last.weight.copy_(solution[:-1].T)
        last.bias.copy_(solution[-1])
    return nn.Sequential(hidden, nn.ReLU(), last)


def workload():
    data = fashion_mnist(pad=0)
    flat = {name: getattr(data, name).inputs.flatten(1) for name in ("train", "val", "test")}
    return Workload(
        model=fitted(flat["train"][:10_000], data.train.target[:10_000]),
        val=(flat["val"], data.val.target),
        test=(flat["test"], data.test.target),
        trained=True,
        name="trained_only",
        data_note=data.note,
    )
