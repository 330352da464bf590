// Reading the latent cache, a few elements of a row at a time.

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
vec4 four_values(uint64_t row, uint at, uint n, bool together) {
    if (!together) {
        vec4 four;
        [[unroll]] for (uint i = 0; i < 4; i++) {
            four[i] = value(row, min(at + i, n - 1));
        }
        return four;
    }
    at = min(at, n - 4);
#if FORMAT == F32
    Longs from = Longs(row + 4 * uint64_t(at));
    return uintBitsToFloat(uvec4(unpackUint2x32(from.at[0]), unpackUint2x32(from.at[1])));
#elif FORMAT == F16
    const uvec2 bits = unpackUint2x32(Longs(row + 2 * uint64_t(at)).at[0]);
    return vec4(
        from_halves(bits.x), from_halves(bits.y)
    );
#else
    const uint64_t block = row + 34 * uint64_t(at / 32);
    const float d = from_half(half_word(block, 0));
    const int low = int(half_word(block, 1 + at % 32 / 2)), high = int(half_word(block, 2 + at % 32 / 2));
    return d * vec4(ivec4(
        bitfieldExtract(low, 0, 8), bitfieldExtract(low, 8, 8), bitfieldExtract(high, 0, 8), bitfieldExtract(high, 8, 8)
    ));
#endif
}
