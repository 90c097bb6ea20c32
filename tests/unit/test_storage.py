"""Entropy-coded storage: bit for bit the same files, smaller, loadable without Quadriga, and damage is named."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from quadriga import runtime
from quadriga.core.slots import RuntimeSpec
from quadriga.methods.hardware.entropy_storage import EntropyStorage
from quadriga.methods.structure.cluster_weights import ClusterWeights
from quadriga.runtime import _pack, standalone
from quadriga.runtime.standalone import _unpack
from quadriga.testing import tiny_cnn
from quadriga.testing.setups import trained_setup

torch.set_num_threads(1)


@pytest.mark.parametrize("counts", [[1], [5000], [3, 9000, 4096, 1]])
def test_symbols_come_back_at_about_their_entropy(counts):
    rng, columns, tables = np.random.default_rng(0), [], []
    for k, count in enumerate(counts):
        share = rng.dirichlet(np.ones(3 + 20 * k) * 0.3)
        symbols = rng.choice(len(share), count, p=share).astype(np.uint16)
        values, symbols = np.unique(symbols, return_inverse=True)
        columns.append(symbols.astype(np.uint16))
        tables.append(_pack.frequencies(np.bincount(symbols, minlength=len(values)), 12))
    words = _pack.encode(columns, tables, 12)
    decoded = _unpack.decode(words, [(len(c), t) for c, t in zip(columns, tables, strict=True)], 12)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, columns, strict=True))
    entropy = sum(float(-(n * np.log2(n / n.sum())).sum()) for n in (np.bincount(c)[np.bincount(c) > 0] for c in columns)) / 8
    assert 2 * len(words) <= 1.02 * entropy + 8 * (len(columns) + sum(counts) // 4096)


def test_any_files_come_back():
    files = {"a.bin": b"", "b.bin": bytes(range(256)) * 9, "c.bin": np.random.default_rng(0).bytes(3000)}
    data = _pack.pack(files, {"files": list(files)})
    assert [_unpack.unpack(data, k) for k in range(3)] == list(files.values())


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_a_clustered_model_is_small_and_computes_the_same(name, tmp_path):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime")
    setup = ClusterWeights(bits=3, least=64)(trained_setup(tiny_cnn))
    spec = RuntimeSpec(name=name)
    plain = runtime.build(setup.model.eval(), spec, setup.context, tmp_path / "plain")
    packed_spec = EntropyStorage()(setup).runtime
    packed = runtime.build(
        setup.model.eval(), RuntimeSpec(name=name, storage=packed_spec.storage), setup.context, tmp_path / "packed"
    )
    assert packed.bytes < 0.5 * plain.bytes and packed.files == ("runtime.json", "model.qdz")
    x = setup.context.example
    assert torch.equal(packed.run()(x), plain.run()(x))
    code = "import sys, torch; sys.modules['quadriga'] = None; import load; print(load.load()(torch.zeros(3, 1, 20, 20)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "packed", capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([3, 4])", done.stderr


@pytest.mark.parametrize("place", [0, 6, 40, -30])
def test_damage_is_named(place, tmp_path):
    setup = ClusterWeights(bits=3, least=64)(trained_setup(tiny_cnn))
    runtime.build(setup.model.eval(), RuntimeSpec(storage="entropy"), setup.context, tmp_path)
    path = tmp_path / "model.qdz"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x5A
    path.write_bytes(bytes(data))
    with pytest.raises(standalone.Damaged, match=r"model\.qdz is damaged"):
        standalone.load(tmp_path)
    path.write_bytes(bytes(data[:50]))
    with pytest.raises(standalone.Damaged, match=r"model\.qdz is damaged"):
        standalone.load(tmp_path)
    path.unlink()
    with pytest.raises(standalone.Damaged, match=r"model\.qdz is missing"):
        standalone.load(tmp_path)
