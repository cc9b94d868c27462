"""Laws of the networks: shapes, conditions, symmetry, and that every parameter learns."""

import pytest
import torch
from torch import nn

from kakusan.models.nets.attention import SelfAttention, attend, explicit_attention, written_out
from kakusan.models.nets.embeddings import sinusoids
from kakusan.models.nets.mlp import MLP
from kakusan.models.nets.unet import UNet, normalise, unet_defaults


def awake(net: nn.Module, seed: int = 0) -> nn.Module:
    """A network at a generic point: at the start its last layers are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def nets(classes: int = 0) -> list[tuple[nn.Module, tuple[int, ...]]]:
    small = {"width": 16, "multipliers": (1, 2), "classes": classes}
    torch.manual_seed(0)
    return [
        (MLP((3,), width=32, depth=2, classes=classes), (3,)),
        (MLP((2, 5), width=32, depth=2, classes=classes), (2, 5)),
        (UNet(2, 8, **small), (2, 8, 8)),
        (UNet(1, (7, 10), **small), (1, 7, 10)),
    ]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (2, 13, 9), (4, 5, 17)])
def test_unet_keeps_every_shape(shape):
    net = UNet(shape[0], shape[1:], width=16, multipliers=(1, 1, 2))
    x = torch.randn(2, *shape)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert net(x.to(memory_format=layout), torch.rand(2)).shape == x.shape, shape


def test_more_output_channels():
    net = UNet(3, 8, width=16, multipliers=(1, 2), out_channels=6)
    assert net(torch.randn(2, 3, 8, 8), torch.rand(2)).shape == (2, 6, 8, 8)


def test_the_output_is_zero_at_the_start():
    for net, shape in nets(classes=3):
        assert not net(torch.randn(4, *shape), torch.rand(4)).any(), net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_for_all_equals_a_time_each(dtype):
    for net, shape in nets():
        awake(net)
        x, t = torch.randn(4, *shape), torch.tensor(0.3, dtype=dtype)
        torch.testing.assert_close(net(x, t), net(x, t.expand(4)))
        assert not torch.allclose(net(x, t), net(x, t + 0.1)), "the time must matter"


def test_no_label_equals_minus_one_and_labels_matter():
    for net, shape in nets(classes=3):
        awake(net)
        x, t = torch.randn(4, *shape), torch.rand(4)
        none, label = torch.full((4,), -1), torch.tensor([0, 1, -1, 2])
        torch.testing.assert_close(net(x, t), net(x, t, none))
        same = torch.isclose(net(x, t), net(x, t, label)).flatten(1).all(1)
        assert same.tolist() == [False, False, True, False], net


def test_a_label_without_classes_is_refused():
    with pytest.raises(ValueError, match="classes"):
        MLP((2,))(torch.randn(1, 2), torch.rand(1), torch.tensor([0]))


def test_every_parameter_receives_a_gradient():
    for net, shape in nets(classes=3):
        awake(net)
        label = torch.tensor([0, 1, 2, -1])
        net(torch.randn(4, *shape), torch.rand(4), label).square().sum().backward()
        dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert not dead, dead


def test_batch_mates_do_not_talk():
    for net, shape in nets():
        awake(net)
        x, t = torch.randn(4, *shape), torch.rand(4)
        alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(4)])
        torch.testing.assert_close(net(x, t), alone, atol=1e-5, rtol=1e-5)


def test_layouts_agree():
    net, x, t = awake(nets()[2][0]), torch.randn(4, 2, 8, 8), torch.rand(4)
    plain = net(x, t)
    net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last, plain, atol=1e-4, rtol=1e-4)


def test_normalise_is_its_formula_in_both_layouts():
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, 8, 1, 1, dtype=torch.float64)
    dims = (1, 2, 3)
    std = (x.var(dims, keepdim=True, correction=0) + 1e-5).sqrt()
    unit = (x - x.mean(dims, keepdim=True)) / std
    expected = (1 + scale) * unit + shift
    modulation = torch.cat([scale, shift], dim=1).flatten(1)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(normalise(x.to(memory_format=layout), modulation), expected)


def test_both_forms_of_attention_agree():
    torch.manual_seed(0)
    for dtype, atol in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        q, k, v = torch.randn(3, 2, 4, 20, 8, dtype=dtype)
        fused = attend(q, k, v)
        with explicit_attention():
            explicit = attend(q, k, v)
        torch.testing.assert_close(explicit, fused, atol=atol, rtol=0)
        torch.testing.assert_close(written_out(q, k, v), fused, atol=atol, rtol=0)


def test_bfloat16_attention_is_right_to_its_precision():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 20, 8)
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    torch.testing.assert_close(low, attend(q, k, v), atol=0.05, rtol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_explicit_attention_opens_jvp_and_double_backward(layout):
    torch.manual_seed(0)
    net = awake(UNet(1, 8, width=16, multipliers=(1, 2)).double())
    x, v = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64).unbind()
    x, t = x.to(memory_format=layout).requires_grad_(), torch.rand(2, dtype=torch.float64)
    with explicit_attention():
        _, tangent = torch.func.jvp(lambda x: net(x, t), (x.detach(),), (v,))
        y = net(x, t)
    h = 1e-5
    slope = (net(x + h * v, t) - net(x - h * v, t)) / (2 * h)
    torch.testing.assert_close(tangent, slope, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((gradient * v).sum(), x)
    assert second.isfinite().all() and second.any()


def test_attention_sees_a_set():
    attention = awake(SelfAttention(32))
    x, order = torch.randn(2, 10, 32), torch.randperm(10)
    torch.testing.assert_close(attention(x)[:, order], attention(x[:, order]))


def test_default_sizes():
    for size, least, most in ((8, 0.25e6, 0.5e6), (28, 0.9e6, 1.2e6), (32, 0.9e6, 1.2e6)):
        net = UNet(1, size, classes=10, **unet_defaults(size))
        assert least < sum(p.numel() for p in net.parameters()) < most, size


def test_low_precision_times_are_embedded_in_full():
    t = torch.tensor([0.5, 0.875])  # exact in bfloat16
    torch.testing.assert_close(sinusoids(t.bfloat16(), 32), sinusoids(t, 32))


def test_low_precision_network_and_autocast():
    for net, shape in nets():
        awake(net)
        x, t = torch.randn(4, *shape), torch.rand(4, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x, t).dtype == x.dtype, net
        assert net.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16, net


def test_dropout_acts_only_in_training():
    net = awake(MLP((2,), width=32, depth=2, dropout=0.5))
    x, t = torch.randn(8, 2), torch.rand(8)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))
