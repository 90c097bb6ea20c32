"""Shape constants in the user's forward follow a changed width, or the change is refused with the line."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from quadriga.core.axes import AxisGraph
from quadriga.core.axes.derive import derive
from quadriga.core.axes.interface import Reference, check_interface
from quadriga.core.axes.kernels import recentre, smaller_kernels
from quadriga.core.axes.reshape import blocks
from quadriga.core.errors import NotApplicable

torch.set_num_threads(1)


class Net(nn.Module):
    """A LeNet whose flattening is `flat(x)`."""

    def __init__(self, flat, inputs=400):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5), nn.Linear(inputs, 10)
        self.flat = flat

    def forward(self, x):
        x = functional.max_pool2d(self.conv1(x), 2)
        return self.fc(self.flat(functional.max_pool2d(self.conv2(x), 2)))


class Literal(nn.Module):
    def forward(self, x):
        return x.view(-1, 400)


class Named(nn.Module):
    size = 16 * 5 * 5

    def forward(self, x, scale: float = 1.0):
        x = torch.reshape(x, (x.shape[0], self.size))
        return functional.dropout(x, 0.5, training=self.training) * scale


class Derived(nn.Module):
    def forward(self, x):
        batch, channels, height, width = x.shape
        return x.reshape(batch, channels * height * width)


class Branching(nn.Module):
    def forward(self, x):
        return x.view(-1, 400) if x.dim() == 4 else x  # torch.export takes this branch, torch.fx cannot


IMAGES = torch.randn(2, 1, 32, 32)


@pytest.mark.parametrize("flat", [Literal, Named, Derived, nn.Flatten])
def test_kernels_5_to_3_never_return_36_rows_for_25(flat):
    """`view(-1, 400)` on 16·6·6 features would make 36 rows out of 25."""
    net = Net(flat()).eval()
    names = list(net.state_dict())
    smaller_kernels(AxisGraph.trace(net, IMAGES), 3)
    assert net.fc.in_features == 576 and net.conv1.kernel_size == (3, 3)
    for batch in (1, 2, 25):
        assert net(torch.randn(batch, 1, 32, 32)).shape == (batch, 10)
    assert list(net.state_dict()) == names and isinstance(net.flat, flat)
    AxisGraph.trace(net, IMAGES).cut("conv2", torch.arange(7))  # and once more, from the rewritten forward
    assert net.fc.in_features == 7 * 36 and net(torch.randn(25, 1, 32, 32)).shape == (25, 10)
    assert deepcopy(net)(IMAGES).equal(net(IMAGES))


def test_code_that_derives_its_shape_stays_the_users():
    net = Net(Derived())
    smaller_kernels(AxisGraph.trace(net, IMAGES), 3)
    assert type(net.flat) is Derived and type(net) is Net


def test_a_rewritten_forward_keeps_its_mode_and_signature():
    net = Net(Named())
    smaller_kernels(AxisGraph.trace(net, IMAGES), 3)
    x = torch.ones(2, 16, 6, 6)
    assert type(net.flat).__name__ == "Named" and type(net.flat) is not Named
    assert net.flat.eval()(x, scale=3.0).eq(3).all()
    assert not net.flat.train()(x).eq(1).all()


def test_a_constant_that_cannot_be_rewritten_is_refused_with_its_line():
    net = Net(Branching())
    graph = AxisGraph.trace(net, IMAGES)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(NotApplicable, match=r"flat \(test_axes_constants\.py:\d+\)"):
        smaller_kernels(graph, 3)
    assert net.conv1.kernel_size == (5, 5) and net.fc.in_features == 400
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.flat, self.fc = Rows(), nn.Linear(4 * 16 + 6 * 16, 3)

    def forward(self, x):
        a = self.a(x)
        return self.fc(torch.cat([self.flat(a), self.flat(self.b(a))], 1))


class Rows(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1, 16).flatten(1)


def test_shared_code_that_needs_no_change_is_left_alone():
    net = Twice()
    AxisGraph.trace(net, torch.randn(2, 1, 4, 4)).cut("a", torch.arange(3))
    assert net.fc.in_features == 3 * 16 + 6 * 16 and type(net.flat) is Rows


def test_derive_agrees_with_a_new_trace():
    """Shapes derived from the old trace are those that the changed model really has, at every operator."""
    net = Net(Literal())
    graph = AxisGraph.trace(net, IMAGES)
    graph.cut("conv1", torch.arange(4))
    graph.cut("conv2", torch.arange(5))
    again = AxisGraph.trace(net, IMAGES)
    assert derive(graph.traced, graph.walk).shapes == derive(again.traced, again.walk).shapes


def test_the_check_finds_rows_that_mix():
    """A reshape may keep the output's shape and still mix examples."""

    class Mixed(nn.Module):
        def forward(self, x):
            return x.t().reshape(x.shape) if self.training is None else x.flip(0) + x

    x = torch.randn(25, 4)
    reference = Reference.of(nn.Identity(), x)
    assert reference.rowwise
    with pytest.raises(NotApplicable, match="mixes the examples"):
        check_interface(Mixed(), x, reference)


