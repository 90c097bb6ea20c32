"""Training in several processes: what ranks share, where parts lie, what is refused; and a launch of two ranks."""

import itertools
import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from quadriga.core import spread, world
from quadriga.core.batch import Batch
from quadriga.core.errors import BadInput, Diverged, NotApplicable
from quadriga.core.recipe import Recipe, step
from quadriga.core.setup import Setup
from quadriga.core.slots import ParallelSpec
from quadriga.engine.walk import prefix_key
from quadriga.methods import build
from quadriga.parallel import group, launch, store
from quadriga.parallel.cost import block_costs, cut_evenly
from quadriga.parallel.mesh import mesh_of
from quadriga.parallel.pipeline import micro_batches, only, stack_of
from quadriga.parallel.place import Place, shard
from quadriga.parallel.share import Share, evenly
from quadriga.parallel.tensor import cut_matrices, matched, styled
from quadriga.stages.verbs import planned
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit
from quadriga.train.runners import runner_for
from quadriga.workloads.ready.gpt_shakespeare import GPT

torch.set_num_threads(1)
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def one_rank():
    """A group of this process alone."""
    group.join()
    yield
    group.leave()


def torchrun(module, nproc, *words, restarts=0):
    env = launch.environment(
        nproc, {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "QUADRIGA_DATA": "shipped"}
    )
    command = launch.command(words, nproc, restarts, module)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)


