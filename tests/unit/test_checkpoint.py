"""Checkpoints: killed and resumed is bit-identical, damage is found, continuing adds up, nothing of the state is lost."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import resumable
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.core.slots import Hook, OptimizerSlot
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.checkpoint import load_model, load_state, read_state, save_state
from quadriga.train.config import describe
from quadriga.train.loop import fit
from quadriga.train.pack import pack, unpack

torch.set_num_threads(1)
HERE = Path(__file__).parent
EPOCHS = 2.0  # 12 steps


def process(folder, *kill):
    """Run `resumable.py`; its exit status and words."""
    done = subprocess.run(
        [sys.executable, str(HERE / "resumable.py"), str(folder), str(EPOCHS), *map(str, kill)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.split(), done.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The fingerprint of an uninterrupted run in this process."""
    return resumable.run(tmp_path_factory.mktemp("straight"), EPOCHS)[0]


def test_killed_and_resumed_is_bit_identical(tmp_path, straight):
    """SIGKILL at a late step, then at a rename inside a save; the third process ends with the straight run's bits."""
    step = random.Random(int(straight[:8], 16)).randint(8, 11)
    assert process(tmp_path, step)[0] == -signal.SIGKILL
    assert read_state(tmp_path).extra["done"] == step - 1
    status, _, _ = process(tmp_path, 0, 5)
    assert status == -signal.SIGKILL
    status, words, error = process(tmp_path)
    assert status == 0, error
    assert words == [straight, "12", "True"]
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("rename", range(1, 9))
def test_killed_at_any_rename_leaves_a_state(tmp_path, rename, straight, monkeypatch):
    """The first save renames three files, later ones four; wherever it stops, what is there loads and ends the same."""

    class Cut(BaseException):
        pass

    real, seen = os.replace, []

    def cut(source, target):
        seen.append(target)
        if len(seen) == rename:
            raise Cut
        real(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Cut):
        resumable.run(tmp_path, EPOCHS)
    monkeypatch.undo()
    state = read_state(tmp_path)
    assert (state.extra["done"] if state else 0) == (0 if rename <= 3 else 1 if rename <= 7 else 2)
    assert resumable.run(tmp_path, EPOCHS)[0] == straight
    assert len(list(tmp_path.iterdir())) == 6, "two states and their pointers, nothing else"


def test_a_finished_checkpoint_is_only_loaded(tmp_path, straight):
    """A second fit trains nothing, gives the same weights, hook state and figures."""
    _, first = resumable.run(tmp_path, EPOCHS)
    setup, data = resumable.make(kill=1)  # would be killed at its first step
    second = fit(setup, data, epochs=EPOCHS, seed=resumable.SEED, checkpoint=tmp_path)
    assert fingerprint(setup.model) == straight
    assert replace(first, path=None) == replace(second, path=None)
    assert second.hooks[0].count == 12 and second.hooks[0].noise == first.hooks[0].noise


