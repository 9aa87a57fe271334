"""Tolerances: every bound that a test may use, each with a name and a cause.

``EXACT`` is the default: the same bits. A looser bound is only for a place where the arithmetic itself differs
(another order of summation, another precision), and its line here says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """``|a - b| <= absolute + relative * |b|`` for every entry; both 0 means equal bits (NaN equals nothing)."""

    absolute: float
    relative: float
    cause: str


EXACT = Tolerance(0.0, 0.0, "the same operations in the same order")
BATCH = Tolerance(1e-4, 1e-5, "the kernels that a batch size picks sum in another order")
HALF_BATCH = Tolerance(5e-5, 0.0, "one half of a guided batch alone: the kernels that it picks sum in another order")
SIDE_BY_SIDE = Tolerance(
    1e-4, 0.0, "of the largest value: a whole run whose calls are in larger batches, by a random model, which amplifies"
)
REMIXED = Tolerance(
    0.0, 1e-4, "of the largest value: x0 mixed from two estimates in float32, not from the guided output"
)
EIGHT_BITS = Tolerance(0.003, 0.0, "a map in 255 levels of its largest value, at most 1: half a level is 0.002")
FITTED = Tolerance(1e-3, 0.0, "37 unknowns of a linear map by least squares in float32")
PARTWISE = Tolerance(1e-5, 1e-4, "gradients of a layer that is computed in parts are summed in another order")
SMALL_SIGNAL = Tolerance(1e-4, 1e-5, "x0 in float32 where alpha_bar is near 0: a small difference times up to 15")
FLOAT16_CUDA = Tolerance(
    0.05,
    0.0,
    "float16 keeps 11 bits: on outputs divided by their standard deviation, against float32 on the CPU; tiny models in "
    "float16 on the CPU are within 0.025, a card sums in another order; a timestep that is off by 20 is 0.4 away",
)
BFLOAT16_CUDA = Tolerance(
    0.3, 0.0, "bfloat16 keeps 8 bits, an eighth of float16's precision; measured likewise, within 0.15 on the CPU"
)
FUSED = Tolerance(1e-5, 1e-5, "an adapter's product and its sum with the weight in float32, against float64")
LIVE = Tolerance(
    1e-4, 1e-5, "a layer's output and an adapter's beside it in float32, against float64: tens of products"
)
SNR = Tolerance(0.0, 1e-5, "the reference takes two roots and squares their quotient")
RECORDED = Tolerance(
    0.0, 1e-4, "a run that was recorded on another processor, whose kernels sum in another order; of a stage's largest"
)
PORTED = Tolerance(
    0.0,
    5e-6,
    "float32 layers by another program on the same inputs, against diffusers, of a stage's largest: its kernels sum in "
    "another order. Measured: blocks in C++ 2.3e-7, in tinygrad 4.8e-7 and in MLX 4.8e-7, a tiny UNet by OpenVINO "
    "1.4e-6 and by ONNX Runtime 1.7e-6",
)
PORTED_LAYER = Tolerance(
    0.0,
    2e-6,
    "the same, each layer on the golden's values, so that differences do not add up: 5.7e-7 was measured in JAX. The "
    "smallest mistake that it has to show, another eps in a group norm, is 5.7e-6",
)
PORTED_RUN = Tolerance(
    0.0,
    1.5e-5,
    "of a stage's largest: a whole run by another program. The first prediction is within 8e-7, and guidance at 7.5 "
    "multiplies one half of it by 7.5 and the other by 6.5: 6.4e-6 was measured in JAX, 7.8e-6 in k-diffusion",
)
PIXELS_ELSEWHERE = Tolerance(
    1.0,
    0.0,
    "of 255, a picture made on another processor, whose kernels sum in another order: a value near a half rounds the "
    "other way; measured with the instructions and libraries limited to AVX2, SSE4.1 and AVX2 in MKL alone",
)
WEIGHTS_SUM = Tolerance(1e-5, 1e-4, "float32 weights of alternating sign, added up")
EXPANSION = Tolerance(1e-4, 0.0, "a difference of nearly equal float32 exponentials, against its value in float64")
K_DIFFUSION = Tolerance(
    2e-5,
    0.0,
    "float32 against k-diffusion in float64, 20 steps on samples of up to 50, whose neighbours are 4e-6 apart",
)
DIALECT = Tolerance(
    1e-4,
    1e-5,
    "text encodings of up to 60 that were recorded on another processor, whose kernels sum in another order; equal to "
    "the bit where they were recorded",
)
K_DIFFUSION_PROFILE = Tolerance(
    5e-5,
    0.0,
    "the same, and the recording was made between ends of seven digits, where the profile has the table's own",
)

WINOGRAD = Tolerance(
    1e-5,
    0.0,
    "16 sums over the channels, combined, where the plain float32 convolution has one sum of nine times as many "
    "products; outputs go up to 4. Winograd's is up to 0.9e-6 of the norm away from float64, the plain one up to 2e-6",
)
WINOGRAD_TRUTH = Tolerance(
    0.0,
    6e-7,
    "of the norm, from float64: 0.44e-6 was measured with MKL's products, which add up in pieces; packed convolutions "
    "were 1.1e-6 with AVX512 and 1.9e-6 with AVX2",
)
WINOGRAD_ONEDNN = Tolerance(
    0.0,
    1.1e-6,
    "of the norm, from float64: 0.90e-6 was measured for 1280 channels with oneDNN's products, which add up in one go, "
    "as in packed convolutions, which were 1.1e-6 with AVX512 and 1.9e-6 with AVX2",
)

PACKED = Tolerance(
    2e-5,
    0.0,
    "a float32 convolution of packed weights sums up to 11,520 products in another order; outputs go up to 3. Plain "
    "and packed are equally far from float64 with AVX2, 1.8e-6 of the norm at that width, and 2.3e-6 from each other",
)
# Times the plain result's distance from float64, where both are roundings of the same size: two orders of summation
# differ by chance, by up to 3 % at these widths.
NO_FARTHER = 1.05
# Times the error of plain bfloat16 at the output of a trained UNet, with attention scores in bfloat16: 1.00 was
# measured, and each is the sum of many roundings.
NARROW_SCORES = 1.1
# Times the error of a plain layer in bfloat16, for attention with the logistic function: queries are rounded once more,
# when they are scaled, and so are the sums of weights. 1.3 was measured.
LOGISTIC = 1.5
# Of the norm, at any score that the kernel takes: in float32, scores up to 125 have themselves errors of 1e-5; in
# bfloat16, weights, sums and scaled queries have 8 bits, and 0.6e-2 was measured with scores up to 35.
LOGISTIC_EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
PACKED_TRUTH = Tolerance(
    0.0,
    2.5e-6,
    "of the norm, from float64: 1.8e-6 was measured with AVX2, 1.2e-6 with AVX512, where the plain kernel adds up in "
    "pieces and is 0.24e-6 away; a sum of 11,520 products in one go cannot do better",
)
BLENDED = Tolerance(1e-6, 0.0, "equal pixels of overlapping tiles, weighted, added, and divided by the weights' sum")
TILED = Tolerance(
    0.2,
    0.0,
    "a tile's group norms and attention see the tile alone; the standard deviation of the error, of the picture's, on "
    "noise and random weights: 0.145 for a VAE of 8 to 16 channels, 0.089 for one of 32 to 64",
)

BLOCKS = Tolerance(
    0.0,
    2e-6,
    "of the norm: attention in blocks of queries, and products by oneDNN, sum in another order than torch does; "
    "measured up to 1.1e-6 where scores go up to 12. Both are equally far from float64",
)
COMPILED = Tolerance(
    1e-5,
    0.0,
    "inductor fuses operations and sums in another order; a tiny UNet's outputs (std 0.5) differ by up to 2e-6",
)

PROGRAM_FLOAT32 = Tolerance(1e-6, 3e-6, "a program's float32, copied, against the same in float64")
PERFECT = Tolerance(1e-5, 1e-5, "a program's formula for a perfect model's step against ours, which divides elsewhere")
ONCE = Tolerance(0.0, 6e-8, "float64 rounded once to float32: half of its last place, 2 ** -24")
ELSEWHERE = Tolerance(
    0.0,
    5e-5,
    "of the largest value: float32 kernels of another compiler through a run of a few steps; 3e-6 was measured",
)
LINEAR = Tolerance(
    0.0,
    1e-5,
    "of the largest value: a sampler in float32, some of whose steps are differences, against its weights in float64; "
    "measured up to 4.4e-6",
)
LOG_SIGMA = Tolerance(0.0, 3e-6, "log sigma interpolated and its exponential taken in float32, against float64")
NOISE_TABLES = Tolerance(0.0, 3e-5, "sigma of an alpha_bar rounded to float32: near 1, little of 1 - alpha_bar is left")
SIGMA_POWERS = Tolerance(0.0, 1e-5, "seventh powers and exponentials between ends that are rounded to float32")
TOLD_TIMESTEP = Tolerance(
    2e-2, 0.0, "a timestep read back from a float32 sigma, where log sigma changes slowly with it"
)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: Tolerance = EXACT, where: str = "") -> None:
    """Fail, saying how far apart the two are, unless ``ours`` is within ``tolerance`` of ``theirs``."""
    assert ours.shape == theirs.shape, f"{where}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{where}: dtypes {ours.dtype} and {theirs.dtype}"
    if tolerance is EXACT:
        same = torch.equal(ours, theirs)
    else:
        same = bool(((ours - theirs).abs() <= tolerance.absolute + tolerance.relative * theirs.abs()).all())
    if not same:
        gap = (ours.double() - theirs.double()).abs()
        differ = int((ours != theirs).sum())
        raise AssertionError(f"{where}: {differ} of {ours.numel()} entries differ, by up to {gap.max().item():.3g}")
