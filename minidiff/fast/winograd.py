"""3 x 3 convolutions with four ninths of the multiplications (Winograd 1980; Lavin & Gray 2016, F(2 x 2, 3 x 3)).

Two neighbouring outputs of a filter with three taps, (d0 g0 + d1 g1 + d2 g2, d1 g0 + d2 g1 + d3 g2), take six products
as written, and four if the inputs are combined first:

    m0 = (d0 - d2) g0                    m1 = (d1 + d2) (g0 + g1 + g2) / 2
    m3 = (d1 - d3) g2                    m2 = (d2 - d1) (g0 - g1 + g2) / 2

    outputs: m0 + m1 + m2,  m1 - m2 - m3

In two dimensions, tiles of 4 x 4 inputs, overlapping by two, become 16 numbers, and 2 x 2 outputs take 16 products
instead of 36. The transform of the filters is computed once. Over many channels the products are 16 matrix products,
which run at the processor's limit, and each sum has a ninth of the terms, so the result is closer to the exact one than
that of a plain convolution. The price is memory, 16 numbers for every nine weights, so this is used only for layers
with a large picture, and only without AVX512: with it, packed convolutions come so near to the processor's limit that a
UNet would gain 4 %, and a VAE would lose 8 %.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.packed import PackedConvolution
from minidiff.fast.switch import OFF, ON, MethodSwitch
from minidiff.models.replacement import PREPARING, Replacement

NARROWEST = 128  # channels: with fewer, the transforms cost more than is saved
SMALLEST = 256 * 128  # pairs of channels
POSITIONS = 32 * 32  # pixels of the picture: with fewer, a packed convolution needs less memory and is nearly as fast
TILES = 512  # at a time: their 16 numbers for some hundred channels stay in the cache


class WinogradConvolution(Replacement):
    """Replacement for the ``forward`` of one convolution; small pictures go to the original."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.filters: Tensor | None = None
        super().__init__(layer, name)

    def forget(self) -> None:
        self.filters = None
        super().forget()

    def prepared(self) -> Tensor:
        """Return the transformed filters, computed at the first call."""
        with PREPARING:
            if self.filters is None:
                weight = self.layer.get_parameter("weight").detach()
                self.filters = filters(weight.to_dense() if weight.is_mkldnn else weight)  # packed for a small picture
            return self.filters

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height * width < POSITIONS:
            out: Tensor = self.inner(x)
            return out
        assert isinstance(self.layer, nn.Conv2d)
        made_of_weight = self.filters
        if made_of_weight is None:
            made_of_weight = self.prepared()
        rows, columns = -(-height // 2), -(-width // 2)  # of tiles
        whole = x.new_empty(len(x), self.layer.out_channels, 2 * rows, 2 * columns)
        at_once = max(1, TILES // columns)
        for picture, made in zip(x, whole, strict=True):
            for top in range(0, rows, at_once):
                band(made_of_weight, self.layer.bias, picture, made, top, min(at_once, rows - top))
        return whole if whole.shape[2:] == x.shape[2:] else whole[:, :, :height, :width].contiguous()


class Winograd(MethodSwitch):
    """Switch of 3 x 3 convolutions with many channels, used on large pictures. CPU and float32."""

    replacement = WinogradConvolution
    device = "cpu"
    tried = "winograd"

    def applies(self, layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (3, 3)
            and layer.stride == layer.dilation == layer.padding == (1, 1)
            and layer.padding_mode == "zeros"
            and layer.groups == 1
            and min(layer.in_channels, layer.out_channels) >= NARROWEST
            and layer.in_channels * layer.out_channels >= SMALLEST
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == torch.float32
        )


def ways(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Set up a trial: a convolution of 320 channels at 32 x 32, packed and by Winograd's method. With AVX512 there is
    none: what it may save is not worth its memory."""
    found: dict[str, Callable[[], object]] = {OFF: lambda: None}
    if dtype != torch.float32 or onednn.pays() or not onednn.available():
        return found
    layers = (nn.Conv2d(320, 320, 3, padding=1, device="meta", dtype=dtype) for _ in range(2))
    packed, other = map(onednn.of_ones, layers)
    x = torch.ones(1, 320, 32, 32, device="cpu", dtype=dtype)
    PackedConvolution(packed)
    WinogradConvolution(other)
    return {OFF: lambda: packed(x), ON: lambda: other(x)}


def filters(weight: Tensor) -> Tensor:
    """Transform filters, (out, in, 3, 3) -> (16, out, in): four points along the rows, times four along the columns."""
    points = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
    return torch.einsum("ik,ockl,jl->ijoc", points, weight.double(), points).float().flatten(0, 1).contiguous()


def band(u: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, top: int, count: int) -> None:
    """Compute ``count`` rows of tiles from ``top`` on: ``x`` (in, H, W) into ``out`` (out, H, W), padded to even."""
    channels, height, width = x.shape
    columns = out.shape[2] // 2
    # The rows that these tiles read, with a border of zeros, split into even columns (0) and odd ones (1).
    seen = x.new_zeros(2, channels, 2 * count + 2, columns + 1)
    first, last = max(2 * top - 1, 0), min(2 * (top + count) + 1, height)
    inner = seen[:, :, first - 2 * top + 1 : last - 2 * top + 1]
    inner[0, ..., 1 : 1 + width // 2] = x[:, first:last, 1::2]
    inner[1, ..., : -(-width // 2)] = x[:, first:last, 0::2]

    along = x.new_empty(4, 2, channels, count, columns + 1)
    d0, d1, d2, d3 = seen[:, :, 0:-2:2], seen[:, :, 1:-2:2], seen[:, :, 2::2], seen[:, :, 3::2]
    combine(d0, d1, d2, d3, along.unbind(0))
    v = x.new_empty(4, 4, channels, count, columns)
    even, odd = along[:, 0], along[:, 1]
    combine(even[..., :-1], odd[..., :-1], even[..., 1:], odd[..., 1:], v.unbind(1))

    m = torch.bmm(u, v.view(16, channels, -1)).view(4, 4, -1, count, columns)
    if bias is not None:
        m[1, 1] += bias[:, None, None]  # m1 is in every output once
    squares = out[:, 2 * top : 2 * (top + count)].view(-1, count, 2, columns, 2)
    for i, row in enumerate(outputs(*m.unbind(0))):
        for j, made in enumerate(outputs(*row.unbind(0))):
            squares[:, :, i, :, j] = made


def combine(d0: Tensor, d1: Tensor, d2: Tensor, d3: Tensor, into: tuple[Tensor, ...]) -> None:
    """Combine inputs to the factors of the filter's points in the four products."""
    torch.sub(d0, d2, out=into[0])
    torch.add(d1, d2, out=into[1])
    torch.sub(d2, d1, out=into[2])
    torch.sub(d1, d3, out=into[3])


def outputs(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two outputs from four products."""
    return (m1 + m2).add_(m0), (m1 - m2).sub_(m3)
