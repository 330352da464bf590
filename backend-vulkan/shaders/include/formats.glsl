// Decoding weights. The format is chosen by FORMAT, a number of those below.
//
// The unit of work is 32 values of a row: two runs of 16 neighbours, the second RUN_DISTANCE values after the first, so
// that both halves of the same bytes are used. A unit's values are `scale * level + offset`, with one scale and offset
// for each run.

#define F32 0
#define F16 1
#define BF16 2
#define Q4_0 3
#define Q4_1 4
#define Q5_0 5
#define Q5_1 6
#define Q8_0 7
#define Q2_K 8
#define Q3_K 9
#define Q4_K 10
#define Q5_K 11
#define Q6_K 12
#define IQ4_NL 13
#define IQ4_XS 14

#if FORMAT <= BF16
#define PLAIN 1
#else
#define PLAIN 0
#endif

// Whether offsets are ever other than zero.
#if FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q3_K \
    || FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K
#define HAS_OFFSET 1
#else
#define HAS_OFFSET 0
#endif

#if FORMAT == Q2_K || FORMAT == Q3_K || FORMAT == Q4_K || FORMAT == Q5_K
#define RUN_DISTANCE 32
#elif FORMAT == Q6_K
#define RUN_DISTANCE 64
#else
#define RUN_DISTANCE 16
#endif

struct Unit {
    float level[32];
    // The first run's scale and offset, then the second's.
    vec2 first;
    vec2 second;
};

// Where in its row a unit's first run starts.
uint unit_start(uint unit) {
    const uint per_pair = RUN_DISTANCE / 16;
    return (unit / per_pair) * (2 * RUN_DISTANCE) + (unit % per_pair) * 16;
}

// Whether weights are loaded eight bytes at a time, from addresses that are multiples of eight. Where shaders run on the
// CPU a load costs the same whatever its width. The caller has seen to it that rows of plain formats, and those of blocks
// that are multiples of eight bytes long, start at such addresses, and that rows of 16-bit formats are multiples of four
// values long.
layout(constant_id = 10) const uint WIDE = 0;

const bool WIDE_LOADS = WIDE != 0;

// Eight bytes from an address that is a multiple of 2, and 16.
uvec2 load_8(uint64_t address) {
    if (!WIDE_LOADS) {
        Halves from = Halves(address);
        return uvec2(
            uint(from.at[0]) | (uint(from.at[1]) << 16), uint(from.at[2]) | (uint(from.at[3]) << 16)
        );
    }
    // From the aligned ones around them; never from one that has none of the bytes.
    const uint shift = 8 * (uint(address) & 7u);
    const uint64_t low = Longs(address & ~uint64_t(7)).at[0];
    const uint64_t high = Longs((address + 7) & ~uint64_t(7)).at[0];
    return unpackUint2x32((low >> shift) | ((high << 1) << (63 - shift)));
}

uvec4 load_16(uint64_t address) {
    if (!WIDE_LOADS) {
        return uvec4(load_8(address), load_8(address + 8));
    }
    const uint shift = 8 * (uint(address) & 7u);
    const uint64_t aligned = address & ~uint64_t(7);
    const uint64_t low = Longs(aligned).at[0], middle = Longs(aligned).at[1];
    const uint64_t high = Longs((address + 15) & ~uint64_t(7)).at[0];
    return uvec4(
        unpackUint2x32((low >> shift) | ((middle << 1) << (63 - shift))),
        unpackUint2x32((middle >> shift) | ((high << 1) << (63 - shift)))
    );
}

// 16 bytes from an address that is a multiple of 4, of 8 where loads are wide.
uvec4 load_16_aligned(uint64_t address) {
    if (WIDE_LOADS) {
        Longs from = Longs(address);
        return uvec4(unpackUint2x32(from.at[0]), unpackUint2x32(from.at[1]));
    }
    Words from = Words(address);
    return uvec4(from.at[0], from.at[1], from.at[2], from.at[3]);
}

// 16 bytes of a block that is a multiple of four bytes long, but not of eight.
uvec4 load_16_words(uint64_t address) {
    if (WIDE_LOADS) {
        return load_16(address);
    }
    return load_16_aligned(address);
}