@pytest.mark.parametrize("kind", ["model", "optimizer", "state"])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damage_is_found(tmp_path, kind, damage, straight):
    """A flipped byte or a truncated file: the state before is taken, and training ends the same; without it, an error."""
    resumable.run(tmp_path, EPOCHS)
    newest = (
        tmp_path / "state.json" if kind == "state" else max(tmp_path.glob(f"{kind}-*"), key=lambda p: int(p.stem.split("-")[1]))
    )
    data = bytearray(newest.read_bytes())
    middle = data.index(b'"done"') + 9 if kind == "state" else len(data) // 2
    newest.write_bytes(
        data[: len(data) // 2] if damage == "cut" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    )
    with pytest.raises(BadInput, match="is damaged") as caught:
        load_model(tmp_path, tiny_cnn().build())
    assert newest.name in str(caught.value)
    mark, outcome = resumable.run(tmp_path, EPOCHS)
    assert mark == straight and "went back to the state before" in outcome.note
    assert read_state(tmp_path).extra["finished"]


def test_damage_without_an_older_state(tmp_path):
    resumable.run(tmp_path, 1 / 6)
    (tmp_path / "previous.json").unlink(missing_ok=True)
    path = next(tmp_path.glob("model-*"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInput, match=path.name):
        resumable.run(tmp_path, 1 / 6)
    path.unlink()
    with pytest.raises(BadInput, match=path.name):
        resumable.run(tmp_path, 1 / 6)


def mlp_setup(**options):
    workload = tiny_mlp()
    make = lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})  # noqa: E731
    return replace(Setup.of(workload), optimizer=OptimizerSlot(make)), workload.train


@pytest.mark.parametrize(
    ("change", "word"),
    [({"epochs": 3}, "epochs"), ({"seed": 1}, "seed"), ({"lr": 0.1}, "optimizer's values"), ({"nesterov": True}, None)],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, word):
    """The message names what differs."""
    setup, data = mlp_setup()
    fit(setup, data, epochs=1, seed=0, checkpoint=tmp_path)
    options = {k: v for k, v in change.items() if k in ("lr", "nesterov")}
    arguments = {"epochs": 1, "seed": 0} | {k: v for k, v in change.items() if k not in options}
    other, _ = mlp_setup(**options)
    if word is None:
        fit(other, data, **arguments, checkpoint=tmp_path)
        return
    with pytest.raises(BadInput, match=f"another run: {word}"):
        fit(other, data, **arguments, checkpoint=tmp_path)


def test_other_data_transforms_schedules_and_models_are_another_run(tmp_path):
    setup, data = resumable.make()
    fit(setup, data, epochs=1 / 6, seed=0, checkpoint=tmp_path)
    training = setup.training
    for slot in (
        replace(training, batch_size=8),
        replace(training, transforms=training.transforms[:2]),
        replace(training, transforms=(*training.transforms[:2], lambda b, g: b)),
        replace(training, schedules=()),
        replace(training, make_hooks=()),
        replace(training, loss=lambda o, b: o.sum()),
    ):
        with pytest.raises(BadInput, match="another run"):
            fit(replace(setup, training=slot), data, epochs=1 / 6, seed=0, checkpoint=tmp_path)
    with pytest.raises(BadInput, match="another run"):
        fit(setup, data.part(torch.arange(90)), epochs=1 / 6, seed=0, checkpoint=tmp_path)
    with pytest.raises(BadInput, match="another model"):
        load_model(tmp_path, tiny_mlp().build())


def test_other_threads_are_marked(tmp_path):
    """A resumption with another number of threads goes on, and says that it is not bit-exact."""

    class Stop(Exception):
        pass

    class StopAt(Hook):
        def after_backward(self, model, progress):
            if progress >= 0.5 and stop:
                raise Stop

    setup, data = mlp_setup()
    setup = replace(setup, training=replace(setup.training, make_hooks=(lambda m: StopAt(),)))
    stop = True
    with pytest.raises(Stop):
        fit(setup, data, epochs=1, seed=0, checkpoint=tmp_path, every=0)
    stop = False
    other = replace(setup, runtime=replace(setup.runtime, threads=2))
    outcome = fit(other, data, epochs=1, seed=0, checkpoint=tmp_path)
    assert not outcome.exact and "threads is 2, was 1" in outcome.note
    assert not fit(setup, data, epochs=1, seed=0, checkpoint=tmp_path).exact


@pytest.mark.parametrize("parts", [(1, 3), (0.5, 3.5), (2.25, 1.75)])
@pytest.mark.parametrize("build", [tiny_cnn, tiny_transformer])
def test_continuing_equals_training_longer(tmp_path, parts, build):
    """Four epochs at a constant rate are bit for bit what one epoch and three more are; 90 examples, batches of 16."""
    marks = []
    for lengths in ((4.0,), parts):
        workload = build((90, 20, 20))
        setup = replace(Setup.of(workload), optimizer=OptimizerSlot(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)))
        start, steps = None, 0
        for number, epochs in enumerate(lengths):
            folder = tmp_path / f"{len(lengths)}-{number}"
            if start is not None:  # the weights come from the checkpoint
                nn.init.zeros_(next(setup.model.parameters()))
            outcome = fit(setup, workload.train, epochs=epochs, seed=3, start=start, checkpoint=folder)
            start, steps = folder, steps + outcome.steps
        assert steps == 23
        marks.append(fingerprint(setup.model))
    assert marks[0] == marks[1]


def test_continuing_another_model_or_optimizer_is_refused(tmp_path):
    """What changed since is named, as a refusal: a recipe asks for something that cannot be."""
    setup, data = mlp_setup()
    fit(setup, data, epochs=1, seed=0, checkpoint=tmp_path)
    adam = replace(setup, optimizer=OptimizerSlot(lambda m: torch.optim.Adam(m.parameters())))
    with pytest.raises(NotApplicable, match="cannot continue: the checkpoint holds the state of SGD"):
        fit(adam, data, epochs=1, seed=0, start=tmp_path)
    setup.model[0], setup.model[2] = nn.Linear(10, 8), nn.Linear(8, 16)
    with pytest.raises(NotApplicable, match=r"cannot continue: 0\.weight is \(8, 10\)"):
        fit(setup, data, epochs=1, seed=0, start=tmp_path)


