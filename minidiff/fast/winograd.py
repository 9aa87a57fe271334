"""3 x 3 convolutions with four ninths of the multiplications (Winograd 1980; Lavin & Gray 2016, F(2 x 2, 3 x 3)).

Two neighbouring outputs of a filter with three taps, (d0 g0 + d1 g1 + d2 g2, d1 g0 + d2 g1 + d3 g2), take six products
as written, and four if the inputs are combined first:

    m0 = (d0 - d2) g0                    m1 = (d1 + d2) (g0 + g1 + g2) / 2
    m3 = (d1 - d3) g2                    m2 = (d2 - d1) (g0 - g1 + g2) / 2

    outputs: m0 + m1 + m2,  m1 - m2 - m3

In two dimensions, tiles of 4 x 4 inputs, overlapping by two, become 16 numbers, and 2 x 2 outputs take 16 products
instead of 36. The transform of the filters is computed once. Over many channels the products are 16 matrix products,
which run at the processor's limit, and each sum has a ninth of the terms, so the result is closer to the exact one than
that of a packed convolution. All other work is sums of neighbouring pixels, which are read and written as rows of
channels if these are innermost in memory; so the result has the channels-last layout. Norms and convolutions keep it.

The price is memory, 16 numbers for every nine weights, so this is used only for layers with a large picture. Where a
convolution takes more time to fetch than to multiply, nothing is gained; :mod:`trial` finds out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import onednn
from minidiff.fast.packed import PackedConvolution
from minidiff.fast.switch import OFF, ON, MethodSwitch
from minidiff.models.replacement import PREPARING, Replacement

NARROWEST = 128  # channels: with fewer, the transforms cost more than is saved
SMALLEST = 256 * 128  # pairs of channels
POSITIONS = 32 * 32  # pixels of the picture: with fewer, what is saved is not worth the memory
NEARER = 4  # times as many with AVX512, where a packed convolution is nearer to the limit
CHANNELS = 64  # whose filters are transformed at a time, in float64
TILES = 512  # at a time: their 16 numbers for some hundred channels stay in the cache


class WinogradConvolution(Replacement):
    """Replacement for the ``forward`` of one convolution; small pictures go to the original."""

    def __init__(self, layer: nn.Module, name: str = "forward") -> None:
        self.filters: list[Tensor] | None = None
        self.least = POSITIONS * (NEARER if onednn.pays() else 1)
        super().__init__(layer, name)

    def forget(self) -> None:
        self.filters = None
        super().forget()

    def prepared(self) -> list[Tensor]:
        """Return the transformed filters, computed at the first call."""
        with PREPARING:
            if self.filters is None:
                weight = self.layer.get_parameter("weight").detach()
                self.filters = filters(weight.to_dense() if weight.is_mkldnn else weight)  # packed for a small picture
            return self.filters

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if height * width < self.least:
            out: Tensor = self.inner(x)
            return out
        assert isinstance(self.layer, nn.Conv2d)
        made_of_weight = self.filters
        if made_of_weight is None:
            made_of_weight = self.prepared()
        rows, columns = -(-height // 2), -(-width // 2)  # of tiles
        whole = x.new_empty(len(x), 2 * rows, 2 * columns, self.layer.out_channels)
        room = Room(x, min(rows, max(1, TILES // columns)), columns)
        for picture, made in zip(x.permute(0, 2, 3, 1), whole, strict=True):
            for top in range(0, rows, room.rows):
                band(made_of_weight, self.layer.bias, picture, made, top, room)
        return whole[:, :height, :width].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


class Room:
    """Memory for ``rows`` rows of tiles of a picture like those of ``x``, used for one after another: the inputs with
    a border, combined along the columns, and along the rows as well."""

    def __init__(self, x: Tensor, rows: int, columns: int) -> None:
        channels = x.shape[1]
        self.rows = rows
        self.seen = x.new_zeros(2 * rows + 2, 2 * columns + 2, channels)
        self.along = x.new_empty(4, rows, 2 * columns + 2, channels)
        self.factors = x.new_empty(4, 4, rows, columns, channels)


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
    """Set up a trial: a convolution of 320 channels at 64 x 64, packed and by Winograd's method."""
    found: dict[str, Callable[[], object]] = {OFF: lambda: None}
    if dtype != torch.float32 or not onednn.available():
        return found
    layers = (nn.Conv2d(320, 320, 3, padding=1, device="meta", dtype=dtype) for _ in range(2))
    packed, other = map(onednn.of_ones, layers)
    x = torch.ones(1, 320, 64, 64, device="cpu", dtype=dtype).contiguous(memory_format=torch.channels_last)
    PackedConvolution(packed)
    WinogradConvolution(other)
    return {OFF: lambda: packed(x), ON: lambda: other(x)}


def filters(weight: Tensor) -> list[Tensor]:
    """Transform filters (out, in, 3, 3) to 16 matrices (out, in), four along the rows times four along the columns,
    packed where oneDNN multiplies them."""
    points = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]).double()
    made = weight.new_empty(16, *weight.shape[:2])
    for some, into in zip(torch.split(weight, CHANNELS), torch.split(made, CHANNELS, dim=1), strict=True):
        into.copy_(torch.einsum("ik,ockl,jl->ijoc", points, some.double(), points).flatten(0, 1))
    if not onednn.available():
        return list(made)
    return [torch.ops.mkldnn._reorder_linear_weight(matrix, TILES) for matrix in made]


def band(u: list[Tensor], bias: Tensor | None, x: Tensor, out: Tensor, top: int, room: Room) -> None:
    """Compute the rows of tiles from ``top`` on that ``room`` is for: ``x`` (H, W, in) into ``out`` (H, W, out), padded
    to even."""
    height, width, _ = x.shape
    columns = out.shape[1] // 2
    count = min(room.rows, out.shape[0] // 2 - top)
    # The rows that these tiles read, with a border of zeros.
    first, last = max(2 * top - 1, 0), min(2 * (top + count) + 1, height)
    above = first - (2 * top - 1)
    room.seen[:above] = 0
    room.seen[above : above + last - first, 1 : 1 + width] = x[first:last]
    room.seen[above + last - first :] = 0

    along, v = room.along[:, :count], room.factors[:, :, :count]
    combine([room.seen[i : i + 2 * count : 2] for i in range(4)], along)
    combine([along[:, :, j : j + 2 * columns : 2] for j in range(4)], v.transpose(0, 1))

    product = onednn.product if u[0].is_mkldnn else F.linear
    m = [
        # m1 is in every output once, and so is its bias
        product(factor, matrix, bias if point == 5 else None)
        for point, (factor, matrix) in enumerate(zip(v.flatten(0, 1), u, strict=True))
    ]
    halves = [outputs(*m[j::4]) for j in range(4)]
    squares = out[2 * top : 2 * (top + count)].view(count, 2, columns, 2, -1)
    for i, row in enumerate(zip(*halves, strict=True)):
        for j, made in enumerate(outputs(*row)):
            squares[:, i, :, j] = made


def combine(d: list[Tensor], into: Tensor) -> None:
    """Combine four inputs to the factors of the filter's points in the four products."""
    d0, d1, d2, d3 = d
    torch.sub(d0, d2, out=into[0])
    torch.add(d1, d2, out=into[1])
    torch.sub(d2, d1, out=into[2])
    torch.sub(d1, d3, out=into[3])


def outputs(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two outputs from four products. ``m1`` is overwritten."""
    first = (m1 + m2).add_(m0)
    return first, m1.sub_(m2).sub_(m3)