uint half_word(uint64_t address, uint index) {
    return uint(Halves(address).at[index]);
}

uint byte_at(uint64_t address, uint index) {
    return (half_word(address, index / 2) >> (8 * (index % 2))) & 0xffu;
}

uint byte_of(uvec4 words, uint index) {
    const uint word = index < 8 ? (index < 4 ? words.x : words.y) : (index < 12 ? words.z : words.w);
    return (word >> (8 * (index & 3u))) & 0xffu;
}

uint bits_of(uvec4 words, uint i, uint shift, uint mask) {
    return (words[i / 4] >> (8 * (i % 4) + shift)) & mask;
}

#if FORMAT == IQ4_NL || FORMAT == IQ4_XS
// The table of 16 values, four to a word: -127, -104, -83, -65 | -49, -35, -22, -10 | 1, 13, 25, 38 | 53, 69, 89, 113.
float iq4_value(uint index) {
    const uint word = index < 8 ? (index < 4 ? 0xbfad9881u : 0xf6eaddcfu) : (index < 12 ? 0x26190d01u : 0x71594535u);
    return float(bitfieldExtract(int(word), int(8 * (index & 3u)), 8));
}
#endif

#if FORMAT == Q4_K || FORMAT == Q5_K
// The 6-bit scale and minimum of group `g`, of a block's first 16 bytes.
vec2 k_scale_min(uvec4 head, uint g) {
    uint scale, minimum;
    if (g < 4) {
        scale = byte_of(head, 4 + g) & 63u;
        minimum = byte_of(head, 8 + g) & 63u;
    } else {
        const uint low = byte_of(head, 8 + g);
        scale = (low & 15u) | ((byte_of(head, g) >> 6) << 4);
        minimum = (low >> 4) | ((byte_of(head, 4 + g) >> 6) << 4);
    }
    return vec2(float(scale), float(minimum));
}
#endif

#if FORMAT == Q4_K
// One of the units that share the scales and minima of a block's groups `2 * chunk` and the next.
Unit unit_of(uvec4 words, vec2 first, vec2 second) {
    Unit u;
    u.first = first;
    u.second = second;
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = float(bits_of(words, i, 0, 15u));
        u.level[16 + i] = float(bits_of(words, i, 4, 15u));
    }
    return u;
}
#elif FORMAT == Q6_K
// One of the four units of half a block, with the 8-bit scales of its runs.
Unit unit_of(uvec4 words, uvec4 high, uint shift, uvec2 scales, float d) {
    Unit u;
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = float(bits_of(words, i, 0, 15u) | (bits_of(high, i, shift, 3u) << 4));
        u.level[16 + i] = float(bits_of(words, i, 4, 15u) | (bits_of(high, i, shift + 4, 3u) << 4));
    }
    const float one = d * float(bitfieldExtract(int(scales.x), 0, 8));
    const float two = d * float(bitfieldExtract(int(scales.y), 0, 8));
    u.first = vec2(one, -32.0 * one);
    u.second = vec2(two, -32.0 * two);
    return u;
}
#endif

