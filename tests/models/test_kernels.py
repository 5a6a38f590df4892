"""The Triton kernels compute torch's convolutions: on a GPU, or on the CPU in Triton's interpreter."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT
from utils.seeds import generator

triton = pytest.importorskip("triton")

from models import kernels  # noqa: E402

# Triton's interpreter before 3.7 makes an int of an array of one number, which NumPy since 2.4 refuses
OLD = triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# kernel, stride, padding, output padding, size: all that models/networks.py has
LAYERS = [(4, 2, 1, 0, 8), (4, 1, 0, 0, 7), (3, 1, 1, 0, 4), (5, 2, 2, 1, 6), (5, 2, 2, 0, 7), (5, 1, 2, 0, 5)]


def layer_of(transposed, kernel, stride, padding, rest):
    """The layer as a function of x (B, C, H, W), weights and biases, and its weights' shape (C, N) -> shape."""
    if transposed:
        return lambda x, w, b: F.conv_transpose2d(x, w, b, stride, padding, rest), lambda c, n: (c, n, kernel, kernel)
    return lambda x, w, b: F.conv2d(x, w, b, stride, padding), lambda c, n: (n, c, kernel, kernel)


def far(a, b):
    """|a - b| / |b|"""
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm())


@pytest.fixture
def guarded(monkeypatch):
    """Puts NaN before and after all that the kernels read, so that a step outside would show."""
    in_memory = kernels._in_memory

    def between_nans(t):
        t = in_memory(t)
        room = torch.full((t.numel() + 2048,), torch.nan, dtype=t.dtype, device=t.device)
        return room[1024:-1024].view(t.shape).copy_(t)

    monkeypatch.setattr(kernels, "_in_memory", between_nans)


# Triton's interpreter multiplies no bfloat16; that a head reads it, it can show
@pytest.mark.skipif(OLD and DEVICE == "cpu", reason="Triton < 3.7 interprets nothing with NumPy >= 2.4")
@pytest.mark.parametrize("low, dtype", [(False, torch.float32), (DEVICE == "cuda", torch.bfloat16)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel, stride, padding, rest, size", LAYERS)
@pytest.mark.parametrize("shared, c, n", [(True, 3, 5), (False, 5, 17), (False, 18, 3)])
def test_kernels_equal_torch_and_its_gradients(
    guarded, low, dtype, transposed, kernel, stride, padding, rest, size, shared, c, n
):
    g = generator("cpu", kernel, stride, size)
    layer, shape = layer_of(transposed, kernel, stride, padding, rest)
    x = torch.randn(1 if shared else 2, 3, c, size, size, generator=g).to(dtype)
    w, b = torch.randn(2, *shape(c, n), generator=g), torch.randn(2, n, generator=g)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    expected = torch.stack([layer(leaves[0][0 if shared else m], leaves[1][m], leaves[2][m]).relu() for m in range(2)])
    grad = torch.randn(expected.shape, generator=g).where(expected > 0, 0).to(dtype)
    right = torch.autograd.grad(expected, leaves, grad.double())
    x, w, b, grad = (t.to(DEVICE) for t in (x, w, b, grad))
    how, close, written = (stride, padding), (1e-2 if low else 1e-6), 1e-2 if dtype == torch.bfloat16 else 1e-6

    out = kernels.convolve_by_kernel(x, w, b, *how, *expected.shape[-2:], transposed, True, low, dtype)
    assert out.dtype == dtype and far(out.cpu(), expected) < written
    back = kernels.convolve_by_kernel(grad, w, None, *how, size, size, not transposed, False, low, dtype)
    assert far((back.sum(0, keepdim=True) if shared else back).cpu(), right[0]) < written
    big, small = (grad, x) if transposed else (x, grad)
    grad_w = kernels.weight_grad_by_kernel(big, small, kernel, stride, padding, low)
    assert grad_w.dtype == torch.float32 and far(grad_w.cpu(), right[1]) < close


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_operators_are_what_torch_asks_of_one(transposed, shared):
    """Schemas, shapes and strides without data, gradients, and under torch.compile."""
    g = generator("cpu", 0)
    x = torch.randn(1 if shared else 2, 3, 4, 6, 6, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 4, 4, 4, 4, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 4, generator=g, dtype=torch.float64, requires_grad=True)
    size = 12 if transposed else 3
    how = (2, 1, size, size, transposed)
    for relu in (False, True):
        torch.library.opcheck(kernels.convolve, (x, w, b, *how, relu, False, torch.float64))
        assert torch.autograd.gradcheck(
            lambda *leaves, relu=relu: kernels.convolve(*leaves, *how, relu, False, torch.float64), (x, w, b)
        )
    small = torch.randn(2, 3, 5, 3, 3, generator=g)
    torch.library.opcheck(kernels.weight_grad, (x.detach().float(), small, 4, 2, 1, False))


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.kernels import _gather, _weight_grad
shape = dict(C=32, N=32, KERNEL=4, STRIDE=2, PADDING=1, PRECISION="tf32", BLOCK_P=64, BLOCK_K=32, BLOCK_N=32)
for kernel, tensors, how in (
    (_gather, "xwb", dict(TRANSPOSED=False, BIAS=True, RELU=True, ROWS=False)),
    (_gather, "xwb", dict(TRANSPOSED=False, BIAS=True, RELU=True, ROWS=True)),
    (_gather, "xwb", dict(TRANSPOSED=True, BIAS=False, RELU=False, ROWS=False)),
    (_weight_grad, ("big", "small"), dict(LOW=True)),
):
    constants = {**shape, **how}
    kinds = {name: "*bf16" if name in tensors else "*fp32" if name == "out" else "i32" for name in kernel.arg_names}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    print(len(compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_kernels_compile_for_hopper():
    """Where the interpreter forgives, the compiler does not; it needs no GPU."""
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}  # without TRITON_INTERPRET
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    if "ptxas" in done.stderr:
        pytest.skip("Triton came without NVIDIA's assembler")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 4
