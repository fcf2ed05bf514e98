"""The selective scan: every implementation equals the token-by-token recurrence, forwards and backwards."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vitarium.errors import UsageError
from vitarium.ops.scan import causal_conv_silu, choose, scan_doubling, scan_matrix, scan_reference, scan_step, selective_scan
from vitarium.ops.scan.implementations import kernels

HERE = ["loop", *(["numba"] if kernels("numba") else [])]
NAMES = ("x", "delta", "a", "b", "c", "skip", "bias")
TRITON = """
import torch
from tests.ops.test_scan import compare
compare("triton", torch.float64, True, length=70, channels=3, states=2, images=1)
with torch.no_grad():
    compare("triton", torch.float32, False, length=130, channels=17, states=1, images=1)
"""

FIRST_USE = """
import sys, torch
import vitarium.backbones.vim
from tests.ops.test_scan import inputs, scan
values = inputs(torch.float32, length=20)
with torch.inference_mode():
    expected = scan(values)[0]
assert "torch._dynamo" not in sys.modules
y = torch.compile(lambda *v: scan(list(v))[0], fullgraph=True, backend="aot_eager")(*[v.requires_grad_() for v in values])
torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
y.sum().backward()
assert all(v.grad.isfinite().all() for v in values)
"""


def inputs(dtype: torch.dtype = torch.float64, *, images: int = 2, length: int = 150, channels: int = 9, states: int = 5) -> list[Tensor]:
    """x, delta, a, b, c, skip, bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, length, channels)] * 2 + [(channels, states)] + [(images, length, states)] * 2 + [(channels,)] * 2
    x, delta, a, b, c, skip, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [v.to(dtype) for v in (x, delta - 1, -a.exp(), b, c, skip, 0.1 * bias)]


