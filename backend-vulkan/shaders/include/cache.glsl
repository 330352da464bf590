// Reading the latent cache, a few elements of a row at a time, which starts `row` bytes after `base` (see loads.glsl).

uint byte_at(uint64_t address, uint index) {
    return (half_word(address, index / 2) >> (8 * (index % 2))) & 0xffu;
}

// Element `at` of the cached row at `row`.
float value(uint64_t row, uint at) {
#if FORMAT == F32
    return Floats(row).at[at];
#elif FORMAT == F16
    return from_half(uint(Halves(row).at[at]));
#else
    const uint64_t block = row + 34 * uint64_t(at / 32);
    const int level = bitfieldExtract(int(byte_at(block + 2, at % 32)), 0, 8);
    return from_half(half_word(block, 0)) * float(level);
#endif
}

// Elements `at` to `at + 3` of the first `n`; past the last ones, those again. Together, if `at` and `n` are multiples of
// four, and rows of floats start at multiples of eight bytes.
vec4 four_values(uint64_t base, uint row, uint at, uint n, bool together) {
    if (!together) {
        vec4 four;
        [[unroll]] for (uint i = 0; i < 4; i++) {
            four[i] = value(base + row, min(at + i, n - 1));
        }
        return four;
    }
    at = min(at, n - 4);
#if FORMAT == F32
    const uint first = row / 8 + at / 2;
    return uintBitsToFloat(uvec4(unpackUint2x32(Longs(base).at[first]), unpackUint2x32(Longs(base).at[first + 1])));
#elif FORMAT == F16
    const uvec2 bits = unpackUint2x32(Longs(base).at[row / 8 + at / 4]);
    return vec4(from_halves(bits.x), from_halves(bits.y));
#else
    const uint block = row / 2 + 17 * (at / 32), levels = block + 1 + at % 32 / 2;
    const float d = from_half(half_word(base, block));
    const int low = int(half_word(base, levels)), high = int(half_word(base, levels + 1));
    return d * vec4(ivec4(
        bitfieldExtract(low, 0, 8), bitfieldExtract(low, 8, 8), bitfieldExtract(high, 0, 8), bitfieldExtract(high, 8, 8)
    ));
#endif
}