// Unit `unit` of the row of `k` values at `row`.
Unit load_unit(uint64_t row, uint unit, uint k) {
    Unit u;
    u.first = vec2(1.0, 0.0);
    u.second = vec2(1.0, 0.0);
#if FORMAT == F32
    if (WIDE_LOADS) {
        Longs from = Longs(row + uint64_t(unit) * 128);
        [[unroll]] for (uint i = 0; i < 16; i++) {
            uint64_t pair = 0;
            if (32 * unit + 2 * i < k) {
                pair = from.at[i];
            }
            const uvec2 bits = unpackUint2x32(pair);
            u.level[2 * i] = uintBitsToFloat(bits.x);
            u.level[2 * i + 1] = uintBitsToFloat(bits.y);
        }
    } else {
        Floats from = Floats(row + uint64_t(unit) * 128);
        [[unroll]] for (uint i = 0; i < 32; i++) {
            u.level[i] = 0.0;
            if (32 * unit + i < k) {
                u.level[i] = from.at[i];
            }
        }
    }
#elif FORMAT == F16 || FORMAT == BF16
    if (WIDE_LOADS) {
        Longs from = Longs(row + uint64_t(unit) * 64);
        [[unroll]] for (uint i = 0; i < 8; i++) {
            uint64_t four = 0;
            if (32 * unit + 4 * i < k) {
                four = from.at[i];
            }
            const uvec2 bits = unpackUint2x32(four);
            [[unroll]] for (uint j = 0; j < 2; j++) {
#if FORMAT == F16
                const vec2 pair = from_halves(bits[j]);
#else
                const vec2 pair = uintBitsToFloat(uvec2(bits[j] << 16, bits[j] & 0xffff0000u));
#endif
                u.level[4 * i + 2 * j] = pair.x;
                u.level[4 * i + 2 * j + 1] = pair.y;
            }
        }
    } else {
        Halves from = Halves(row + uint64_t(unit) * 64);
        [[unroll]] for (uint i = 0; i < 32; i++) {
            uint bits = 0;
            if (32 * unit + i < k) {
                bits = uint(from.at[i]);
            }
#if FORMAT == F16
            u.level[i] = from_half(bits);
#else
            u.level[i] = uintBitsToFloat(bits << 16);
#endif
        }
    }
#elif FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == IQ4_NL
#if FORMAT == Q4_0 || FORMAT == IQ4_NL
    const uint64_t block = row + uint64_t(unit) * 18, quants = block + 2;
#elif FORMAT == Q4_1
    const uint64_t block = row + uint64_t(unit) * 20, quants = block + 4;
#elif FORMAT == Q5_0
    const uint64_t block = row + uint64_t(unit) * 22, quants = block + 6;
#else
    const uint64_t block = row + uint64_t(unit) * 24, quants = block + 8;
#endif
#if FORMAT == Q5_1
    const uvec2 head = WIDE_LOADS ? unpackUint2x32(Longs(block).at[0]) : load_8(block);
    const uvec4 words = load_16_aligned(quants);
    const vec2 scales = from_halves(head.x);
    const float d = scales.x, offset = scales.y;
    const uint high = head.y;
#elif FORMAT == Q5_0
    const uvec2 head = load_8(block);
    const uvec4 words = load_16(quants);
    const float d = from_half(head.x), offset = -16.0 * d;
    const uint high = (head.x >> 16) | (head.y << 16);
#elif FORMAT == Q4_1
    const uint head = Words(block).at[0];
    const uvec4 words = load_16_words(quants);
    const vec2 scales = from_halves(head);
    const float d = scales.x, offset = scales.y;
#else
    const float d = from_half(half_word(block, 0));
    const uvec4 words = load_16(quants);
#endif
#if FORMAT == Q4_0
    const float offset = -8.0 * d;
#elif FORMAT == IQ4_NL
    const float offset = 0.0;
#endif
    [[unroll]] for (uint i = 0; i < 16; i++) {
        uint low = bits_of(words, i, 0, 15u), up = bits_of(words, i, 4, 15u);
#if FORMAT == Q5_0 || FORMAT == Q5_1
        low |= ((high >> i) & 1u) << 4;
        up |= ((high >> (16 + i)) & 1u) << 4;
#endif
#if FORMAT == IQ4_NL
        u.level[i] = iq4_value(low);
        u.level[16 + i] = iq4_value(up);
#else
        u.level[i] = float(low);
        u.level[16 + i] = float(up);
#endif
    }
    u.first = vec2(d, offset);
    u.second = u.first;
#elif FORMAT == Q8_0
    const uint64_t block = row + uint64_t(unit) * 34;
    u.first = vec2(from_half(half_word(block, 0)), 0.0);
    u.second = u.first;
    const uvec4 words[2] = {load_16(block + 2), load_16(block + 18)};
    [[unroll]] for (uint i = 0; i < 32; i++) {
        u.level[i] = float(bitfieldExtract(int(words[i / 16][i % 16 / 4]), int(8 * (i % 4)), 8));
    }
#elif FORMAT == Q2_K
    const uint64_t block = row + uint64_t(unit / 8) * 84;
    const uint in_block = unit % 8, part = in_block / 4, shift = 4 * (in_block / 2 % 2), group = in_block % 2;
    const uvec4 words = load_16_words(block + 16 + 32 * part + 16 * group);
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = float(bits_of(words, i, shift, 3u));
        u.level[16 + i] = float(bits_of(words, i, shift + 2, 3u));
    }
    const uint head = Words(block).at[20];
    const vec2 scales = from_halves(head);
    // Group of 16 that the first run is; the second is two further on.
    const uint g = 8 * part + shift + group;
    const uint one = byte_at(block, g), two = byte_at(block, g + 2);
    u.first = scales * vec2(float(one & 15u), -float(one >> 4));
    u.second = scales * vec2(float(two & 15u), -float(two >> 4));