def test_plans_equal_one_process_and_mistakes_do_not(tmp_path):
    """Gradients and weights within 1e-5 in two ranks; without the exchange of gradients, or with twice of them, far from it."""
    names = [
        "ddp, no-sync",
        "ddp, doubled",
        "ddp, augmented, pruned data",
        "fsdp, clipped, in parts, averaged",
        "tp + sequence",
    ]
    names += ["pp interleaved", "inference: replicas"]
    done = torchrun("quadriga.testing.ranks", 2, str(tmp_path / "rows.json"), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert set(rows) == set(names)
    assert [rows[name]["equal"] for name in names] == [False, False, True, True, True, True, True]
    assert rows["ddp, doubled"]["gradients"] == pytest.approx(rows["ddp, doubled"]["largest"], rel=1e-3)


def test_a_killed_rank_is_started_again_from_the_last_checkpoint(tmp_path):
    """The losses are those of a run that nobody disturbed, whatever plan wrote the checkpoint that it goes on from."""
    from quadriga.testing.resume import killed, losses, train

    place = tmp_path / "disturbed"
    done = torchrun("quadriga.testing.resume", 2, f"{place}=fsdp:5!", restarts=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert killed(place).read_text().startswith("rank 1")
    train(tmp_path / "straight", "one")
    assert losses(place) == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)


def test_shares_are_the_batch():
    for count, size in itertools.product((5, 8, 13), (1, 2, 3, 5)):
        shares = [Share(rank, size).of(count) for rank in range(size)]
        assert [i for s in shares for i in range(count)[s]] == list(range(count))
        assert max(s.stop - s.start for s in shares) == Share(0, size).largest(count)
    with pytest.raises(BadInput, match="2 examples for 3"):
        Share(0, 3).of(2)


def test_parts_of_a_share_are_equally_many():
    batch = Batch(torch.arange(7.0), None, torch.arange(7))
    assert [len(part) for part in evenly(batch, 3)] == [2, 2, 3]
    with pytest.raises(BadInput, match="7 examples"):
        list(evenly(batch, 8))


@pytest.mark.parametrize("seed", range(4))
def test_parts_make_the_whole(seed):
    """Every entry once: cut by heads in a fused projection, then by FSDP, in two dimensions."""
    draw = random.Random(seed)
    heads, size, width, ranks, shards = 4, draw.choice((1, 3)), 6, 2, draw.choice((1, 2, 5))
    whole = torch.arange(float(3 * heads * size * width)).view(3 * heads * size, width)
    rows = torch.arange(len(whole)).view(3, heads, size)
    found = torch.full_like(whole, torch.nan)
    for rank, one in itertools.product(range(ranks), range(shards)):
        mine = rows[:, rank * heads // ranks : (rank + 1) * heads // ranks].flatten()
        place = Place(tuple(whole.shape), {0: shard(mine, one, shards)})
        part = place.take(whole)
        assert tuple(part.shape) == place.local_shape
        place.put(part, found)
    assert torch.equal(found, whole)


def test_stages_are_cut_where_the_dearest_is_cheapest():
    draw = random.Random(0)
    for _ in range(20):
        costs = [draw.randint(1, 9) for _ in range(draw.randint(4, 8))]
        stages = draw.randint(1, 4)

        def dearest(cuts, costs=costs):
            bounds = [0, *cuts, len(costs)]
            return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

        best = min(dearest(cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1))
        assert dearest(cut_evenly(costs, stages)) == best


def test_blocks_cost_what_the_clock_says():
    """A clock that layers advance, by more in the middle one: forward once, and backward the same again."""
    now = [0.0]

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            now[0] += seconds
            ctx.seconds = seconds
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            now[0] += ctx.seconds
            return g, None

    class Layer(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.linear = seconds, nn.Linear(2, 2)

        def forward(self, x):
            return Slow.apply(self.linear(x), self.seconds)

    model = nn.Sequential(Layer(1), Layer(2), Layer(5), Layer(3))
    assert block_costs(model, list(model)[1:], torch.ones(2, 2), clock=lambda: now[0]) == [
        6,
        10,
        6,
    ]  # what is before counts first


def test_micro_batches_are_of_one_size():
    assert micro_batches(24, None, 4) == 8 and micro_batches(24, 6, 4) == 6 and micro_batches(24, None, 2, micro=2) == 12
    with pytest.raises(BadInput, match="5 micro-batches"):
        micro_batches(24, 5, 4)
    with pytest.raises(BadInput, match="too small"):
        micro_batches(2, None, 4)


def test_a_stage_has_its_modules_and_no_others():
    model = GPT(3, 8, 2)
    names = {n for n, _ in model.named_parameters() if n.startswith(("blocks.1", "norm"))}
    part = only(model, names)
    assert {n for n, _ in part.named_parameters()} == names
    assert isinstance(part.norm, nn.LayerNorm) and isinstance(part.token, nn.Identity)
    assert [b.name for b in stack_of(GPT(3, 8, 2), 2)] == ["blocks.0", "blocks.1", "blocks.2"]
    with pytest.raises(NotApplicable, match="3 blocks"):
        stack_of(GPT(3, 8, 2), 4)


def test_the_world_is_what_torchrun_or_srun_says():
    assert world.found({}) == world.World()
    assert world.found({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}).size == 1  # a shell in an allocation
    slurm = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    assert world.found(slurm) == world.World(3, 8, 1, "Slurm")
    assert world.found({**slurm, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}).by == "torchrun"
    with pytest.raises(BadInput, match="SLURM_LOCALID"):
        world.found({k: v for k, v in slurm.items() if k != "SLURM_LOCALID"})
    with pytest.raises(BadInput, match="RANK=2"):
        world.found({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})


def test_torchrun_is_started_so_that_restarts_work():
    assert launch.environment(2, {"A": "b"})["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert launch.environment(2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"
    for nproc, restarts in ((0, 1), (2, -1)):
        with pytest.raises(BadInput, match=r"--nproc is 0|--restarts is -1"):
            launch.launch(["train", "w"], nproc, restarts)


def test_the_first_rank_that_refuses_speaks_for_all(monkeypatch, tmp_path):
    assert launch.tell(2) and not launch.over()  # a process alone
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", launch.TOLD: str(tmp_path / "told")}.items():
        monkeypatch.setenv(name, value)
    assert not launch.over() and launch.tell(2) and not launch.tell(1)
    assert launch.over() and (tmp_path / "told").read_text() == "2"


def test_one_process_is_plain_training():
    """Bit for bit, with data_parallel or fully_sharded in the recipe; what needs more processes says so."""
    marks = set()
    for steps in ((), (step("data_parallel"),), (step("fully_sharded"),)):
        task = tiny_mlp()
        setup = Setup.of(task)
        for one in steps:
            setup = build(one)(setup)
        fit(setup, task.train, epochs=1, seed=0)
        marks.add(fingerprint(setup.model))
    assert len(marks) == 1
    for name in ("tensor_parallel", "pipeline_parallel"):
        with pytest.raises(NotApplicable, match=r"needs 2 processes.*there is 1.*--nproc 2"):
            build(step(name))(Setup.of(tiny_transformer()))


def test_plans_exclude_one_another(monkeypatch):
    monkeypatch.setattr(world, "found", lambda environ=None: world.World(0, 4, 0, "torchrun"))
    setup = Setup.of(tiny_transformer())
    for first, second in (
        ("data_parallel", "fully_sharded"),
        ("tensor_parallel", "tensor_parallel"),
        ("tensor_parallel", "pipeline_parallel"),
        ("pipeline_parallel", "tensor_parallel"),
        ("activation_checkpointing", "activation_checkpointing"),
    ):
        after = build(step(first))(setup)
        with pytest.raises(NotApplicable):
            build(step(second))(after)
    with pytest.raises(NotApplicable, match="needs 3 processes"):
        build(step("tensor_parallel", degree=3))(setup)
    both = build(step("tensor_parallel"))(build(step("data_parallel"))(setup)).runtime.parallel
    assert (both.data, both.tensor, both.options["sequence"]) == ("replicate", 2, False)


def test_layout_is_not_part_of_what_is_trained():
    """A checkpoint of the same run is found without the steps that lay it out; half precision is another run."""
    task, train = tiny_mlp(), step("train", epochs=1)

    def key(*steps):
        return prefix_key(task, Recipe((*steps, train)), len(steps), 0)

    assert key() == key(step("data_parallel")) == key(step("fully_sharded"), step("activation_checkpointing"))
    assert key() != key(step("fully_sharded", precision="bf16"))


def test_a_recipe_without_a_plan_is_data_parallel():
    plain, own = Recipe((step("train", epochs=1),)), Recipe((step("fully_sharded"), step("train", epochs=1)))
    assert [s.method for s in planned(plain).steps] == ["data_parallel", "train"]
    assert planned(own) == own


@pytest.mark.parametrize("recompute", ["blocks", "cheap"])
def test_recomputed_activations_change_nothing_and_are_not_kept(recompute):
    weights, kept = [], []
    for steps in ((), (step("activation_checkpointing", recompute=recompute),)):
        task = tiny_transformer()
        setup = Setup.of(replace(task, model=lambda: GPT(3, 16, 2)))
        setup = replace(setup, model=GPT(3, 16, 2))
        torch.manual_seed(0)
        setup = replace(setup, model=GPT(3, 16, 2))
        for one in steps:
            setup = build(one)(setup)
        tokens = torch.arange(64).view(2, 32)
        size = [0]

        def pack(t, size=size):
            size[0] += t.nbytes
            return t

        with runner_for(setup, None) as runner, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            runner.model(tokens).sum().backward()
            weights.append([p.grad.clone() for p in runner.model.parameters()])
        kept.append(size[0])
        assert not any("forward" in vars(m) for m in setup.model.modules())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*weights, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_norms_of_plain_tensors_are_pytorchs():
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    for p in parameters:
        p.grad = torch.randn_like(p) * 4
    mine = [p.grad.clone() for p in parameters]
    expected = nn.utils.clip_grad_norm_(parameters, 0.7)
    assert float(spread.total_norm(mine)) == pytest.approx(float(expected), rel=1e-6)
    spread.clip_norm(mine, 0.7)
    assert all(torch.allclose(a, p.grad, rtol=1e-6) for a, p in zip(mine, parameters, strict=True))


def test_parts_are_written_and_read_without_pickle(tmp_path, one_rank):
    """Blocks that are not consecutive too; the files are safetensors, and damage is found."""
    whole = torch.arange(24.0).view(6, 4)
    parts = {"w": (whole[[0, 1, 4, 5]], Place((6, 4), {0: torch.tensor([0, 1, 4, 5])})), "n": (torch.tensor(3.0), Place(()))}
    files = store.write(tmp_path / "parts", parts)
    assert (
        files
        and all(name.endswith(".safetensors") for name in files)
        and set(files) == {p.name for p in (tmp_path / "parts").iterdir()}
    )
    found = {"w": (torch.zeros(2, 4), Place((6, 4), {0: torch.tensor([1, 4])})), "n": (torch.tensor(0.0), Place(()))}
    store.read(tmp_path / "parts", found)
    assert torch.equal(found["w"][0], whole[[1, 4]]) and float(found["n"][0]) == 3
    store.check(tmp_path / "parts", files)
    damaged = tmp_path / "parts" / next(iter(files))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(BadInput, match="damaged"):
        store.check(tmp_path / "parts", files)


@pytest.mark.parametrize("plan", ["replicate", "shard"])
def test_a_group_of_one_trains_the_same(plan, one_rank):
    """The very classes of PyTorch, with one rank: the weights that plain training ends with, back in the model itself."""
    weights = []
    for spec in (None, ParallelSpec(plan)):
        task = tiny_cnn()
        setup = Setup.of(task)
        setup = replace(setup, runtime=replace(setup.runtime, parallel=spec))
        fit(setup, task.train, epochs=1, seed=0)
        weights.append([t.clone() for t in setup.model.state_dict().values()])
    assert all(torch.allclose(a.float(), b.float(), atol=1e-6) for a, b in zip(*weights, strict=True))


def test_half_precision_is_another_computation_in_one_process_too(one_rank):
    task = tiny_mlp()
    plain, half = Setup.of(task), build(step("fully_sharded", precision="bf16"))(Setup.of(task))
    losses = [fit(s, task.train, epochs=1, seed=0).loss for s in (plain, half)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_what_works_on_whole_weights_is_refused_on_parts(one_rank):
    """Not where every process has all of them."""
    task = tiny_mlp()
    sharded = build(step("fully_sharded"))(build(step("optimizer", kind="muon"))(Setup.of(task)))
    with pytest.raises(NotApplicable, match=r"Muon.* works on whole weights"):
        fit(sharded, task.train, epochs=0.1, seed=0)
    pruned = build(step("fully_sharded"))(build(step("prune_weights", ratio=0.5))(Setup.of(task)))
    with pytest.raises(NotApplicable, match="works on whole weights"):
        fit(pruned, task.train, epochs=0.1, seed=0)
    fine = build(step("data_parallel"))(build(step("optimizer", kind="muon"))(Setup.of(task)))
    fit(fine, task.train, epochs=0.1, seed=0)


def test_a_loss_that_is_not_finite_goes_back_and_the_model_keeps_its_memory(one_rank):
    """Once, at a tenth of the rate, from the shards' own copy; the second time it is said, and the model has numbers again."""
    task = tiny_mlp()
    setup = build(step("fully_sharded"))(build(step("optimizer", kind="sgd", lr=1e30))(Setup.of(task)))
    with pytest.raises(Diverged):
        fit(setup, task.train, epochs=1, seed=0)
    assert all(p.untyped_storage().nbytes() >= p.nbytes for p in setup.model.parameters())
    setup = build(step("fully_sharded"))(build(step("optimizer", kind="sgd", lr=0.1))(Setup.of(task)))
    plain, calls = setup.training.loss, itertools.count()

    def once(output, batch):
        return plain(output, batch) * (torch.inf if next(calls) == 2 else 1.0)

    setup = replace(setup, training=replace(setup.training, loss=once))
    outcome = fit(setup, task.train, epochs=1, seed=0)
    assert "went back to step 0" in outcome.note
    assert all(bool(p.isfinite().all()) for p in setup.model.parameters())


def test_matrices_are_cut_by_heads_and_hidden_units(one_rank):
    """With one rank all stays: the layers are PyTorch's parallel ones, and the outputs the model's own."""
    torch.manual_seed(0)
    model, tokens = GPT(2, 16, 4), torch.arange(64).view(2, 32)
    expected = model(tokens)
    entries = cut_matrices(model, mesh_of(ParallelSpec(), "cpu")["tensor"], ParallelSpec(), tokens)
    cut = {name.split(".", 2)[2] for name in entries}
    assert cut == {"qkv.weight", "qkv.bias", "out.weight", "up.weight", "up.bias", "down.weight"}
    assert all(type(model.get_parameter(name)).__name__ == "DTensor" for name in entries)
    assert torch.allclose(model(tokens), expected, atol=1e-6)


def test_a_plan_by_pattern_names_its_mistakes(one_rank):
    model, tokens = GPT(2, 16, 4), torch.arange(64).view(2, 32)
    mesh = mesh_of(ParallelSpec(), "cpu")["tensor"]
    plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
    expected = model(tokens)
    entries = cut_matrices(model, mesh, ParallelSpec(options={"plan": plan}), tokens)
    assert set(entries) == {f"blocks.{k}.{n}" for k in (0, 1) for n in ("up.weight", "up.bias", "down.weight")}
    assert torch.allclose(model(tokens), expected, atol=1e-6)
    with pytest.raises(BadInput, match=r'"blocks.\*.upp" matches no module'):
        matched(model, {"blocks.*.upp": "colwise"})
    with pytest.raises(BadInput, match=r'"colwse".*did you mean "colwise"'):
        styled("colwse")


def test_the_plan_of_transformers_is_taken(one_rank):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.arange(12).view(2, 6)
    expected = model(tokens).logits
    entries = cut_matrices(model, mesh_of(ParallelSpec(), "cpu")["tensor"], ParallelSpec(), tokens)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= {n.split(".")[-2] for n in entries}
    assert torch.allclose(model(tokens).logits, expected, atol=1e-5)
