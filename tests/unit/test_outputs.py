"""What models return: dicts, dataclasses, named tuples, caches, scalars beside rows; and PyTorch's fused attention."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from quadriga import methods, runtime
from quadriga.core.batch import Fields, primary, storable, tensors
from quadriga.core.errors import BadInput
from quadriga.core.metric import Metric
from quadriga.core.setup import Setup
from quadriga.core.slots import RuntimeSpec
from quadriga.core.workload import Workload
from quadriga.measure.ceilings import ceilings
from quadriga.measure.flops import flops
from quadriga.measure.quality import score
from quadriga.measure.roofline import profile
from quadriga.verify.equal import equal
from quadriga.workloads import check

torch.set_num_threads(1)
G = torch.Generator().manual_seed(0)
X = torch.randn(900, 6, generator=G)
Y = X[:, :3].argmax(1)
SPLITS = {"train": (X[:300], Y[:300]), "val": (X[300:600], Y[300:600]), "test": (X[600:], Y[600:])}


@dataclass
class Answer:
    hidden_states: Tensor
    logits: Tensor
    cache: object = None


Pair = namedtuple("Pair", ["first", "second"])
Odd = namedtuple("Odd", ["features", "logits"])


class Net(nn.Module):
    """Gives (features, logits) in some form."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.form = nn.Linear(6, 8), nn.Linear(8, 3), form

    def forward(self, x):
        h = self.body(x).relu()
        return self.form(h, self.head(h))


def made(form, **changes):
    return Workload(**{"model": Net(form), **SPLITS, "trained": True, **changes})


class Cache:
    """No tensor, and nothing that could be stored."""


FORMS = {
    "dict": lambda h, y: {"features": h, "logits": y},
    "dict with a cache": lambda h, y: {"logits": y, "past": Cache(), "none": None},
    "dataclass": lambda h, y: Answer(h, y),
    "dataclass with a cache": lambda h, y: Answer(h, y, Cache()),
    "named tuple": lambda h, y: Pair(y, h),
    "tuple with a cache": lambda h, y: (y, Cache()),
    "nested": lambda h, y: (y, {"features": [h, Cache()]}),
    "loss first": lambda h, y: {"loss": h.mean(), "scores": y},
}


@pytest.mark.parametrize(("kind", "name"), [*((kind, "eager") for kind in FORMS), ("nested", "onnxruntime")])
def test_forms_are_scored_exported_and_compared(kind, name, tmp_path):
    workload = made(form := FORMS[kind])
    notes = check(workload)
    model = workload.build().eval()
    with torch.no_grad():
        logits = model.head(model.body(X[600:]).relu())
    assert torch.equal(primary(model(X[600:])), logits)
    value = 100 * float((logits.argmax(1) == Y[600:]).double().mean())
    assert score(model, workload.test, workload.metric).value == pytest.approx(value)
    context = Setup.of(workload).context
    run = runtime.build(model, RuntimeSpec(name), context, tmp_path).run()
    assert equal(model, run, X[:20]).holds
    assert score(run, workload.test, workload.metric).value == pytest.approx(value)
    caches = [note for note in notes if "Cache" in note]
    assert len(caches) == ("cache" in str(form.__code__.co_consts) or Cache.__name__ in form.__code__.co_names)


def by_attribute(output, target):
    return (output.logits.argmax(1) == target).float()


def by_number(output, target):
    return (output[0].argmax(1) == target).float()


def whole_by_attribute(output, target):
    return float((output.logits.argmax(1) == target).float().mean())


@pytest.mark.parametrize("metric", [by_attribute, by_number, whole_by_attribute])
@pytest.mark.parametrize("form", [SequenceClassifierOutput, Answer])
def test_metrics_read_an_artifacts_outputs_as_the_models(metric, form, tmp_path):
    if metric is by_number and form is Answer:
        return  # a dataclass has no numbers
    workload = made(
        lambda h, y: form(hidden_states=h, logits=y),
        metric=metric,
        loss=lambda output, target: functional.cross_entropy(output.logits, target),
    )
    check(workload)
    model = workload.build().eval()
    run = runtime.build(model, RuntimeSpec("eager"), Setup.of(workload).context, tmp_path).run()
    assert score(run, workload.test, workload.metric).value == score(model, workload.test, workload.metric).value > 0


def test_trees():
    left = []
    kept = storable({"a": [torch.ones(1), Cache()], "b": Answer(1, 2, Cache())}, left)
    assert left == ["a[1] (Cache)", "b.cache (Cache)"] and kept["a"][1] is None and kept["b"].logits == 2
    assert len(tensors(Answer(torch.ones(1), torch.ones(2)))) == 2
    assert type(storable(Pair(1, Cache()))) is Pair
    fields = Fields(loss=None, logits=3, other=4)
    assert (fields.other, fields[1], dict(fields)) == (4, 4, {"loss": None, "logits": 3, "other": 4})
    with pytest.raises(AttributeError, match="it has loss, logits, other"):
        _ = fields.past


# which tensor is the prediction


def unnamed(h, y):
    return {"features": h[:, :3], "scores": y}


def test_a_dict_without_logits_is_not_guessed_at():
    """The first entry was taken, without a word."""
    with pytest.raises(BadInput, match=r"returns features, scores, and cross_entropy cannot know.*\"logits\", or alone"):
        check(made(unnamed))
    with pytest.raises(BadInput, match=r"accuracy cannot know"):
        check(made(unnamed, loss=lambda output, target: functional.cross_entropy(output["scores"], target)))
    assert check(made(lambda h, y: {"scores": y})) == [] == check(made(lambda h, y: {"features": h[:, :3], "logits": y}))


