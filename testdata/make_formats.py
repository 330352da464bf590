#!/usr/bin/env python3
"""Writes the golden files of the storage formats: testdata/formats/.

    pip install gguf numpy
    python3 testdata/make_formats.py

For each weight format NAME

    NAME.blocks   random blocks, as they lie in a GGUF file
    NAME.values   the same, dequantized by the `gguf` package: f32, little-endian

and types.tsv: id, name, values in a block and bytes of a block of every tensor type that the package knows.

The fields of the blocks are random bits, so that every bit counts. The f16 scales are drawn from the magnitudes
that occur in models, some negative; the first blocks have the extremes: zero, negative zero, the smallest
denormal, the largest denormal, the smallest normal, and a large one. Infinite and NaN scales are left out: no
encoder writes them, and the sign of a NaN that comes of them is up to the processor.

The package's constants and dequantizers are the definition here; the test that reads these files is
backend-api/tests/formats.rs.
"""

from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize

# Offsets of the f16 fields in a block.
HALVES = {
    Type.F32: (),
    Type.F16: (),
    Type.BF16: (),
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q8_0: (0,),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}

# 0, -0, smallest and largest denormal, smallest normal, -1, 1000.
EXTREMES = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0xBC00, 0x63D0], dtype=np.uint16)

# Values in the golden file of each format, about.
VALUES = 2560


def blocks_of(kind: Type, random: np.random.Generator) -> np.ndarray:
    length, size = GGML_QUANT_SIZES[kind]
    count = VALUES // length
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        magnitude = np.exp(random.uniform(np.log(1e-5), np.log(0.5), count))
        scales = (magnitude * random.choice([1, 1, -1], count)).astype(np.float16).view(np.uint16)
        # Each field meets every extreme, not always together with the same one of the other field.
        extremes = np.roll(EXTREMES, offset // 2)
        scales[: len(extremes)] = extremes
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


def floats_of(kind: Type, random: np.random.Generator) -> np.ndarray:
    """Finite numbers as random bits, so of every magnitude."""
    word, exponent = {
        Type.F32: (np.uint32, 0xFF << 23),
        Type.F16: (np.uint16, 0x1F << 10),
        Type.BF16: (np.uint16, 0xFF << 7),
    }[kind]
    bits = random.integers(0, np.iinfo(word).max, VALUES // 4, dtype=word, endpoint=True)
    finite = bits[bits & word(exponent) != exponent]
    return np.concatenate([EXTREMES, finite]) if kind == Type.F16 else finite


def main() -> None:
    folder = Path(__file__).parent / "formats"
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(2026)
    for kind in HALVES:
        floats = kind in (Type.F32, Type.F16, Type.BF16)
        rows = floats_of(kind, random) if floats else blocks_of(kind, random)
        rows = rows.view(np.uint8).reshape(1, -1)
        values = dequantize(rows, kind).astype("<f4")
        assert np.isfinite(values).all(), kind
        rows.tofile(folder / f"{kind.name}.blocks")
        values.tofile(folder / f"{kind.name}.values")

    with open(folder / "types.tsv", "w") as table:
        for kind, (length, size) in GGML_QUANT_SIZES.items():
            table.write(f"{kind.value}\t{kind.name}\t{length}\t{size}\n")


if __name__ == "__main__":
    main()
