"""Every kind of base optimizer against an independent implementation over twenty steps; Muon's and schedule-free's own rules.

The references are loops over one parameter at a time, written from the papers, in float64. Beside them stand torch.optim.Muon
and AdamW, and, for the extras, the package itself where no loop is short.
"""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from quadriga.core.errors import BadInput, NotApplicable
from quadriga.core.setup import Setup
from quadriga.methods.optimizer import _kinds
from quadriga.methods.optimizer._groups import roles
from quadriga.methods.optimizer._kinds import KINDS
from quadriga.methods.optimizer._muon import Muon, orthogonal
from quadriga.methods.optimizer._schedule_free import ScheduleFree
from quadriga.methods.optimizer.optimizer import Optimizer
from quadriga.methods.training.schedule import Schedule
from quadriga.testing import fingerprint, tiny_cnn, tiny_mlp, tiny_transformer
from quadriga.train.loop import fit

torch.set_num_threads(1)
COUNT = 20


def gradients(model, i):
    """Leave the gradients of batch i."""
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(16, 10, generator=generator), torch.randint(2, (16,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x.to(model[0].weight.dtype)), y).backward()


def trained(method, model=None):
    """The float64 model after twenty steps of a method's optimizer; the optimizer is left in evaluation where it has one."""
    model = tiny_mlp().build().double() if model is None else model
    optimizer = method.make(model)
    for i in range(COUNT):
        gradients(model, i)
        optimizer.step()
    if isinstance(optimizer, ScheduleFree):
        optimizer.eval()
    return list(model.parameters())


def by_hand(update):
    """The same twenty steps of `update(weight, gradient, state, step, decays)` → weight, parameter by parameter."""
    model = tiny_mlp().build().double()
    states = [{} for _ in model.parameters()]
    for i in range(COUNT):
        gradients(model, i)
        with torch.no_grad():
            for p, state in zip(model.parameters(), states, strict=True):
                p.copy_(update(p.clone(), p.grad.clone(), state, i + 1, p.dim() > 1))
    return [state.get("x", p) for p, state in zip(model.parameters(), states, strict=True)]


def check(method, update):
    torch.testing.assert_close(trained(method), by_hand(update), rtol=1e-6, atol=1e-9)


def mean(state, name, value, beta):
    """An exponential average that starts at 0."""
    state[name] = beta * state.get(name, 0) + (1 - beta) * value
    return state[name]


def schedule_free(lr, beta=0.9, beta2=0.999, decay=0.01, eps=1e-8, sgd=False):
    """Algorithm 1 of arXiv:2405.15682 with x, y and z apart."""

    def update(y, g, s, t, decays):
        z, x = s.get("z", y), s.get("x", y)
        step = g if sgd else g / ((mean(s, "v", g * g, beta2) / (1 - beta2**t)).sqrt() + eps)
        s["z"] = z - lr * (step + decay * decays * y)
        s["sum"] = s.get("sum", 0) + lr**2
        c = lr**2 / s["sum"]
        s["x"] = (1 - c) * x + c * s["z"]
        return (1 - beta) * s["z"] + beta * s["x"]

    return update


def test_schedule_free_follows_the_algorithm():
    """Against x, y and z kept apart; both forms, decay included."""
    check(Optimizer(kind="schedule_free", lr=0.01, weight_decay=0.3), schedule_free(0.01, decay=0.3))
    check(Optimizer(kind="schedule_free", betas=(0.7, 0.9), eps=1e-3), schedule_free(0.003, 0.7, 0.9, eps=1e-3))
    check(Optimizer(kind="schedule_free_sgd", lr=0.5, weight_decay=0.1), schedule_free(0.5, decay=0.1, sgd=True))


