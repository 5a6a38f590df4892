"""Convolutions of M models at once by implicit GEMM in Triton: the convolution backend "kernels".

vmap turns the convolutions of stacked models into grouped ones, for which cuDNN may be slow if the groups are
narrow. Here, one launch computes a layer of all models: it gathers the patches while it multiplies, and adds the
bias and applies the ReLU before it writes. Activations are stored as (M, B, H, W, C).

Two kernels serve all layers. `_gather` computes convolutions and transposed convolutions, each of which is also
the other's gradient with respect to the input; `_weight_grad` computes the gradients with respect to the weights.
On a CPU, the same operators use torch's convolutions, one model at a time: the reference for testing the kernels.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from .networks import InFull

PROGRAMS = 512  # the least number of programs to aim for in a launch: a few per multiprocessor of a GPU


@triton.jit
def _gather(
    x, w, b, out, positions, h_in, w_in, h_out, w_out, x_model,
    C: tl.constexpr, N: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr, BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[m, pixel, n] = ReLU(sum over taps and c of x[m, pixel of the tap, c] w[m, tap, c, n] + b[m, n]).

    A program computes BLOCK_P output pixels x BLOCK_N output channels of one model. For a transposed convolution,
    its pixels are congruent modulo STRIDE, so that they all use the same taps. The loop is over single taps; with
    ROWS, for few channels, over rows of KERNEL taps, whose channels are contiguous. BIAS and RELU are optional.
    """
    m = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        row, column = block // STRIDE % STRIDE, block % STRIDE  # the residues of the pixels modulo STRIDE
        block = block // (STRIDE * STRIDE)
        kh_first, kw_first = (row + PADDING) % STRIDE, (column + PADDING) % STRIDE
        taps_h, taps_w = (KERNEL - kh_first + STRIDE - 1) // STRIDE, (KERNEL - kw_first + STRIDE - 1) // STRIDE
        height, width = (h_out + STRIDE - 1) // STRIDE, (w_out + STRIDE - 1) // STRIDE
    else:
        taps_h, taps_w, height, width = KERNEL, 1 if ROWS else KERNEL, h_out, w_out
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    image, i, j = (p // (height * width)).to(tl.int64), p // width % height, p % width
    if TRANSPOSED:
        oh, ow = i * STRIDE + row, j * STRIDE + column
        ih_first, iw_first = i + (row + PADDING) // STRIDE, j + (column + PADDING) // STRIDE
    else:
        oh, ow, ih_first, iw_first = i, j, i * STRIDE - PADDING, j * STRIDE - PADDING
    ADJOINING: tl.constexpr = KERNEL * C if ROWS else C
    BLOCKS: tl.constexpr = (ADJOINING + BLOCK_K - 1) // BLOCK_K
    images = x + m * x_model + image * (h_in * w_in * C)
    w += m * (KERNEL * KERNEL * C * N)
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for step in range(0, taps_h * taps_w * BLOCKS):
        k = step % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = step // BLOCKS
        if TRANSPOSED:
            ih, iw = ih_first - tap // taps_w, iw_first - tap % taps_w
            tap = (kh_first + STRIDE * (tap // taps_w)) * KERNEL + kw_first + STRIDE * (tap % taps_w)
        else:
            ih, iw = ih_first + tap // taps_w, iw_first + tap % taps_w
        there = ((p < positions) & (ih >= 0) & (ih < h_in))[:, None]
        if ROWS:
            there &= (iw[:, None] + k // C >= 0) & (iw[:, None] + k // C < w_in)
        else:
            there &= ((iw >= 0) & (iw < w_in))[:, None]
        if ADJOINING % BLOCK_K:
            there &= k < ADJOINING
        patch = tl.load(images[:, None] + ((ih * w_in + iw) * C)[:, None] + k, there, 0.0)
        weight = tl.load(w + (tap * ADJOINING + k)[:, None] * N + n, (k < ADJOINING)[:, None] & (n < N), 0.0)
        acc = tl.dot(patch.to(weight.dtype), weight, acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(b + m * N + n, n < N, 0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0)
    images = out + (m * (positions // (height * width)) + image) * (h_out * w_out * N)
    there = ((p < positions) & (oh < h_out) & (ow < w_out))[:, None] & (n < N)
    tl.store(images[:, None] + ((oh * w_out + ow) * N)[:, None] + n, acc.to(out.dtype.element_ty), there)


@triton.jit
def _weight_grad(
    big, small, out, positions, share, h_big, w_big, h_small, w_small, big_model, small_model,
    C: tl.constexpr, N: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    LOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[m, part, tap, c, n] = sum over a part of small's pixels of big[m, pixel of the tap, c] small[m, pixel, n].

    For a convolution, `big` is the input and `small` the gradient of the output; for a transposed one, the reverse.
    A program computes BLOCK_K of the contiguous channels of a row of taps x BLOCK_N channels of `small`.
    """
    ADJOINING: tl.constexpr = KERNEL * C
    BLOCKS: tl.constexpr = (ADJOINING + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1)
    block = tl.program_id(0)
    tap_h = block % KERNEL
    k = block // KERNEL % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    n = block // KERNEL // BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    big += m * big_model
    small += m * small_model
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    end = tl.minimum((part + 1) * share, positions)
    for start in range(part * share, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        image, i, j = (p // (h_small * w_small)).to(tl.int64), p // w_small % h_small, p % w_small
        ih, iw = i * STRIDE - PADDING + tap_h, j * STRIDE - PADDING
        there = ((p < end) & (ih >= 0) & (ih < h_big))[None, :]
        there &= (iw[None, :] + (k // C)[:, None] >= 0) & (iw[None, :] + (k // C)[:, None] < w_big)
        if ADJOINING % BLOCK_K:
            there &= (k < ADJOINING)[:, None]
        pixels = big + image * (h_big * w_big * C) + (ih * w_big + iw) * C
        patch = tl.load(pixels[None, :] + k[:, None], there, 0.0)
        pixel = tl.load(small + p.to(tl.int64)[:, None] * N + n, (p < end)[:, None] & (n < N), 0.0)
        if LOW:
            acc = tl.dot(patch.to(tl.bfloat16), pixel.to(tl.bfloat16), acc)
        else:
            acc = tl.dot(patch.to(tl.float32), pixel.to(tl.float32), acc, input_precision=PRECISION)
    out += ((m * tl.num_programs(1) + part) * KERNEL + tap_h) * ADJOINING * N
    tl.store(out + k[:, None] * N + n, acc, (k < ADJOINING)[:, None] & (n < N))


def _tile(size: int, most: int = 128) -> int:
    """Tile length along a dimension of that size: the longest one whose padding is at most 40 % above the least."""
    covered = {tile: triton.cdiv(size, tile) * tile for tile in (128, 64, 32, 16) if tile <= most}
    return next(tile for tile, length in covered.items() if length <= 1.4 * min(covered.values()))


def _in_memory(t: Tensor) -> Tensor:
    """(M, B, C, H, W) as a contiguous (M, B, H, W, C); copies only if the memory format differs."""
    return t.permute(0, 1, 3, 4, 2).contiguous()


def _model_stride(t: Tensor) -> int:
    """Elements between consecutive models; 0 if all models share the tensor, as they do the images."""
    return t.stride(0) if len(t) > 1 else 0


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def convolve_by_kernel(
    x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding: int, height: int, width: int, transposed: bool,
    relu: bool, low: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`convolve` with the Triton kernel."""
    m, images, kernel, steps = len(w), x.shape[1], w.shape[-1], stride if transposed else 1
    w = w.permute((0, 3, 4, 1, 2) if transposed else (0, 3, 4, 2, 1)).to(torch.bfloat16 if low else w.dtype)
    w, x = w.contiguous(), _in_memory(x)  # (M, KERNEL, KERNEL, C, N), (M or 1, B, H, W, C)
    c, n = w.shape[3:]
    out = x.new_empty(m, images, height, width, n, dtype=dtype)
    positions = images * triton.cdiv(height, steps) * triton.cdiv(width, steps)
    rows = c < 16 and not transposed
    block_p, block_n = 128, _tile(n)
    _gather[triton.cdiv(positions, block_p) * steps**2, triton.cdiv(n, block_n), m](
        x, w, w if b is None else b.contiguous(), out, positions, *x.shape[2:4], height, width, _model_stride(x),
        C=c, N=n, KERNEL=kernel, STRIDE=stride, PADDING=padding, TRANSPOSED=transposed, BIAS=b is not None, RELU=relu,
        PRECISION=_precision(), ROWS=rows, BLOCK_P=block_p, BLOCK_K=_tile(kernel * c if rows else c, 64),
        BLOCK_N=block_n, num_warps=8 if block_n == 128 else 4,
    )  # fmt: skip
    return out.permute(0, 1, 4, 2, 3)


def weight_grad_by_kernel(big: Tensor, small: Tensor, kernel: int, stride: int, padding: int, low: bool) -> Tensor:
    """`weight_grad` with the Triton kernel."""
    m, images = max(len(big), len(small)), small.shape[1]
    big, small = _in_memory(big), _in_memory(small)
    c, n = big.shape[-1], small.shape[-1]
    positions, block_p, block_k, block_n = images * small.shape[2] * small.shape[3], 64, _tile(kernel * c), _tile(n)
    blocks = kernel * triton.cdiv(kernel * c, block_k) * triton.cdiv(n, block_n)
    parts = min(triton.cdiv(PROGRAMS, m * blocks), triton.cdiv(positions, 4 * block_p))
    out = big.new_empty(m, parts, kernel, kernel, c, n, dtype=torch.float32)
    share = triton.cdiv(triton.cdiv(positions, parts), block_p) * block_p
    _weight_grad[blocks, parts, m](
        big, small, out, positions, share, *big.shape[2:4], *small.shape[2:4], _model_stride(big), _model_stride(small),
        C=c, N=n, KERNEL=kernel, STRIDE=stride, PADDING=padding, LOW=low, PRECISION=_precision(),
        BLOCK_P=block_p, BLOCK_K=block_k, BLOCK_N=block_n, num_warps=8 if block_k * block_n > 64 * 64 else 4,
    )  # fmt: skip
    return out.sum(1).permute(0, 4, 3, 1, 2).contiguous()


@torch.library.custom_op("hit::convolve", mutates_args=(), device_types="cuda")
def convolve(
    x: Tensor, w: Tensor, b: Tensor | None, stride: int, padding: int, height: int, width: int, transposed: bool,
    relu: bool, low: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Convolutions or transposed convolutions of M models: (M, B, N, height, width) of the given dtype.

    Images x are (M, B, C, H, W), or (1, B, C, H, W) if all models share them. Weights w (M, N, C, K, K), if
    transposed (M, C, N, K, K), and biases b (M, N) are laid out as in torch's layers. `low` multiplies in bfloat16.
    """
    return convolve_by_kernel(x, w, b, stride, padding, height, width, transposed, relu, low, dtype)


@torch.library.custom_op("hit::weight_grad", mutates_args=(), device_types="cuda")
def weight_grad(big: Tensor, small: Tensor, kernel: int, stride: int, padding: int, low: bool) -> Tensor:
    """The gradient of M convolutions with respect to their weights, (M, N, C, K, K), in float32.

    `big` (M, B, C, H, W) is the input and `small` (M, B, N, h, w) the gradient of the output. For a transposed
    convolution, whose weights are (M, input channels, output channels, K, K), the two are swapped.
    """
    return weight_grad_by_kernel(big, small, kernel, stride, padding, low)


@convolve.register_kernel("cpu")
def convolve_plainly(x, w, b, stride, padding, height, width, transposed, relu, low, dtype):
    """`convolve` with torch's convolutions, one model at a time."""
    x, w, b = (None if t is None else t.to(torch.bfloat16 if low else w.dtype) for t in (x, w, b))
    rest = height - ((x.shape[3] - 1) * stride - 2 * padding + w.shape[-1])
    out = [
        F.conv_transpose2d(x[m % len(x)], w[m], None if b is None else b[m], stride, padding, rest)
        if transposed
        else F.conv2d(x[m % len(x)], w[m], None if b is None else b[m], stride, padding)
        for m in range(len(w))
    ]
    out = _in_memory(torch.stack(out).to(dtype)).permute(0, 1, 4, 2, 3)
    return out.relu() if relu else out


@weight_grad.register_kernel("cpu")
def weight_grad_plainly(big, small, kernel, stride, padding, low):
    """`weight_grad` with torch, one model at a time."""
    big, small = (t.to(torch.bfloat16 if low else torch.promote_types(big.dtype, small.dtype)) for t in (big, small))
    shape = (small.shape[2], big.shape[2], kernel, kernel)
    pairs = [(big[m % len(big)], small[m % len(small)]) for m in range(max(len(big), len(small)))]
    grads = torch.stack([torch.nn.grad.conv2d_weight(b, shape, s, stride, padding) for b, s in pairs])
    return grads.to(torch.promote_types(torch.float32, grads.dtype)).contiguous()


@convolve.register_fake
def _(x, w, b, stride, padding, height, width, transposed, relu, low, dtype):
    n = w.shape[2] if transposed else w.shape[1]
    return x.new_empty(len(w), x.shape[1], height, width, n, dtype=dtype).permute(0, 1, 4, 2, 3)


@weight_grad.register_fake
def _(big, small, kernel, stride, padding, low):
    shape = max(len(big), len(small)), small.shape[2], big.shape[2], kernel, kernel
    return big.new_empty(shape, dtype=torch.promote_types(torch.float32, torch.promote_types(big.dtype, small.dtype)))


def _remember(ctx, inputs, output):
    x, w, b, ctx.stride, ctx.padding, _, _, ctx.transposed, ctx.relu, ctx.low, _ = inputs
    ctx.biased = b is not None
    ctx.save_for_backward(x, w, output if ctx.relu else None)


def _backward(ctx, grad):
    x, w, out = ctx.saved_tensors
    grad_x = grad_w = grad_b = None
    if ctx.relu:
        grad = torch.where(out > 0, grad, 0)
    if ctx.needs_input_grad[0]:
        size, back = x.shape[3:], not ctx.transposed
        grad_x = convolve(grad, w, None, ctx.stride, ctx.padding, *size, back, False, ctx.low, x.dtype)
        grad_x = grad_x if len(x) == len(w) else grad_x.sum(0, keepdim=True)
    if ctx.needs_input_grad[1]:
        big, small = (grad, x) if ctx.transposed else (x, grad)
        grad_w = weight_grad(big, small, w.shape[-1], ctx.stride, ctx.padding, ctx.low)
    if ctx.biased:
        grad_b = grad.sum((1, 3, 4), dtype=w.dtype)
    return grad_x, grad_w, grad_b, *[None] * 8


convolve.register_autograd(_backward, setup_context=_remember)


@torch.library.custom_op("hit::convolve_one", mutates_args=())
def convolve_one(
    x: Tensor, w: Tensor, b: Tensor, stride: int, padding: int, height: int, width: int, transposed: bool,
    relu: bool, low: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`convolve` for one model, without the leading M; under vmap, as in training, for all models at once."""
    return convolve(x[None], w[None], b[None], stride, padding, height, width, transposed, relu, low, dtype)[0].clone()


@convolve_one.register_vmap
def _(info, dims, x, w, b, *how):
    stacked = [t.unsqueeze(0) if dim is None else t.movedim(dim, 0) for t, dim in zip((x, w, b), dims, strict=False)]
    return convolve(*stacked, *how), 0


class _ByKernel:
    """Mixin for a convolution layer that computes by `convolve`."""

    relu = False  # whether a ReLU is fused

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], self.padding[0]
        if self.transposed:
            size = [(n - 1) * stride - 2 * padding + kernel + self.output_padding[0] for n in x.shape[-2:]]
        else:
            size = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[-2:]]
        low = torch.is_autocast_enabled(x.device.type) and not isinstance(self, InFull)
        dtype = torch.bfloat16 if low else self.weight.dtype
        return convolve_one(x, self.weight, self.bias, stride, padding, *size, self.transposed, self.relu, low, dtype)


@functools.cache
def _by_kernel(layer: type) -> type:
    return type(f"{layer.__name__}ByKernel", (_ByKernel, layer), {})


def use_kernels(model: nn.Module) -> None:
    """Makes all convolutions of a model, in place, use `convolve`, fused with the ReLU that follows them."""
    for parent in list(model.modules()):
        for (_, layer), (after, following) in itertools.pairwise([*parent.named_children(), ("", None)]):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.__class__ = _by_kernel(type(layer))
                if isinstance(parent, nn.Sequential) and isinstance(following, nn.ReLU):
                    layer.relu = True
                    setattr(parent, after, nn.Identity())