def test_users_own_functions_read_what_they_want():
    def metric(output, target):
        return (output["scores"].argmax(1) == target).float()

    (note,) = check(made(unnamed, loss=lambda o, t: functional.cross_entropy(o["scores"], t), metric=metric))
    assert "methods that need one prediction take features" in note


def test_tuples_are_read_from_the_front():
    assert check(made(lambda h, y: (y, h))) == ["the model returns 2 tensors; the first is taken for its prediction"]
    assert check(made(lambda h, y: (y, None))) == []
    with pytest.raises(BadInput, match=r"named tuple.*put logits first"):
        check(made(lambda h, y: Odd(h[:, :3], y)))


# metrics of a whole split


def with_scalar(h, y):
    return {"logits": y, "balance": h.mean()}


def f1(output, target):
    hit = output["logits"].argmax(1) == target
    return float(hit.double().mean())


def test_a_scalar_beside_a_set_metric(tmp_path):
    """It was refused after 45 seconds of work."""
    workload = made(with_scalar, metric=Metric("f1", whole=f1))
    assert check(workload) == []
    found = score(workload.build(), workload.test, workload.metric)
    assert 0 < found.value <= 1 and all(len(t) == 300 for t in tensors(found.outputs))


def test_a_set_metric_that_reads_a_scalar_is_refused_at_once():
    def odd(output, target):
        return float(output["balance"].sum())

    with pytest.raises(BadInput, match=r"may read balance, which has no row per example.*one row per example only"):
        check(made(with_scalar, metric=Metric("odd", whole=odd)))


# models of transformers


def tokens(count, width=10):
    return torch.randint(3, 50, (count, width + 1), generator=G)


def causal(build):
    names, given = ("train", "val", "test"), [tokens(40) for _ in range(3)]
    splits = {n: ({"input_ids": t[:, :-1].clone()}, t[:, 1:].clone()) for n, t in zip(names, given, strict=True)}
    return Workload(model=build, **splits, metric="bits_per_byte", batch_size=8, trained=True)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


@pytest.mark.parametrize("build", [gpt2, llama])
def test_a_causal_model_as_it_comes(build, tmp_path):
    user = build()
    assert user(tokens(2)).past_key_values is not None
    for given in (user, build):
        workload = causal(given)
        notes = check(workload)
        assert any("use_cache" in note for note in notes)
        model = workload.build().eval()
        assert model(tokens(2)).get("past_key_values") is None
    assert user.config.use_cache and user(tokens(2)).past_key_values is not None  # the user's own is left alone
    run = runtime.build(model, RuntimeSpec("eager"), Setup.of(workload).context, tmp_path).run()
    with torch.no_grad():
        same = tokens(5, 9)
        torch.testing.assert_close(run({"input_ids": same})["logits"], user.eval()(same).logits)


def test_an_encoder_and_decoder_with_labels():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config)
    made = {n: (tokens(40), tokens(40, 5)) for n in ("train", "val", "test")}
    task = {"model": model, "metric": "bits_per_byte", "batch_size": 8, "trained": True}
    with pytest.raises(BadInput, match=r"give decoder_input_ids beside the labels, as model.prepare_decoder_input_ids_from"):
        check(Workload(**task, **{n: ({"input_ids": x}, y) for n, (x, y) in made.items()}))
    prepare = model.prepare_decoder_input_ids_from_labels
    workload = Workload(**task, **{n: ({"input_ids": x, "decoder_input_ids": prepare(y)}, y) for n, (x, y) in made.items()})
    check(workload)
    assert score(workload.build(), workload.val, workload.metric).value > 0


# attention


class Padded(nn.Module):
    """The mean over all positions, padded ones too, which PyTorch's fused kernels leave at zero."""

    def __init__(self, careful=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.careful = nn.Embedding(50, 16, padding_idx=0), careful
        self.encode = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        padding = x == 0
        h = self.encode(self.embed(x), src_key_padding_mask=padding)
        return self.out((h.masked_fill(padding[..., None], 0) if self.careful else h).mean(1))


def padded(careful):
    def split():
        x = tokens(60, 11)
        x = x.masked_fill(torch.arange(12) >= torch.randint(3, 12, (60, 1), generator=G), 0)
        return x, x[:, 0] % 3

    return Workload(model=lambda: Padded(careful), train=split(), val=split(), test=split(), batch_size=20, trained=True)


@pytest.mark.parametrize("careful", [True, False])
def test_a_note_where_fused_attention_gives_other_outputs(careful):
    notes = [note for note in check(padded(careful)) if "fused attention" in note]
    assert len(notes) == (not careful)


def test_an_encoder_with_a_padding_mask(tmp_path):
    """Exports were 0.46 apart, structure methods found no in_proj_weight, and the profile crashed."""
    workload = padded(False)
    model = workload.build().eval()
    run = runtime.build(model, RuntimeSpec("onnxruntime"), Setup.of(workload).context, tmp_path).run()
    assert equal(model, run, workload.inputs(9)).max_rel < 1e-5
    assert flops(model, workload.example) > 0 and profile(model, workload.example, repeats=1, ceiling=ceilings(1, 0.01))
    for name in ("prune_heads", "prune_hidden", "prune_blocks", "low_rank"):
        method = methods.available()[name]
        after = (method(energy=0.5) if name == "low_rank" else method())(Setup.of(workload))
        assert flops(after.model, workload.example) < flops(model, workload.example)


def test_the_fast_path_is_off_where_models_are_called_and_on_for_the_users_own_arm():
    from quadriga.measure import arm

    assert not torch.backends.mha.get_fastpath_enabled()
    try:
        arm.load_eager({"workload": None}, padded(True))
        assert torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