#elif FORMAT == Q3_K
    const uint64_t block = row + uint64_t(unit / 8) * 110;
    const uint in_block = unit % 8, part = in_block / 4, shift = 4 * (in_block / 2 % 2), group = in_block % 2;
    const uvec4 words = load_16(block + 32 + 32 * part + 16 * group), high = load_16(block + 16 * group);
    const uint bit = 4 * part + shift / 2;
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = float(bits_of(words, i, shift, 3u) | (bits_of(high, i, bit, 1u) << 2));
        u.level[16 + i] = float(bits_of(words, i, shift + 2, 3u) | (bits_of(high, i, bit + 1, 1u) << 2));
    }
    const float d = from_half(half_word(block, 54));
    const uint64_t packed = block + 96;
    float scales[2];
    [[unroll]] for (uint run = 0; run < 2; run++) {
        const uint g = 8 * part + shift + group + 2 * run;
        const uint low = (byte_at(packed, g % 8) >> (4 * (g / 8))) & 15u;
        const uint top = (byte_at(packed, 8 + g % 4) >> (2 * (g / 4))) & 3u;
        scales[run] = d * (float(low | (top << 4)) - 32.0);
    }
    u.first = vec2(scales[0], -4.0 * scales[0]);
    u.second = vec2(scales[1], -4.0 * scales[1]);
#elif FORMAT == Q4_K || FORMAT == Q5_K
#if FORMAT == Q4_K
    const uint64_t block = row + uint64_t(unit / 8) * 144, quants = block + 16;
#else
    const uint64_t block = row + uint64_t(unit / 8) * 176, quants = block + 48;
#endif
    const uint chunk = unit % 8 / 2, group = unit % 2;
    const uvec4 head = load_16_aligned(block), words = load_16_aligned(quants + 32 * chunk + 16 * group);
#if FORMAT == Q5_K
    const uvec4 high = load_16_aligned(block + 16 + 16 * group);
#endif
    const vec2 scales = from_halves(head.x) * vec2(1.0, -1.0);
    const vec2 one = k_scale_min(head, 2 * chunk), two = k_scale_min(head, 2 * chunk + 1);
#if FORMAT == Q4_K
    u = unit_of(words, scales * one, scales * two);
#else
    u.first = scales * one;
    u.second = scales * two;
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = float(bits_of(words, i, 0, 15u) | (bits_of(high, i, 2 * chunk, 1u) << 4));
        u.level[16 + i] = float(bits_of(words, i, 4, 15u) | (bits_of(high, i, 2 * chunk + 1, 1u) << 4));
    }
#endif
#elif FORMAT == Q6_K
    const uint64_t block = row + uint64_t(unit / 8) * 210;
    const uint part = unit % 8 / 4, r = unit % 4;
    const uvec4 words = load_16(block + 64 * part + 16 * r), high = load_16(block + 128 + 32 * part + 16 * (r % 2));
    const uint g = 8 * part + r;
    const uvec2 scales = uvec2(byte_at(block + 192, g), byte_at(block + 192, g + 4));
    u = unit_of(words, high, 2 * (r / 2), scales, from_half(half_word(block, 104)));