def test_descriptions_see_through_closures():
    """Equal code with other numbers inside is another function; a function that refers to itself ends."""

    def make(amount):
        def loss(output, batch):
            return loss, amount

        return loss

    assert describe(make(0.1)) == describe(make(0.1)) != describe(make(0.2))
    assert describe(resumable.Crop(padding=1).transform) != describe(resumable.Crop(padding=2).transform)


def test_start_needs_a_finished_checkpoint(tmp_path):
    setup, data = mlp_setup()
    with pytest.raises(BadInput, match="no finished checkpoint"):
        fit(setup, data, epochs=1, seed=0, start=tmp_path)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.NAdam])
def test_optimizer_state_is_exact(tmp_path, kind):
    """Saved and loaded, every optimizer goes on with the same bits, in two groups, one frozen parameter among them."""

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).to(memory_format=torch.channels_last)
        model[0].bias.requires_grad_(False)
        options = {"momentum": 0.9} if kind in (torch.optim.SGD, torch.optim.RMSprop) else {}
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
        return model, kind(groups, lr=0.01, **options)

    def steps(model, optimizer, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 6, 6, generator=generator)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, 3, 1)
    save_state(tmp_path, model, optimizer, {"exact": 0.1 + 0.2})
    other, restored = build()
    assert load_state(tmp_path, other, restored) == {"exact": 0.1 + 0.2}
    assert other[0].weight.stride() == model[0].weight.stride()
    assert all(
        a.stride() == b.stride()
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
        for a, b in zip(optimizer.state[p].values(), restored.state[q].values(), strict=True)
    )
    steps(model, optimizer, 3, 2)
    steps(other, restored, 3, 2)
    assert fingerprint(model) == fingerprint(other)


def test_ties_are_stored_once_and_stay(tmp_path):
    """The tied head has no second copy in the file, and is the same parameter after loading."""
    model = tiny_transformer().build()
    save_state(tmp_path, model, None, {})
    state = read_state(tmp_path)
    assert state.body["aliases"] == {"head.weight": "embed.weight"} and "head.weight" not in state.model
    other = tiny_transformer(seed=9).build()
    load_model(tmp_path, other)
    assert fingerprint(other) == fingerprint(model) and other.head.weight is other.embed.weight
    other.head.weight = nn.Parameter(other.head.weight.detach().clone())
    with pytest.raises(BadInput, match=r"head\.weight"):
        load_model(tmp_path, other)


def test_buffers_that_are_not_persistent_and_extra_states_come_back(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("hidden", torch.zeros(2), persistent=False)
            self.brief = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
            self.note = "new"

        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    first, second = Odd(), nn.Sequential(Odd())
    first.hidden.fill_(3), first.brief.data.fill_(0.1)
    first.note = "used"
    save_state(tmp_path, nn.Sequential(first), None, {})
    load_model(tmp_path, second)
    assert second[0].hidden.tolist() == [3, 3] and second[0].note == "used" and torch.equal(second[0].brief, first.brief)


def test_shape_and_type_are_checked(tmp_path):
    save_state(tmp_path, nn.Linear(3, 2), None, {})
    with pytest.raises(BadInput, match=r"weight is \(2, 4\) float32 in the model and \(2, 3\) float32"):
        load_model(tmp_path, nn.Linear(4, 2))
    with pytest.raises(BadInput, match="float64"):
        load_model(tmp_path, nn.Linear(3, 2).double())


def test_files_hold_no_pickle(tmp_path):
    """Only safetensors and JSON; every recorded digest is that of its file."""
    resumable.run(tmp_path, 1 / 3)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    assert not any(p.read_bytes().startswith((b"PK", b"\x80")) for p in tmp_path.iterdir())
    from quadriga.core.files import sha256

    files = json.loads((tmp_path / "state.json").read_text())["body"]["files"]
    assert all(sha256(tmp_path / entry["name"]) == entry["sha256"] for entry in files.values())


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(plain)
def test_pack_round_trips_through_json(value):
    """Any nesting of plain values comes back equal, types included."""
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(value, tensors, "x"), allow_nan=False)), tensors)
    assert repr(back) == repr(value)


def test_pack_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match="x/f is a builtin_function"):
        pack({"f": len}, {}, "x")


def test_no_space_left_keeps_the_older_state(tmp_path, monkeypatch):
    """A write that fails is a BadInput that names the file, and what was there before still loads."""
    model = nn.Linear(2, 2)
    save_state(tmp_path, model, None, {"number": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        save_state(tmp_path, model, None, {"number": 2})
    monkeypatch.undo()
    assert load_state(tmp_path, model) == {"number": 1}
