"""The two workloads with pretrained weights, from a cache that holds random ones: no network, no 90 MB."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from quadriga import workloads
from quadriga.core.batch import call, primary
from quadriga.core.errors import BadInput
from quadriga.core.setup import Setup
from quadriga.workloads import fetch
from quadriga.workloads.fashion import fashion_mnist
from quadriga.workloads.ready import minilm_wordnet as minilm
from quadriga.workloads.ready import mobilenetv2_fashion as mobile

torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")
TINY = {"vocab_size": 70, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
OPTIONS = {"mobilenetv2_fashion": {"source": "shipped", "examples": 300}, "minilm_wordnet": {"examples": 300}}
LETTERS = "abcdefghijklmnopqrstuvwxyz0"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "of", "the", "tree", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def word_pieces() -> bytes:
    """A tokenizer file of BERT's kind with few words, which, like the real one, asks for 128 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.enable_truncation(128)
    made.enable_padding(length=128)
    return made.to_str().encode()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Random weights under the real names; MiniLM of a smaller size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUADRIGA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(minilm, "SIZES", TINY)
        torch.manual_seed(5)
        rgb, encoder = mobile.MobileNetV2(3, 1000).state_dict(), minilm.Encoder(TINY).bert.state_dict()
        unused = {"pooler.dense.weight": torch.ones(16, 16), "embeddings.position_ids": torch.arange(512)}
        fetch.keep("mobilenetv2", {"model.safetensors": safetensors.torch.save(rgb)})
        fetch.keep(
            "minilm",
            {"model.safetensors": safetensors.torch.save({**encoder, **unused}), "tokenizer.json": word_pieces()},
        )
        yield SimpleNamespace(rgb=rgb, encoder=encoder, patch=patch)


@pytest.fixture(scope="module")
def ready(cache):
    return {name: workloads.load(name, **options) for name, options in OPTIONS.items()}


def names_and_shapes(state) -> str:
    text = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(state.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# both


def test_each_passes_the_check_and_can_be_found_again(ready):
    for name, made in ready.items():
        notes = workloads.check(made)
        assert all("in both" in note or "classes that train lacks" in note for note in notes), notes
        again = workloads.load(made.reference)
        assert made.name == name and again.reference == made.reference and len(again.train) == len(made.train) == 300
        _, package = fetch.find(name)
        assert made.data_note["weights"]["package"] == f"{package.name} {package.version}"
        assert made.data_note["weights"]["sha256"] == {m.path: m.sha256 for m in package.members.values()}
        assert made.data_note["examples"]["train"] == 300 and json.dumps(made.data_note)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_without_its_weights_it_is_refused_with_the_command(name, monkeypatch, tmp_path):
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path))
    with pytest.raises(BadInput) as caught:
        workloads.load(name)
    assert caught.value.remedy == f"quadriga fetch {name}" and str(tmp_path) in caught.value.problem


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_spoilt_weights_are_refused(cache, name, monkeypatch, tmp_path):
    short, package = fetch.find(name)
    files = {file: (fetch.folder(short) / file).read_bytes() for file in package.members}
    monkeypatch.setenv("QUADRIGA_CACHE", str(tmp_path))
    fetch.keep(short, files)
    path = fetch.folder(short) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BadInput, match=rf"model\.safetensors is missing or damaged.*quadriga fetch {name}"):
        workloads.load(name)


