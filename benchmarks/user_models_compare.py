"""What an artifact gives beside plain PyTorch: started alone by `user_models.py`, and nothing of Quadriga is imported.

    python benchmarks/user_models_compare.py FORM FOLDER …      # prints one JSON object: folder's name → verdict

The reference is the form's own module with the weights of the checkpoint beside the artifact; a form that comes trained is
its own reference.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "networks"))
SIZES = (1, 3, 64)
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output under a name; caches and other objects are none."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        yield from tensors({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, name)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors(part, f"{name}.{key}")
    elif isinstance(value, tuple | list):
        for number, part in enumerate(value):
            yield from tensors(part, f"{name}.{number}")


def mapped(function: Any, tree: Any) -> Any:
    """A tree of inputs or targets with its tensors changed."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {k: mapped(function, v) for k, v in tree.items()}
    return tuple(mapped(function, v) for v in tree) if isinstance(tree, tuple | list) else tree


def examples(split: Any, count: int) -> tuple[Any, Any]:
    """The first examples of a split: tensors (inputs, target), a dict with labels, or a loader."""
    if hasattr(split, "dataset"):
        return split.collate_fn([split.dataset[i] for i in range(min(count, len(split.dataset)))])
    if isinstance(split, Mapping):
        split = ({k: v for k, v in split.items() if k != "labels"}, split["labels"])
    return mapped(lambda t: t[:count].clone(), split[0]), mapped(lambda t: t[:count].clone(), split[1])


def repeated(inputs: Any, count: int) -> Any:
    """Exactly so many examples."""
    return mapped(lambda t: t.repeat((-(-count // len(t)),) + (1,) * (t.dim() - 1))[:count].clone(), inputs)


def called(model: Any, inputs: Any) -> Any:
    """A dict spreads as keywords, a tuple as arguments."""
    inputs = mapped(lambda t: t.clone(), inputs)
    with torch.no_grad():
        return (
            model(**inputs) if isinstance(inputs, Mapping) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        )


def reference(plain: Mapping[str, Any], folder: Path, inputs: Any) -> nn.Module:
    """The form's module in eval mode, with the trained weights."""
    model = plain["model"]
    if not isinstance(model, nn.Module):
        torch.manual_seed(0)
        model = model()
    model = getattr(model, "_orig_mod", model)
    model = model.module if isinstance(model, nn.DataParallel) else model
    states = sorted((folder / "checkpoints").glob("*/state.json"))
    if not plain.get("trained"):
        called(model.eval(), inputs)  # a lazy module has weights from its first batch on
        kept = json.loads(states[-1].read_text())
        load(model, states[-1].parent, kept)
    return model.eval()


def load(model: nn.Module, folder: Path, kept: Mapping[str, Any]) -> None:
    """Weights by name, as PyTorch loads them; of tied ones each is there once."""
    from safetensors.torch import load_file

    state = load_file(next(iter(sorted(folder.glob("model-*.safetensors"), reverse=True))))
    state = {name.removeprefix("_orig_mod.").removeprefix("module."): t for name, t in state.items()}
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(state) <= set(
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    )
    assert set(names) <= set(state), f"the checkpoint lacks {sorted(set(names) - set(state))[:3]}"
    with torch.no_grad():
        for name, tensor in names.items():
            tensor.copy_(state[name])


def loaded(folder: Path) -> Any:
    """The artifact through its own load.py, checks and all."""
    spec = importlib.util.spec_from_file_location("artifact_load", folder / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest error over the largest magnitude; of integers and booleans the share that differs."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return float((expected != found).double().mean())
    gap, scale = (expected.double() - found.double()).abs().max(), expected.double().abs().max().clamp_min(1e-30)
    return float((gap / scale).nan_to_num(float("inf")))


def compared(model: nn.Module, artifact: Any, inputs: Any) -> tuple[float, str]:
    """The worst difference over all sizes and outputs, and where."""
    worst, where = 0.0, ""
    for size in SIZES:
        given = repeated(inputs, size)
        expected, found = dict(tensors(called(model, given))), dict(tensors(called(artifact, given)))
        if not isinstance(found, dict) or set(found) - set(expected):
            return float("inf"), f"outputs {sorted(found)} in place of {sorted(expected)}"
        if missing := set(expected) - set(found):
            return float("inf"), f"no output {sorted(missing)[0]}"
        for name, value in expected.items():
            if (apart := difference(value, found[name])) > worst:
                worst, where = apart, f"{name} at batch {size}: {list(value.shape)} {value.dtype}, {list(found[name].shape)}"
    return worst, where


def accuracy(outputs: Any, target: Any) -> float:
    """In points, of the logits, or the first tensor."""
    found = dict(tensors(outputs))
    logits = found.get("output.logits", next(iter(found.values())))
    return 100 * float((logits.argmax(-1) == target).double().mean())


def verdict(plain: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One artifact: outputs beside the reference, and the stated quality beside what its outputs score on val."""
    inputs, _ = examples(plain["test"], 64)
    model = reference(plain, folder, inputs)
    artifact = loaded(folder / "artifact")
    worst, where = compared(model, artifact, inputs)
    kinds = [t.dtype for t in [*model.parameters(), *model.buffers(), *dict(tensors(inputs)).values()] if t.is_floating_point()]
    allowed = max((ALLOWED.get(kind, 0.0) for kind in kinds), default=1e-3)
    found = {"difference": worst, "allowed": allowed, "where": where if worst > allowed else ""}
    if (said := json.loads((folder / "train.json").read_text()).get("quality")) is not None:
        inputs, target = examples(plain["val"], 10_000)
        scored = plain.get("score", accuracy)(called(artifact, inputs), target)
        found |= {"quality": said, "scored": scored}
    return found


def scored(plain: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The artifact of a study: the quality stated, of the winner or else of the baseline, beside what its outputs score."""
    result = json.loads((folder / "result.json").read_text())
    said = result["winner"]["quality"]["value"] if result["winner"] else result["baseline"]["quality"]
    split = "test" if result["winner"] else result["baseline"].get("quality_split", "test")
    inputs, target = examples(plain[split], 10_000)
    return {"quality": said, "scored": plain.get("score", accuracy)(called(loaded(folder / "artifact"), inputs), target)}


def main() -> int:
    """Compare every folder; what raises is a verdict too."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from user_models_forms import forms

    plain, out = forms()[sys.argv[1]].plain, {}
    for folder in map(Path, sys.argv[2:]):
        try:
            out[folder.name] = (scored if folder.name == "run" else verdict)(plain(), folder)
        except Exception as error:
            out[folder.name] = {"raised": f"{type(error).__name__}: {error}"[:500]}
    assert not any(name.split(".")[0] == "quadriga" for name in sys.modules), "the reference has to be PyTorch alone"
    print(json.dumps(out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
