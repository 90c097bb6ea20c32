"""Rounding to integers: bounds of the error, where zero goes, and which range is best."""

from __future__ import annotations

import pytest
import torch

from quadriga.core.rounding import round_activation, round_weight, value_range


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_errs_by_half_a_scale_at_most_and_is_one_of_its_levels(bits, axis):
    weight = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    found = round_weight(weight, axis, bits)
    dims = [d for d in range(3) if d != axis]
    scale = weight.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((found - weight).abs() <= scale / 2 * (1 + 1e-5)).all()
    levels = found / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert len(levels.round().unique()) > 2 ** (bits - 2)


def test_scaling_a_channel_scales_its_rounding():
    """So that rounding before and after batch normalization is folded in is the same."""
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    gain = torch.tensor([0.5, 2.0, 1024.0, 1 / 64])[:, None]
    torch.testing.assert_close(round_weight(weight * gain), round_weight(weight) * gain, rtol=1e-6, atol=0)


def test_gradients_pass_straight_through():
    weight = torch.randn(3, 4, requires_grad=True)
    (round_weight(weight) * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((3, 4), 2.0))
    x = torch.tensor([-3.0, 0.5, 3.0], requires_grad=True)
    round_activation(x, -1.0, 1.0).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0]  # none where it was clipped


def test_an_activation_errs_by_half_a_level_inside_and_keeps_zero():
    x = torch.linspace(-0.7, 2.1, 1001)
    found = round_activation(x, x.min(), x.max())
    assert (
        (found - x).abs() <= 2.8 / 255 / 2 * 1.01 + 2.8 / 255 * 0.5
    ).all()  # zero is a level, which shifts the ends by half of one
    assert round_activation(torch.zeros(1), -0.7, 2.1).item() == 0
    assert round_activation(torch.zeros(1), 0.5, 2.1).item() == 0  # the range is widened until it holds zero
    assert torch.equal(round_activation(torch.zeros(3), 0.0, 0.0), torch.zeros(3))


def test_the_mse_range_is_no_worse_than_any_other_and_clips_an_outlier():
    draw = torch.Generator().manual_seed(2)
    values = torch.cat([torch.randn(20_000, generator=draw), torch.tensor([300.0])])

    def error(ends):
        return (round_activation(values, *ends) - values).square().mean()

    ranges = {kind: value_range(values, kind) for kind in ("minmax", "percentile", "mse")}
    assert ranges["minmax"] == (float(values.min()), 300.0)
    assert ranges["percentile"][1] < 5
    assert error(ranges["mse"]) <= min(error(ranges["minmax"]), error(ranges["percentile"])) * 1.0001
    plain = torch.randn(20_000, generator=draw)  # without outliers little is clipped
    assert value_range(plain, "mse")[1] > 0.6 * float(plain.max())


def test_a_range_of_nothing_or_of_another_kind_is_refused():
    with pytest.raises(ValueError, match='no kind of range "entropy"'):
        value_range(torch.ones(3), "entropy")
    with pytest.raises(ValueError, match="no values"):
        value_range(torch.ones(0))


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_a_range_does_not_go_by_every_kth_value(kind):
    """Pictures repeat: of these a thinning by steps sees the dark places alone."""
    values = torch.zeros(1 << 21)
    values[1::2] = torch.linspace(0.0, 1.0, 1 << 20)
    assert value_range(values, kind)[1] == pytest.approx(1.0, abs=0.03)