def test_only_the_last_layer_is_drawn_by_the_seed(ready):
    for name, made in ready.items():
        one, same, other = (made.build(seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(t, same[k]) for k, t in one.items())
        assert {k for k, t in one.items() if not torch.equal(t, other[k])} <= {"classifier.1.weight", "fc.weight", "fc.bias"}, (
            name
        )
        assert any(not torch.equal(t, other[k]) for k, t in one.items())


def test_each_learns_from_one_batch(ready):
    for made in ready.values():
        model, batch = made.build(0), made.train.batch(torch.arange(16))
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(4):
            losses.append(made.loss(call(model, batch.inputs), batch).mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[0].item() == pytest.approx(math.log(primary(call(model, batch.inputs)).shape[-1]), rel=0.25)
        assert losses[-1] < losses[0]


def test_traits(ready):
    assert {"IMAGES", "CLASSES", "LOGITS"} <= Setup.of(ready["mobilenetv2_fashion"]).traits
    found = Setup.of(ready["minilm_wordnet"]).traits
    assert {"CLASSES", "LOGITS"} <= found and "IMAGES" not in found


# MobileNetV2


def test_names_and_shapes_are_torchvisions():
    """The digest is of the 314 entries of mobilenet_v2-b0353104.pth."""
    with torch.device("meta"):
        assert names_and_shapes(mobile.MobileNetV2(3, 1000).state_dict()) == "b37e2a9130e6341b"
        assert sum(p.numel() for p in mobile.MobileNetV2().parameters()) == 2_236_106


def test_the_gray_stem_is_exact(cache):
    """A gray image in one channel gives what the network for colours makes of it in three, up to rounding."""
    colour = mobile.MobileNetV2(3, 1000).double().eval()
    colour.load_state_dict(cache.rgb)
    single = mobile.pretrained(cache.rgb).double().eval()
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        expected = colour.features(x.expand(-1, 3, -1, -1))
        torch.testing.assert_close(single.features(x), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert not torch.allclose(colour.features(torch.randn(2, 3, 64, 64, dtype=torch.float64)), expected)


@pytest.mark.parametrize("spoil", [lambda s: s.pop("features.3.conv.3.bias"), lambda s: s.update(extra=torch.ones(1))])
def test_weights_are_loaded_strictly(cache, spoil):
    state = dict(cache.rgb)
    spoil(state)
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        mobile.pretrained(state)


def test_images_are_enlarged_when_they_are_read(ready):
    """A batch holds the bilinear enlargement of each of its images, whatever else is in it; in memory they stay small."""
    data, small = ready["mobilenetv2_fashion"].val, fashion_mnist(pad=0, source="shipped").val
    assert data.inputs.shape == small.inputs.shape == (2000, 1, 28, 28) and len(data) == 2000
    index = torch.tensor([5, 1999, 5, 0])
    batch = data.batch(index)
    assert (
        batch.inputs.shape == (4, 1, 64, 64)
        and torch.equal(batch.index, index)
        and torch.equal(batch.target, small.target[index])
    )
    for row, number in zip(batch.inputs, index.tolist(), strict=True):
        expected = torch.nn.functional.interpolate(small.inputs[number : number + 1], size=(64, 64), mode="bilinear")
        torch.testing.assert_close(row, expected[0])
    part = data.part(index)
    assert torch.equal(part.batch(torch.arange(4)).inputs, batch.inputs)
    assert abs(float(data.batch(torch.arange(500)).inputs.mean())) < 0.05  # normalised as ImageNet's images were


# MiniLM


def test_names_and_shapes_are_minilms(monkeypatch):
    """The digest is of the 101 entries of all-MiniLM-L6-v2 that its mean needs."""
    with torch.device("meta"):
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        assert names_and_shapes(minilm.Encoder(sizes).bert.state_dict()) == "3b6b8e4e090fe552"


def test_what_is_masked_changes_nothing(ready):
    """Neither what stands on padded places nor how many of them there are."""
    made = ready["minilm_wordnet"]
    model, ids = made.build(0).eval(), made.inputs(8)["input_ids"]
    mask = (torch.arange(minilm.LENGTH) < torch.arange(4, 20, 2)[:, None]).long()
    longest = 18
    with torch.inference_mode():
        expected = model(ids, mask)
        torch.testing.assert_close(model(ids.where(mask.bool(), 7), mask), expected)
        torch.testing.assert_close(model(ids[:, :longest], mask[:, :longest]), expected)
        one = model.bert(ids[:1, :4]).last_hidden_state.mean(1)
        torch.testing.assert_close(model.fc(one), expected[:1])


def test_tokens_are_cut_and_padded_to_one_length(cache):
    tokenizer = minilm.read_tokenizer(fetch.fetched("minilm")["tokenizer.json"])
    data = minilm.encode(tokenizer, [(7, ("trees", "of")), (3, ("tree",) * 40)])
    pieces = [WORDS[i] for i in data.inputs["input_ids"][0]]
    assert pieces == ["[CLS]", "tree", "##s", "of", "[SEP]"] + ["[PAD]"] * 27
    assert data.inputs["attention_mask"].sum(1).tolist() == [5, 32] and data.target.tolist() == [7, 3]
    assert data.inputs["input_ids"].shape == (2, 32) and WORDS[data.inputs["input_ids"][1, -1]] == "[SEP]"


def test_the_splits_are_those_of_lstm_wordnet(ready):
    other = workloads.load("lstm_wordnet", examples=300)
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(ready["minilm_wordnet"], split).target, getattr(other, split).target)


@pytest.mark.parametrize("absent", ["tokenizers", "transformers"])
def test_without_transformers_it_is_refused(cache, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(BadInput, match=r"needs the package transformers; pip install .quadriga\[text\]"):
        workloads.load("minilm_wordnet")