def test_muon_is_torch_muon_and_adamw():
    """Hidden matrices as torch.optim.Muon, made to compute in our type; all else as torch.optim.AdamW."""
    model = tiny_mlp().build()
    ours = trained(Optimizer(kind="muon", lr=0.01, weight_decay=0.1), model)
    plain = tiny_mlp().build()
    hidden = [plain[0].weight, plain[2].weight]
    others = [plain[4].weight, *(m.bias for m in (plain[0], plain[2], plain[4]))]
    muon = torch.optim.Muon(hidden, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    decays = [{"params": others[:1], "weight_decay": 0.1}, {"params": others[1:], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decays, lr=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's rounds to it, which is not what is compared
        for i in range(COUNT):
            gradients(plain, i)
            muon.step(), adamw.step()
    torch.testing.assert_close(ours, list(plain.parameters()), rtol=1e-3, atol=2e-5)


def sgd(p, g, s, t, decays):
    """Nesterov's, with coupled decay."""
    g = g + 0.1 * decays * p
    s["m"] = 0.9 * s["m"] + g if "m" in s else g
    return p - 0.05 * (g + 0.9 * s["m"])


def adam(lr, decay=0.0, coupled=0.0):
    """AdamW, or with coupled decay Adam, at the usual betas."""

    def update(p, g, s, t, decays):
        g = g + coupled * decays * p
        m, v = mean(s, "m", g, 0.9) / (1 - 0.9**t), mean(s, "v", g * g, 0.999) / (1 - 0.999**t)
        return p * (1 - lr * decay * decays) - lr * m / (v.sqrt() + 1e-8)

    return update


def nadam(p, g, s, t, decays):
    """Dozat's, with its momentum schedule, of which torch takes ψ = 0.004."""
    now, after = (0.9 * (1 - 0.5 * 0.96 ** (0.004 * k)) for k in (t, t + 1))
    s["product"] = s.get("product", 1.0) * now
    m, v = mean(s, "m", g, 0.9), mean(s, "v", g * g, 0.999) / (1 - 0.999**t)
    ahead = (1 - now) * g / (1 - s["product"]) + after * m / (1 - s["product"] * after)
    return p - 2e-3 * ahead / (v.sqrt() + 1e-8)


def rmsprop(p, g, s, t, decays):
    """With momentum on the scaled gradient."""
    s["m"] = 0.5 * s.get("m", 0) + g / (mean(s, "v", g * g, 0.9).sqrt() + 1e-8)
    return p - 1e-3 * s["m"]


def adagrad(p, g, s, t, decays):
    """With coupled decay."""
    g = g + 0.1 * decays * p
    s["v"] = s.get("v", 0) + g * g
    return p - 0.01 * g / (s["v"].sqrt() + 1e-8)


def adafactor(p, g, s, t, decays):
    """Row and column means of the squares, update clipping and relative step sizes, without a first moment."""
    beta = 1 - t**-0.8
    if p.dim() > 1:
        rows, columns = mean(s, "r", (g * g).mean(1), beta), mean(s, "c", (g * g).mean(0), beta)
        v = rows[:, None] * columns[None] / rows.mean()
    else:
        v = mean(s, "v", g * g, beta)
    u = g / v.sqrt().clamp_min(torch.finfo(p.dtype).eps)
    u = u / max(1.0, u.square().mean().sqrt().item())
    return p - max(1e-3, p.square().mean().sqrt().item()) * min(0.01, t**-0.5) * u


def lion(p, g, s, t, decays):
    """Chen et al., algorithm 2."""
    m = s.get("m", torch.zeros_like(p))
    s["m"] = 0.99 * m + 0.01 * g
    return p * (1 - 1e-4 * 0.1 * decays) - 1e-4 * (0.9 * m + 0.1 * g).sign()


def adan(p, g, s, t, decays):
    """Xie et al., algorithm 1, with proximal decay and corrected biases."""
    change = g - s.get("g", g)
    s["g"] = g
    m, n = mean(s, "m", g, 0.98) / (1 - 0.98**t), mean(s, "n", change, 0.92) / (1 - 0.92**t)
    v = mean(s, "v", (g + 0.92 * change) ** 2, 0.99) / (1 - 0.99**t)
    return (p - 1e-3 * (m + 0.92 * n) / (v.sqrt() + 1e-8)) / (1 + 1e-3 * 0.01 * decays)


def soap(p, g, s, t, decays):
    """Adam in the eigenbasis of Shampoo's factors, which is turned by one power iteration every tenth step."""
    lr, beta, k = 3e-3, 0.95, t - 1
    factors = [g @ g.T, g.T @ g] if p.dim() == 2 else []
    into = lambda x: s["q"][0].T @ x @ s["q"][1] if factors else x  # noqa: E731
    if k == 0:
        s["f"] = [(1 - beta) * f for f in factors]
        s["q"] = [torch.linalg.eigh(f).eigenvectors.flip(1) for f in s["f"]]
        return p
    m, v = mean(s, "m", g, beta), mean(s, "v", into(g) ** 2, beta)
    step = into(m) / (v.sqrt() + 1e-8)
    step = s["q"][0] @ step @ s["q"][1].T if factors else step
    s["f"] = [beta * old + (1 - beta) * new for old, new in zip(s["f"], factors, strict=True)]
    if k % 10 == 0:
        for i, (f, q) in enumerate(zip(s["f"], s["q"], strict=True)):
            order = (q * (f @ q)).sum(0).argsort(descending=True)
            s["v"], s["q"][i] = s["v"].index_select(i, order), torch.linalg.qr((f @ q)[:, order].float()).Q.double()
    rate = lr * math.sqrt(1 - beta**k) / (1 - beta**k)
    return (p - rate * step) * (1 - lr * 0.01 * decays)


LOOPS = {
    "sgd": (Optimizer(momentum=0.9, nesterov=True, lr=0.05, weight_decay=0.1), sgd),
    "adam": (Optimizer(kind="adam", weight_decay=0.1), adam(1e-3, coupled=0.1)),
    "adamw": (Optimizer(kind="adamw", scale=3.0, weight_decay=0.2), adam(3e-3, 0.2)),
    "nadam": (Optimizer(kind="nadam"), nadam),
    "rmsprop": (Optimizer(kind="rmsprop", alpha=0.9, momentum=0.5), rmsprop),
    "adagrad": (Optimizer(kind="adagrad", weight_decay=0.1), adagrad),
    "adafactor": (Optimizer(kind="adafactor"), adafactor),
    "lion": (Optimizer(kind="lion"), lion),
    "adan": (Optimizer(kind="adan"), adan),
}


@pytest.mark.parametrize("name", LOOPS)
def test_equals_the_loop(name):
    check(*LOOPS[name])


def test_soap_equals_the_loop():
    """Its QR is in float32."""
    torch.testing.assert_close(trained(Optimizer(kind="soap")), by_hand(soap), rtol=1e-4, atol=1e-6)


def test_prodigy_equals_the_loop():
    """Mishchenko & Defazio, algorithm 4 (Adam's form): the distance d is one number for all parameters."""
    model = tiny_mlp().build().double()
    weights = list(model.parameters())
    start, beta3, d, numerator = [p.detach().clone() for p in weights], math.sqrt(0.999), 1e-6, 0.0
    m, v, s = ([torch.zeros_like(p) for p in weights] for _ in range(3))
    for t in range(COUNT):
        gradients(model, t)
        old, numerator = d, beta3 * numerator
        with torch.no_grad():
            for i, p in enumerate(weights):
                numerator += d / 1e-6 * d * float((p.grad * (start[i] - p)).sum())
                m[i] = 0.9 * m[i] + 0.1 * d * p.grad
                v[i] = 0.999 * v[i] + 0.001 * (d * p.grad) ** 2
                s[i] = beta3 * s[i] + d / 1e-6 * d * p.grad
            d = max(d, numerator / sum(float(x.abs().sum()) for x in s))
            for i, p in enumerate(weights):
                p.mul_(1 - old * 0.01 * (p.dim() > 1)).sub_(old * m[i] / (v[i].sqrt() + d * 1e-8))
    assert d > 1e-5
    torch.testing.assert_close(trained(Optimizer(kind="prodigy")), weights, rtol=1e-4, atol=1e-6)


def test_orthogonal_is_the_polar_factor_roughly():
    """Left and right singular vectors stay, singular values come near one; each matrix of a stack by itself."""
    x = (
        torch.randn(3, 12, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    )
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonal(x) @ vt.mT
    values = torch.diagonal(inner, dim1=1, dim2=2)
    assert (values > 0.6).all() and (values < 1.3).all()
    torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonal(x)[1:2], orthogonal(x[1:2]))


def plainly(x):
    """The iteration as it was published."""
    x = x / x.flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("rank", [2, 24])
@pytest.mark.parametrize("columns", [24, 100])
def test_orthogonal_is_the_published_iteration(columns, rank):
    """In both forms, square and wide, of full rank and of less."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, rank, generator=generator) @ torch.randn(2, rank, columns, generator=generator)
    exact = plainly(x.double())
    torch.testing.assert_close(orthogonal(x.double()), exact)
    torch.testing.assert_close(orthogonal(x).double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("columns", [128, 256, 1024])
def test_orthogonal_in_bfloat16(columns):
    """With singular values 1, 1/2, 1/3, …: nearly as near to the exact iteration as the published form is in that type, and
    no singular value beyond 1.3."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(2, 128, columns, dtype=torch.float64, generator=generator), full_matrices=False)
    x = u @ torch.diag(1 / torch.arange(1.0, 129.0).double()) @ vt
    exact = plainly(x)
    mine, published = ((f(x.bfloat16()).double() - exact).norm() / exact.norm() for f in (orthogonal, plainly))
    assert mine < 0.08 and mine < 3 * published, (mine, published)
    assert torch.linalg.svdvals(orthogonal(x.bfloat16()).double()).max() < 1.3


def test_muon_of_a_kernel_is_muon_of_its_matrix():
    """A convolution's kernel is the matrix [out, in·kh·kw], in whatever memory format; a tall one is turned."""
    kernel = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    conv = nn.Parameter(kernel.clone(memory_format=torch.channels_last))
    flat, tall = nn.Parameter(kernel.flatten(1).clone()), nn.Parameter(kernel.flatten(1).T.clone())
    options = {"lr": 0.1, "momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizers = [Muon([{"params": [p], "matrix": True}], **options) for p in (conv, flat, tall)]
    for _ in range(3):
        gradient = torch.randn(6, 3, 2, 2, dtype=torch.float64)
        conv.grad, flat.grad, tall.grad = gradient, gradient.flatten(1), gradient.flatten(1).T
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(conv.flatten(1), flat)
    torch.testing.assert_close(tall.T, flat)


class Wide(nn.Module):
    """A network with every role: a table, a norm over two dimensions, a kernel, a parametrized layer, a stack, a head."""

    def __init__(self, tied=False):
        super().__init__()
        self.token, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.norm, self.body = nn.LayerNorm((2, 4)), nn.Linear(4, 4)
        self.stack = nn.Parameter(torch.ones(2, 2, 2))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.token.weight
        parametrize.register_parametrization(self.body, "weight", nn.Identity())

    def forward(self, tokens):
        x = self.norm(self.conv(self.token(tokens).mT).mT) * self.stack.sum()
        return self.head(self.body(x))


def names(model, parameters):
    known = {id(p): name for name, p in model.named_parameters()}
    return [known[id(p)] for p in parameters]


def test_roles():
    model = Wide()
    model.conv.bias.requires_grad_(False)
    found = roles(model)
    assert names(model, found.matrices) == ["conv.weight", "body.parametrizations.weight.original"]
    assert names(model, found.outputs) == ["head.weight"] and names(model, found.others) == ["stack"]
    assert names(model, found.tables) == ["token.weight"]
    assert sorted(names(model, found.vectors)) == ["body.bias", "norm.bias", "norm.weight"]
    tied = roles(Wide(tied=True))
    assert len(tied.outputs) == 1 and not tied.tables


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"decay_embeddings": True}, {"decay_biases": True}])
def test_what_decays(kind, fields):
    """Weights do, norms of two dimensions and tables do not, unless the fields say so."""
    model = Wide()
    groups = Optimizer(kind=kind, weight_decay=0.1, **fields).make(model).param_groups
    still = {n for g in groups if not g["weight_decay"] for n in names(model, g["params"])}
    vectors = {"conv.bias", "norm.weight", "norm.bias", "body.bias"}
    expected = (set() if "decay_biases" in fields else vectors) | (set() if "decay_embeddings" in fields else {"token.weight"})
    assert still == expected and sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_and_sparse_tables(kind, dtype):
    """Sparse gradients act as dense ones; float64 and bfloat16 keep their type, stay finite and move."""
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = Wide().to(dtype)
        model.token.sparse = sparse
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = Optimizer(kind=kind, lr=0.01 if kind != "prodigy" else 1e4).make(model)
        for i in range(3):
            model.zero_grad()
            (model(torch.tensor([[1, 2], [3, i]])) / 8).square().mean().backward()
            optimizer.step()
        assert all(p.dtype is dtype and p.isfinite().all() for p in model.parameters())
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        ends.append([p.detach() for p in model.parameters()])
    loose = {"rtol": 0.1, "atol": 0.1} if dtype is torch.bfloat16 else {}  # whose rows are summed in another order
    torch.testing.assert_close(*ends, **loose)


def prepared(kind, workload=None, **fields):
    """A setup with a kind of optimizer and a warm-up."""
    setup = Optimizer(kind=kind, **fields)(Setup.of(workload or tiny_cnn(), seed=3))
    return Schedule(kind="linear", warmup=0.3)(setup)


class Stop(Exception):
    """A run was cut."""


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(kind, tmp_path):
    """Cut after its eighth step and resumed from a checkpoint, a run ends with the weights of an uncut one."""
    workload, whole, cut = tiny_cnn(), prepared(kind), prepared(kind)
    fit(whole, workload.train, epochs=2, seed=3)
    make, calls = cut.optimizer.make, []

    def stopping(model):
        optimizer = make(model)

        def count(optimizer, args, kwargs):
            calls.append(1)
            if len(calls) == 9:
                raise Stop

        optimizer.register_step_pre_hook(count)
        return optimizer

    with pytest.raises(Stop):
        once = replace(cut, optimizer=replace(cut.optimizer, make=stopping))
        fit(once, workload.train, epochs=2, seed=3, checkpoint=tmp_path, every=0.0)
    again = prepared(kind)
    fit(again, workload.train, epochs=2, seed=3, checkpoint=tmp_path)
    assert fingerprint(again.model) == fingerprint(whole.model)


def test_schedule_free_goes_on_from_y(tmp_path):
    """One epoch and one more from its finished checkpoint, without batch norm, equal two; x is handed on, y goes on."""
    ends = []
    for epochs in ((2,), (1, 1)):
        setup, start = Optimizer(kind="schedule_free")(Setup.of(tiny_mlp(), seed=3)), None
        for i, length in enumerate(epochs):
            folder = tmp_path / f"{len(epochs)}{i}"
            fit(setup, tiny_mlp().train, epochs=length, seed=3, start=start, checkpoint=folder)
            start = folder
        ends.append([p.detach() for p in setup.model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_schedule_free_is_evaluated_at_x():
    """A look sees x with batch statistics taken for it, and leaves no bit changed; the end has x too."""
    workload, setup = tiny_cnn(), Optimizer(kind="schedule_free")(Setup.of(tiny_cnn(), seed=3))
    optimizer = setup.optimizer.make(setup.model)
    (hook,) = (make(setup.model, optimizer) for make in setup.optimizer.make_hooks)
    batch = workload.train.batch(torch.arange(96))
    with hook.train(setup.model, workload.train):
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(setup.model(batch.inputs), batch.target).backward()
            optimizer.step()
        y = fingerprint(setup.model)
        expected = deepcopy(setup.model)
        for p, q in zip(setup.model.parameters(), expected.parameters(), strict=True):
            q.data = (p.detach() - 0.1 * optimizer.state[p]["z"]) / 0.9
        with hook.eval(setup.model):
            for p, q in zip(setup.model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(p, q)
            inner = setup.model.conv1(batch.inputs)
            torch.testing.assert_close(setup.model.norm.running_mean, inner.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        assert fingerprint(setup.model) == y
        optimizer.step()
    hook.end(setup.model, iter([batch]))
    torch.testing.assert_close(
        setup.model.norm.running_mean, setup.model.conv1(batch.inputs).mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    with hook.eval(setup.model):  # which leaves a finished one finished
        pass
    with pytest.raises(AssertionError, match="eval"):
        optimizer.step()


def test_schedule_free_follows_rate_and_beta():
    """Under factors of both: x is the average of z weighted by the rate's square, and y lies at the β of now."""
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = ScheduleFree([{"params": [p]}], 0.1, (0.9, 0.999), 1e-8)
    group, total, weight = optimizer.param_groups[0], torch.zeros(5, dtype=torch.float64), 0.0
    for rate, beta in ((0.0, 0.9), (0.1, 0.9), (0.3, 0.8), (0.2, 0.95), (0.1, 0.0)):
        group["lr"], group["betas"] = rate, (beta, 0.999)
        p.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        total, weight = total + rate**2 * optimizer.state[p]["z"], weight + rate**2
    y = p.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(p.detach(), total / weight)
    torch.testing.assert_close(y, 0.05 * optimizer.state[p]["z"] + 0.95 * p.detach())
    optimizer.train()
    torch.testing.assert_close(p.detach(), y)


def test_muon_leaves_embeddings_and_output_to_adamw():
    """A tied table is the output layer; what has a momentum buffer are the matrices of the blocks."""
    model = tiny_transformer().build()
    groups = Optimizer(kind="muon").make(model).param_groups
    matrices = [n for g in groups if g["matrix"] for n in names(model, g["params"])]
    assert len(matrices) == 9 and "embed.weight" not in matrices and all("blocks" in n or n == "place" for n in matrices)
    assert [("momentum" in g, "betas" in g) for g in groups] == [(True, False), (False, True), (False, True)]


def test_without_the_package(monkeypatch):
    """The extras refuse with the remedy, before anything is trained; the others do not need it."""
    monkeypatch.setattr(_kinds.util, "find_spec", lambda name: None)
    for kind, about in KINDS.items():
        if about.extra:
            with pytest.raises(NotApplicable, match="needs the package") as caught:
                Optimizer(kind=kind)(Setup.of(tiny_mlp()))
            assert caught.value.remedy == 'pip install "quadriga[optimizers]"'
        else:
            Optimizer(kind=kind)(Setup.of(tiny_mlp()))


@pytest.mark.parametrize("fields", [{"kind": "schedule_free", "betas": [0.0, 0.9]}, {"kind": "adan", "betas": [0.9, 0.9]}])
def test_betas_of_the_kind(fields):
    with pytest.raises(BadInput, match="betas"):
        Optimizer.parse(fields)
