"""Recognition of sRGB among the ICC colour profiles that pictures carry (ICC.1:2022, sections 7, 9 and 10).

A profile of a screen or camera is a matrix, whose columns are the colours of pure red, green and blue, and a curve that
gives the light of each value. sRGB is told by these numbers, not by its name, which differs from program to program.
"""

from __future__ import annotations

import struct

# X, Y, Z of pure red, green and blue in sRGB, relative to the white of profiles (D50), and the light of a half.
SRGB = {b"rXYZ": (0.4361, 0.2225, 0.0139), b"gXYZ": (0.3851, 0.7169, 0.0971), b"bXYZ": (0.1431, 0.0606, 0.7141)}
HALF = 0.214
NEAR = 0.01  # of both: for rounded numbers, and for 2.2 as the exponent; Display P3 and Adobe RGB are 0.07 away
CURVES = {b"RGB ": (b"rTRC", b"gTRC", b"bTRC"), b"GRAY": (b"kTRC",)}
LENGTHS = (1, 3, 4, 5, 7)  # parameters of the five kinds of formulas


def is_srgb(profile: bytes) -> bool:
    """Return True if values mean under ``profile`` what they mean in sRGB.

    A profile of grey pictures has only the curve. False for profiles of other colour spaces, for those that consist of
    tables of colours, and for damaged ones.
    """
    try:
        (count,) = struct.unpack_from(">I", profile, 128)
        table = struct.iter_unpack(">4sII", profile[132 : 132 + 12 * count])
        tags = {name: profile[start : start + size] for name, start, size in table}
        space = profile[16:20]
        pairs = [(_light_of_half(tags[name]), HALF) for name in CURVES[space]]
        for name, wanted in SRGB.items() if space == b"RGB " else ():
            pairs += zip((n / 2**16 for n in struct.unpack_from(">3i", tags[name], 8)), wanted, strict=True)
    except (struct.error, LookupError, ArithmeticError):
        return False
    return all(abs(found - wanted) < NEAR for found, wanted in pairs)


def _light_of_half(curve: bytes) -> float:
    """Return the light, from 0 to 1, of a value half of the largest."""
    if curve[:4] == b"curv":  # a table; with one entry an exponent, with none the identity
        (count,) = struct.unpack_from(">I", curve, 8)
        entries = struct.unpack_from(f">{count}H", curve, 12)
        if count < 2:
            return float(0.5 ** (entries[0] / 256 if entries else 1))
        return float(entries[(count - 1) // 2] + entries[count // 2]) / 2 / 65535
    (kind,) = struct.unpack_from(">H", curve, 8)  # (a value + b)^g + e, above a limit that lies far below a half
    given = [n / 2**16 for n in struct.unpack_from(f">{LENGTHS[kind]}i", curve, 12)]
    g, a, b = (*given, 1.0, 0.0) if kind == 0 else given[:3]
    beyond = {2: 3, 4: 5}.get(kind)
    return float(max(0.0, a / 2 + b) ** g) + (0.0 if beyond is None else given[beyond])