#elif FORMAT == IQ4_XS
    const uint64_t block = row + uint64_t(unit / 8) * 136;
    const uint g = unit % 8;
    const uvec2 head = WIDE_LOADS ? unpackUint2x32(Longs(block).at[0]) : load_8(block);
    const uvec4 words = load_16_aligned(block + 8 + 16 * g);
    [[unroll]] for (uint i = 0; i < 16; i++) {
        u.level[i] = iq4_value(bits_of(words, i, 0, 15u));
        u.level[16 + i] = iq4_value(bits_of(words, i, 4, 15u));
    }
    const uint low = (head.y >> (4 * g)) & 15u;
    const uint top = (head.x >> (16 + 2 * g)) & 3u;
    const float scale = from_half(head.x) * (float(low | (top << 4)) - 32.0);
    u.first = vec2(scale, 0.0);
    u.second = u.first;
#endif
    return u;
}

// Units that come with the same loads, neighbours of which the first is a multiple of so many; and what was loaded for them.
#if FORMAT == Q4_K
#define UNITS 2

struct Units {
    uvec4 words[UNITS];
    vec2 first;
    vec2 second;
};

Units load_units(uint64_t row, uint unit, uint k) {
    const uint64_t block = row + uint64_t(unit / 8) * 144;
    const uint chunk = unit % 8 / 2;
    const uvec4 head = load_16_aligned(block);
    const vec2 scales = from_halves(head.x) * vec2(1.0, -1.0);
    Units units;
    units.first = scales * k_scale_min(head, 2 * chunk);
    units.second = scales * k_scale_min(head, 2 * chunk + 1);
    [[unroll]] for (uint group = 0; group < UNITS; group++) {
        units.words[group] = load_16_aligned(block + 16 + 32 * chunk + 16 * group);
    }
    return units;
}

Unit unit_at(Units units, uint index) {
    return unit_of(units.words[index], units.first, units.second);
}
#elif FORMAT == Q6_K
#define UNITS 4

struct Units {
    uvec4 words[UNITS];
    uvec4 high[2];
    uvec2 scales;
    float d;
};

// `COUNT` times 16 bytes, neighbours, from an address that is a multiple of 2: where loads are wide, what lies between two of
// them is loaded once.
#define LOAD_16S(COUNT, TO, ADDRESS) \
    { \
        const uint64_t from = ADDRESS; \
        if (WIDE_LOADS) { \
            const uint shift = 8 * (uint(from) & 7u); \
            uint64_t around[2 * COUNT + 1]; \
            [[unroll]] for (uint i = 0; i < 2 * COUNT; i++) { \
                around[i] = Longs(from & ~uint64_t(7)).at[i]; \
            } \
            around[2 * COUNT] = Longs((from + 16 * COUNT - 1) & ~uint64_t(7)).at[0]; \
            [[unroll]] for (uint i = 0; i < COUNT; i++) { \
                TO[i] = uvec4( \
                    unpackUint2x32((around[2 * i] >> shift) | ((around[2 * i + 1] << 1) << (63 - shift))), \
                    unpackUint2x32((around[2 * i + 1] >> shift) | ((around[2 * i + 2] << 1) << (63 - shift))) \
                ); \
            } \
        } else { \
            [[unroll]] for (uint i = 0; i < COUNT; i++) { \
                TO[i] = load_16(from + 16 * i); \
            } \
        } \
    }

Units load_units(uint64_t row, uint unit, uint k) {
    const uint64_t block = row + uint64_t(unit / 8) * 210;
    const uint part = unit % 8 / 4;
    Units units;
    LOAD_16S(4, units.words, block + 64 * part)
    LOAD_16S(2, units.high, block + 128 + 32 * part)
    units.scales = load_8(block + 192 + 8 * part);
    units.d = from_half(half_word(block, 104));
    return units;
}

Unit unit_at(Units units, uint index) {
    const uvec2 scales = units.scales >> (8 * index);
    return unit_of(units.words[index], units.high[index % 2], 2 * (index / 2), scales, units.d);
}
#else
#define UNITS 1
#define Units Unit

Units load_units(uint64_t row, uint unit, uint k) {
    return load_unit(row, unit, k);
}

Unit unit_at(Units units, uint index) {
    return units;
}
#endif