@pytest.mark.parametrize("old, new", [((2, 3, 4), (6, 4)), ((6, 4), (2, 3, 2, 2)), ((5, 1, 3), (5, 3, 1)), ((4, 6), (6, 4))])
def test_blocks_hold_the_same_numbers(old, new):
    """Each block has equal products, and together they cover all dimensions in order."""
    found = blocks(old, new)
    assert [i for ins, _ in found for i in ins] == list(range(len(old)))
    assert [o for _, outs in found for o in outs] == list(range(len(new)))
    for ins, outs in found:
        assert torch.tensor([old[i] for i in ins]).prod() == torch.tensor([new[o] for o in outs]).prod()


def test_recentre_crops_pads_and_halves():
    """Even differences crop or pad exactly; padding and cropping back is the identity; odd ones keep the sum when they grow."""
    block = torch.randn(3, 2, 5, 4)
    assert recentre(block, (3, 4)).equal(block[:, :, 1:4])
    assert recentre(recentre(block, (9, 8)), (5, 4)).equal(block)
    torch.testing.assert_close(recentre(block, (6, 5)).sum((2, 3)), block.sum((2, 3)))
    line = torch.arange(5.0)
    torch.testing.assert_close(recentre(line, (4,)), torch.tensor([0.5, 1.5, 2.5, 3.5]))


def test_centred_inheritance_is_exact_where_only_the_centre_counts():
    """A 5×5 kernel that is zero outside its centre 3×3 loses nothing: old outputs are the middle of the new ones."""
    net = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4 * 4 * 4, 3)).double()
    mask = torch.zeros(5, 5)
    mask[1:4, 1:4] = 1
    net[0].weight.data *= mask
    x = torch.randn(2, 1, 8, 8, dtype=torch.double)
    before = net(x)
    smaller_kernels(AxisGraph.trace(net, x), 3)
    assert net[2].in_features == 4 * 6 * 6
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_shrinks_with_the_kernel(dilation):
    """With zeros outside the centre, padded convolutions give exactly the same map."""
    conv = nn.Conv2d(1, 3, 5, padding=2 * dilation, dilation=dilation, stride=2).double()
    net = nn.Sequential(conv, nn.Flatten(), nn.LazyLinear(2).double())
    x = torch.randn(2, 1, 12, 12, dtype=torch.double)
    net(x)
    mask = torch.zeros(5, 5)
    mask[1:4, 1:4] = 1
    conv.weight.data *= mask
    before = net(x)
    smaller_kernels(AxisGraph.trace(net, x), 3)
    assert conv.padding == (dilation, dilation) and conv.kernel_size == (3, 3)
    torch.testing.assert_close(net(x), before)


def test_kernels_that_would_skip_pixels_stay():
    net = nn.Sequential(nn.Conv2d(1, 4, 4, stride=4), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(NotApplicable, match="no convolution that may shrink"):
        smaller_kernels(AxisGraph.trace(net, torch.randn(2, 1, 8, 8)), 3)


def test_an_output_map_that_would_grow_is_refused_whole():
    net = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Conv2d(4, 2, 5))
    with pytest.raises(NotApplicable, match="returns"):
        smaller_kernels(AxisGraph.trace(net, torch.randn(2, 1, 12, 12)), 3)
    assert net[0].kernel_size == (5, 5) and net[0].weight.shape == (4, 1, 5, 5)


class Peeking(nn.Module):
    """Reads a weight in training mode alone, as Mamba does."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x)
        return x @ self.fc.weight.T if self.training else self.fc(x)


def test_a_network_that_would_fail_in_training_only_is_noticed():
    net, x = Peeking(), torch.randn(2, 4)
    reference, before = Reference.of(net, x), {k: v.clone() for k, v in net.state_dict().items()}
    net.fc = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3))
    with pytest.raises(NotApplicable, match="in training mode: 'Sequential' object has no attribute 'weight'"):
        check_interface(net, x, reference)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k in before)