def recurrence(values: list[Tensor], *, softplus: bool = True, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Return the expected result of `selective_scan`, by `scan_reference`."""
    x, delta, a, b, c, skip, bias = values
    delta = F.softplus(delta + bias) if softplus else delta + bias
    x, delta, b, c = (v.flip(1) if reverse else v for v in (x, delta, b, c))
    y, state = scan_reference(x, delta, a, b, c)
    y = y + skip * x
    return (y.flip(1) if reverse else y), state


def scan(values: list[Tensor], **options) -> tuple[Tensor, Tensor]:
    *first, bias = values
    return selective_scan(*first, bias=bias, **{"softplus": True, **options})


def compare(implementation: str, dtype: torch.dtype, reverse: bool, **sizes: int) -> None:
    """Outputs, last state and, where gradients are on, all seven gradients."""
    grad = torch.is_grad_enabled()
    ours = [v.requires_grad_(grad) for v in inputs(dtype, **sizes)]
    theirs = [v.detach().double().requires_grad_(grad) for v in ours]
    y, state = scan(ours, reverse=reverse, implementation=implementation)
    expected, last = recurrence(theirs, reverse=reverse)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state.double(), last.detach(), rtol=tolerance, atol=tolerance)
    if grad:
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y.backward(weight.to(dtype))
        expected.backward(weight)
        for name, v, w in zip(NAMES, ours, theirs, strict=True):
            error = (v.grad.double() - w.grad).abs().max() / w.grad.std()
            assert error < tolerance, f"gradient to {name}: {error:.2g}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("implementation", HERE)
def test_equals_the_recurrence(implementation: str, dtype: torch.dtype, reverse: bool):
    compare(implementation, dtype, reverse)
    with torch.no_grad():
        compare(implementation, dtype, reverse, length=65, channels=130, images=1)


def test_triton_in_its_interpreter_equals_the_recurrence():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("implementation", HERE)
def test_gradients_by_differences(implementation: str):
    values = [v.requires_grad_() for v in inputs(images=1, length=6, channels=2, states=2)]
    assert torch.autograd.gradcheck(lambda *v: scan(list(v), implementation=implementation)[0], values)
    assert torch.autograd.gradcheck(lambda *v: scan(list(v), reverse=True, implementation=implementation)[0], values)


def test_the_parallel_prefix_equals_the_recurrence():
    for length in (1, 2, 7, 64):
        x, delta, a, b, c, *_ = inputs(length=length)
        for ours, theirs in zip(scan_doubling(x, delta.exp(), a, b, c), scan_reference(x, delta.exp(), a, b, c), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", HERE)
def test_step_by_step_equals_all_at_once(implementation: str):
    x, delta, a, b, c, *_ = inputs(length=20)
    y, last = selective_scan(x, delta.exp(), a, b, c, implementation=implementation)
    state = torch.zeros_like(last)
    for t in range(20):
        y_t, state = scan_step(state, x[:, t], delta[:, t].exp(), a, b[:, t], c[:, t])
        torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("implementation", HERE)
def test_nothing_looks_ahead(implementation: str):
    values = inputs(length=80)
    before, _ = scan(values, implementation=implementation)
    for v in (values[0], values[1], values[3], values[4]):
        v[:, 40:] = torch.randn_like(v[:, 40:])
    after, _ = scan(values, implementation=implementation)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


@pytest.mark.parametrize("implementation", HERE)
def test_layout_in_memory_does_not_matter(implementation: str):
    values = inputs()
    turned = [v.transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for v in values]
    y, _ = scan(turned, implementation=implementation)
    torch.testing.assert_close(y, recurrence(values)[0])
    y.transpose(1, 2).contiguous().sum().backward()
    plain = [v.requires_grad_() for v in values]
    recurrence(plain)[0].sum().backward()
    assert all(torch.allclose(v.grad, w.grad) for v, w in zip(turned, plain, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 3])
def test_threads_share_the_work(threads: int, images: int):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        compare("auto", torch.float32, False, images=images, channels=300, length=40)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(implementation: str, dtype: torch.dtype):
    values = inputs(dtype)
    y, state = scan(values, implementation=implementation)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    expected, last = recurrence([v.double() for v in values])
    torch.testing.assert_close(state.double(), last, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(values, implementation=implementation)[0], y)


@pytest.mark.parametrize("implementation", HERE)
def test_not_a_number_is_not_hidden(implementation: str):
    values = inputs(torch.float32, length=10)
    values[1][0, 5, 0] = float("nan")
    y, _ = scan(values, implementation=implementation)
    assert torch.isfinite(y[0, :5]).all()
    assert y[0, 5:, 0].isnan().all()
    assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("implementation", HERE)
def test_long_steps_and_fast_rates_do_not_overflow(implementation: str):
    values = [v.requires_grad_() for v in inputs(torch.float32, length=40)]
    with torch.no_grad():
        values[1].mul_(300)
        values[2].mul_(300)
    y, _ = scan(values, implementation=implementation)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(v.grad).all() for v in values)


def test_memory_of_training_has_no_states_in_it():
    """Memory of the backward pass grows with tokens and channels, not with tokens times states."""
    kept = {}
    for states in (4, 32):
        values = [v.requires_grad_() for v in inputs(torch.float32, images=1, length=1024, channels=64, states=states)]
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            scan(values)
        kept[states] = sum(sizes) - 2 * 1024 * states - 64 * states  # b, c and a are inputs
    assert kept[32] < 1.3 * kept[4]


def test_compiles_whole_and_counts_its_operations():
    from torch.utils.flop_counter import FlopCounterMode

    values = [v.requires_grad_() for v in inputs(torch.float32, length=70)]
    compiled = torch.compile(lambda *v: scan(list(v))[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values), scan(values)[0])
    compiled(*values).sum().backward()
    with FlopCounterMode(display=False) as counter:
        scan([v.detach() for v in values])
    assert counter.get_total_flops() == 2 * 70 * 9 * (9 * 5 + 1)


def test_the_operator_is_registered_at_first_use():
    """Importing and plain inference leave the compiler out of the process; a first call inside a compiled graph still works."""
    run = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-2000:]


def test_exports_as_ordinary_operators():
    class Scan(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return scan(list(values))[0]

    values = tuple(inputs(torch.float32, length=20))
    program = torch.export.export(Scan(), values)
    assert not any("vitarium" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*values), scan(list(values))[0], rtol=1e-4, atol=1e-5)


def test_function_transforms():
    values = inputs(images=1, length=8, channels=3, states=2)
    jacobian = torch.func.jacrev(lambda x: scan([x, *values[1:]])[0].sum((0, 2)))(values[0])
    assert jacobian.shape == (8, 1, 8, 3)
    assert (jacobian[0, :, 1:] == 0).all()


def test_empty_batches_and_sequences():
    for sizes in (dict(images=0), dict(length=0)):
        values = [v.requires_grad_() for v in inputs(torch.float32, **sizes)]
        y, state = scan(values)
        assert (y.shape, state.shape) == (values[0].shape, (values[0].shape[0], 9, 5))
        y.sum().backward()


def test_works_without_numba():
    code = "import sys; sys.modules['numba'] = None\nfrom vitarium.ops.scan import choose\nprint(choose('cpu'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["loop"]


def test_refuses():
    values = inputs()
    with pytest.raises(UsageError, match="did you mean numba"):
        scan(values, implementation="nunba")
    with pytest.raises(UsageError, match=r"b must be \(2, 150, 5\), got \(2, 149, 5\)"):
        scan([*values[:3], values[3][:, :-1], *values[4:]])
    with pytest.raises(UsageError, match="images, tokens, channels"):
        scan([values[0][0], *values[1:]])
    assert choose("meta") == "loop"


@pytest.mark.parametrize("reverse", [False, True])
def test_causal_convolution(reverse: bool):
    x, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 4), torch.randn(6)
    turned = x.flip(1) if reverse else x
    expected = F.silu(F.conv1d(F.pad(turned.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6)).transpose(1, 2)
    expected = expected.flip(1) if reverse else expected
    torch.testing.assert_close(causal_conv_silu(x, weight, bias, reverse=reverse), expected)
    torch.testing.assert_close(causal_conv_silu(x, weight.clone().requires_grad_(), bias, reverse=reverse), expected)
    wide = torch.randn(1, 3, 12)[..., :6]  # fewer tokens than taps, and not contiguous
    torch.testing.assert_close(
        causal_conv_silu(wide, weight, bias, reverse=reverse),
        causal_conv_silu(wide, weight.clone().requires_grad_(), bias, reverse=reverse),
    )


def test_the_matrix_form_equals_the_recurrence():
    torch.manual_seed(0)
    x, delta = torch.randn(2, 9, 5).double(), torch.rand(2, 9, 5).double()
    a, b, c = -torch.rand(5, 4).double() * 3, torch.randn(2, 9, 4).double(), torch.randn(2, 9, 4).double()
    matrix = scan_matrix(delta, a, b, c)
    expected, _ = scan_reference(x, delta, a, b, c)
    torch.testing.assert_close(torch.einsum("idts,isd->itd", matrix, x), expected, rtol=0, atol=1e-12)
    assert not matrix.triu(1).any()
    assert scan_matrix(1e3 * delta, a, b, c).isfinite().all()
