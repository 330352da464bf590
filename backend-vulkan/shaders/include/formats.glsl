// Decoding weights. The format is chosen by FORMAT, a number of those below.
//
// The unit of work is 32 values of a row: two runs of 16 neighbours, the second RUN_DISTANCE values after the first, so
// that both halves of the same bytes are used. A run's values are `scale.x * level + scale.y`.
//
// Decoding has steps, each for some rows at once: what HEAD_UNITS neighbouring units have in common is loaded (`load_heads`),
// then what the runs of a unit have (`packed_of`), and of that a run's levels are made (`runs_of`). A kernel that has one
// unit of a row at a time takes all steps at once (`load_unit`). Rows are told by how many bytes they start after an address
// `base` (see loads.glsl).

// The most rows at once; a kernel may say more before this is included.
#ifndef MOST_ROWS
#define MOST_ROWS 1
#endif

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

// 16 values of a row: levels, and a scale and an offset.
struct Run {
    float level[16];
    vec2 scale;
};

// Both runs of a unit: their levels, and each one's scale and offset.
struct Unit {
    float level[32];
    vec2 first;
    vec2 second;
};

// Where in its row a unit's first run starts.
uint unit_start(uint unit) {
    const uint per_pair = RUN_DISTANCE / 16;
    return (unit / per_pair) * (2 * RUN_DISTANCE) + (unit % per_pair) * 16;
}

#include "loads.glsl"

#if FORMAT == IQ4_NL || FORMAT == IQ4_XS
// The table of 16 values, four to a word: -127, -104, -83, -65 | -49, -35, -22, -10 | 1, 13, 25, 38 | 53, 69, 89, 113.
int iq4_value(uint index) {
    const uint word = index < 8 ? (index < 4 ? 0xbfad9881u : 0xf6eaddcfu) : (index < 12 ? 0x26190d01u : 0x71594535u);
    return bitfieldExtract(int(word), int(8 * (index & 3u)), 8);
}
#endif

// What the runs of a unit have.
#if PLAIN
struct Packed {
    uint row;
    uint start;
    uint k;
};

void runs_of(uint64_t base, Packed packed[MOST_ROWS], uint rows, uint r, out Run run[MOST_ROWS]) {
    const uint at_once = FORMAT == F32 ? 2 : 4;
    [[unroll]] for (uint i = 0; i < 16; i += at_once) {
        [[unroll]] for (uint v = 0; v < rows; v++) {
            const uint row = packed[v].row, at = packed[v].start + 16 * r + i, k = packed[v].k;
            uvec2 bits = uvec2(0);
#if FORMAT == F32
            if (WIDE_LOADS) {
                if (at < k) {
                    bits = unpackUint2x32(Longs(base).at[row / 8 + at / 2]);
                }
            } else {
                [[unroll]] for (uint j = 0; j < 2; j++) {
                    if (at + j < k) {
                        bits[j] = Words(base + row).at[at + j];
                    }
                }
            }
            run[v].level[i] = uintBitsToFloat(bits.x);
            run[v].level[i + 1] = uintBitsToFloat(bits.y);
#else
            if (WIDE_LOADS) {
                if (at < k) {
                    bits = unpackUint2x32(Longs(base).at[row / 8 + at / 4]);
                }
            } else {
                [[unroll]] for (uint j = 0; j < 4; j++) {
                    if (at + j < k) {
                        bits[j / 2] |= half_word(base + row, at + j) << (16 * (j % 2));
                    }
                }
            }
            [[unroll]] for (uint j = 0; j < 2; j++) {
#if FORMAT == F16
                const vec2 two = from_halves(bits[j]);
#else
                const vec2 two = uintBitsToFloat(uvec2(bits[j] << 16, bits[j] & 0xffff0000u));
#endif
                run[v].level[i + 2 * j] = two.x;
                run[v].level[i + 2 * j + 1] = two.y;
            }
#endif
        }
    }
    [[unroll]] for (uint v = 0; v < rows; v++) {
        run[v].scale = vec2(1.0, 0.0);
    }
}
#else
struct Packed {
    uvec4 words;
    // Further bits of each level; of Q8_0 the second run.
    uvec4 high;
    vec2 first;
    vec2 second;
};

// The lower four bits of each byte, or the upper ones.
uvec4 nibbles(uvec4 words, uint r) {
    return (words >> (4 * r)) & 0x0f0f0f0fu;
}

// The lowest four bits, each as the fifth of a byte.
uint fifths(uint bits) {
    return (((bits & 15u) * 0x00204081u) & 0x01010101u) << 4;
}

// The levels of run `r`, a byte each.
uvec4 bytes_of(Packed packed, uint r) {
#if FORMAT == Q8_0
    return r == 0 ? packed.words : packed.high;
#elif FORMAT == Q5_0 || FORMAT == Q5_1
    const uint high = packed.high.x >> (16 * r);
    return nibbles(packed.words, r) | uvec4(fifths(high), fifths(high >> 4), fifths(high >> 8), fifths(high >> 12));
#elif FORMAT == Q2_K
    return (packed.words >> (2 * r)) & 0x03030303u;
#elif FORMAT == Q3_K
    return ((packed.words >> (2 * r)) & 0x03030303u) | (((packed.high >> r) & 0x01010101u) << 2);
#elif FORMAT == Q5_K
    return nibbles(packed.words, r) | (((packed.high >> r) & 0x01010101u) << 4);
#elif FORMAT == Q6_K
    return nibbles(packed.words, r) | (((packed.high >> (4 * r)) & 0x03030303u) << 4);
#else
    return nibbles(packed.words, r);
#endif
}

// Likewise, as integers that are multiplied: of the formats with a table the values there.
uvec4 signed_bytes_of(Packed packed, uint r) {
    uvec4 bytes = bytes_of(packed, r);
#if FORMAT == IQ4_NL || FORMAT == IQ4_XS
    [[unroll]] for (uint i = 0; i < 4; i++) {
        uint word = 0;
        [[unroll]] for (uint j = 0; j < 4; j++) {
            const int value = iq4_value((bytes[i] >> (8 * j)) & 0xffu);
            word |= (uint(value) & 0xffu) << (8 * j);
        }
        bytes[i] = word;
    }
#endif
    return bytes;
}

void runs_of(uint64_t base, Packed packed[MOST_ROWS], uint rows, uint r, out Run run[MOST_ROWS]) {
    [[unroll]] for (uint v = 0; v < rows; v++) {
        run[v].scale = r == 0 ? packed[v].first : packed[v].second;
        const uvec4 bytes = bytes_of(packed[v], r);
        [[unroll]] for (uint i = 0; i < 16; i++) {
            const uint word = bytes[i / 4], shift = 8 * (i % 4);
#if FORMAT == Q8_0
            run[v].level[i] = float(bitfieldExtract(int(word), int(shift), 8));
#elif FORMAT == IQ4_NL || FORMAT == IQ4_XS
            run[v].level[i] = float(iq4_value((word >> shift) & 0xffu));
#else
            run[v].level[i] = float((word >> shift) & 0xffu);
#endif
        }
    }
}
#endif

// What HEAD_UNITS neighbouring units have in common, the first of which is a multiple of so many: their block, or what more
// than one of them needs of it. A kernel that takes units one by one leaves ALL_UNITS out, and has what its unit needs.
#ifndef ALL_UNITS
#define ALL_UNITS 0
#endif
#if FORMAT == Q2_K || FORMAT == Q3_K || FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K || FORMAT == IQ4_XS
#define HEAD_UNITS 8
#else
#define HEAD_UNITS 1
#endif

#if HEAD_UNITS == 1
// Where the row starts.
#define Head uint

void load_heads(uint64_t base, uint row[MOST_ROWS], uint rows, uint unit, out Head head[MOST_ROWS]) {
    head = row;
}
#else
// `N` times 16 bytes for all units, of which each needs one.
#if ALL_UNITS
#define OF_UNITS(N) N
#else
#define OF_UNITS(N) 1
#endif

struct Head {
    uint block;
#if FORMAT == Q2_K || FORMAT == Q3_K
    uvec4 words[OF_UNITS(4)];
#elif FORMAT == Q6_K
    uvec4 words[OF_UNITS(8)];
#endif
#if FORMAT == Q3_K || FORMAT == Q5_K
    uvec4 high[OF_UNITS(2)];
#elif FORMAT == Q6_K
    uvec4 high[OF_UNITS(4)];
#endif
    // Scales and minima, and what they are multiplied with.
    uvec4 scales;
    vec2 d;
};

uvec4 of_unit(uvec4 only[1], uint index) {
    return only[0];
}

uvec4 of_unit(uvec4 all[2], uint index) {
    return (index & 1u) == 0 ? all[0] : all[1];
}

uvec4 of_unit(uvec4 all[4], uint index) {
    return (index & 2u) == 0 ? of_unit(uvec4[2](all[0], all[1]), index) : of_unit(uvec4[2](all[2], all[3]), index);
}

uvec4 of_unit(uvec4 all[8], uint index) {
    return (index & 4u) == 0
        ? of_unit(uvec4[4](all[0], all[1], all[2], all[3]), index)
        : of_unit(uvec4[4](all[4], all[5], all[6], all[7]), index);
}

uvec4 four_of(uint words[BLOCK_WORDS], uint at) {
    return uvec4(words[at], words[at + 1], words[at + 2], words[at + 3]);
}

void load_heads(uint64_t base, uint row[MOST_ROWS], uint rows, uint unit, out Head head[MOST_ROWS]) {
    uint block[MOST_ROWS];
    [[unroll]] for (uint v = 0; v < rows; v++) {
        block[v] = row[v] + BLOCK_BYTES * (unit / 8);
        head[v].block = block[v];
    }
    uint words[MOST_ROWS][BLOCK_WORDS];
#if FORMAT == Q2_K || FORMAT == Q3_K || FORMAT == Q6_K
#if ALL_UNITS
    LOAD_BYTES(BLOCK_BYTES, words[v], 0, block[v])
    // Where in the block those of all units lie.
    const uint words_at = FORMAT == Q2_K ? 4 : FORMAT == Q3_K ? 8 : 0, high_at = FORMAT == Q3_K ? 0 : 32;
    const uint scales_at = FORMAT == Q2_K ? 0 : FORMAT == Q3_K ? 24 : 48;
    const uint d_at = FORMAT == Q2_K ? 20 : FORMAT == Q3_K ? 27 : 52;
#else
    // Those of the unit, and scales of its half of the block, or all where they are put together from several.
    const uint part = unit % 8 / 4, group = unit % 2, words_at = 0, high_at = 4, scales_at = 8, d_at = 12;
#if FORMAT == Q2_K
    LOAD_BYTES(16, words[v], words_at, block[v] + 16 + 32 * part + 16 * group)
    LOAD_BYTES(8, words[v], scales_at, block[v] + 8 * part)
    LOAD_BYTES(4, words[v], d_at, block[v] + 80)
#elif FORMAT == Q3_K
    LOAD_BYTES(16, words[v], words_at, block[v] + 32 + 32 * part + 16 * group)
    LOAD_BYTES(16, words[v], high_at, block[v] + 16 * group)
    LOAD_BYTES(12, words[v], scales_at, block[v] + 96)
    LOAD_BYTES(2, words[v], d_at, block[v] + 108)
#else
    LOAD_BYTES(16, words[v], words_at, block[v] + 16 * (unit % 8))
    LOAD_BYTES(16, words[v], high_at, block[v] + 128 + 32 * part + 16 * group)
    LOAD_BYTES(8, words[v], scales_at, block[v] + 192 + 8 * part)
    LOAD_BYTES(2, words[v], d_at, block[v] + 208)
#endif
#endif
    [[unroll]] for (uint v = 0; v < rows; v++) {
        [[unroll]] for (uint i = 0; i < head[v].words.length(); i++) {
            head[v].words[i] = four_of(words[v], words_at + 4 * i);
        }
#if FORMAT != Q2_K
        [[unroll]] for (uint i = 0; i < head[v].high.length(); i++) {
            head[v].high[i] = four_of(words[v], high_at + 4 * i);
        }
#endif
        head[v].scales = four_of(words[v], scales_at);
#if FORMAT == Q2_K
        head[v].d = from_halves(words[v][d_at]) * vec2(1.0, -1.0);
#else
        head[v].d = from_half(words[v][d_at]) * vec2(1.0, FORMAT == Q3_K ? -4.0 : -32.0);
#endif
    }
#elif FORMAT == IQ4_XS
    LOAD_BYTES(8, words[v], 0, block[v])
    [[unroll]] for (uint v = 0; v < rows; v++) {
        head[v].scales = uvec4(words[v][0], words[v][1], 0, 0);
        head[v].d = vec2(from_half(words[v][0]), 0.0);
    }
#else
#if FORMAT == Q5_K && ALL_UNITS
    LOAD_BYTES(48, words[v], 0, block[v])
    [[unroll]] for (uint v = 0; v < rows; v++) {
        head[v].high = uvec4[2](four_of(words[v], 4), four_of(words[v], 8));
    }
#else
    LOAD_BYTES(16, words[v], 0, block[v])
#if FORMAT == Q5_K
    LOAD_16(head[v].high[0], block[v] + 16 + 16 * (unit % 2))
#endif
#endif
    [[unroll]] for (uint v = 0; v < rows; v++) {
        // Of six bits each, of which the lower four or all lie together; as bytes.
        const uvec2 middle = uvec2(words[v][1], words[v][2]), low = middle & 0x3f3f3f3fu;
        const uvec2 top = (uvec2(words[v][3], words[v][3] >> 4) & 0x0f0f0f0fu) | ((middle >> 2) & 0x30303030u);
        head[v].scales = uvec4(low.x, top.x, low.y, top.y);
        head[v].d = from_halves(words[v][0]) * vec2(1.0, -1.0);
    }
#endif
}
#endif

// What the runs of unit `unit` of rows of `k` values have, whose heads these are.
void packed_of(uint64_t base, Head head[MOST_ROWS], uint rows, uint unit, uint k, out Packed packed[MOST_ROWS]) {
#if PLAIN
    [[unroll]] for (uint v = 0; v < rows; v++) {
        packed[v] = Packed(head[v], 32 * unit, k);
    }
#elif HEAD_UNITS == 1
    // The whole block, and what follows a scale of two bytes.
    uint block[MOST_ROWS][BLOCK_WORDS];
    LOAD_BYTES(BLOCK_BYTES, block[v], 0, head[v] + BLOCK_BYTES * unit)
    [[unroll]] for (uint v = 0; v < rows; v++) {
        uint after[BLOCK_WORDS];
        [[unroll]] for (uint i = 0; i < BLOCK_WORDS - 1; i++) {
            after[i] = (block[v][i] >> 16) | (block[v][i + 1] << 16);
        }
        const float d = from_half(block[v][0]);
#if FORMAT == Q4_0 || FORMAT == IQ4_NL
        packed[v].words = uvec4(after[0], after[1], after[2], after[3]);
        packed[v].first = vec2(d, FORMAT == Q4_0 ? -8.0 * d : 0.0);
#elif FORMAT == Q4_1
        packed[v].words = uvec4(block[v][1], block[v][2], block[v][3], block[v][4]);
        packed[v].first = vec2(d, from_half(block[v][0] >> 16));
#elif FORMAT == Q5_0
        packed[v].words = uvec4(after[1], after[2], after[3], after[4]);
        packed[v].high.x = after[0];
        packed[v].first = vec2(d, -16.0 * d);
#elif FORMAT == Q5_1
        packed[v].words = uvec4(block[v][2], block[v][3], block[v][4], block[v][5]);
        packed[v].high.x = block[v][1];
        packed[v].first = vec2(d, from_half(block[v][0] >> 16));
#else
        packed[v].words = uvec4(after[0], after[1], after[2], after[3]);
        packed[v].high = uvec4(after[4], after[5], after[6], after[7]);
        packed[v].first = vec2(d, 0.0);
#endif
        packed[v].second = packed[v].first;
    }
#else
    // Half of the block, pair of units in it, and which of the pair.
    const uint part = unit % 8 / 4, pair = unit / 2 % 2, group = unit % 2;
#if FORMAT == Q4_K
    LOAD_16(packed[v].words, head[v].block + 16 + 64 * part + 32 * pair + 16 * group)
#elif FORMAT == Q5_K
    LOAD_16(packed[v].words, head[v].block + 48 + 64 * part + 32 * pair + 16 * group)
#elif FORMAT == IQ4_XS
    LOAD_16(packed[v].words, head[v].block + 8 + 16 * (unit % 8))
#endif
    [[unroll]] for (uint v = 0; v < rows; v++) {
        const uvec4 all = head[v].scales;
        // Of Q2_K and Q6_K.
        const uvec2 half_scales = ALL_UNITS == 1 && FORMAT != Q3_K && part == 1 ? all.zw : all.xy;
        const vec2 d = head[v].d;
#if FORMAT == Q2_K || FORMAT == Q3_K
        packed[v].words = of_unit(head[v].words, 2 * part + group) >> (4 * pair);
        const uint own = pair == 0 ? half_scales.x : half_scales.y;
#elif FORMAT == Q6_K
        packed[v].words = of_unit(head[v].words, unit % 8);
        packed[v].high = of_unit(head[v].high, 2 * part + group) >> (2 * pair);
#endif
#if FORMAT == Q3_K || FORMAT == Q5_K
        packed[v].high = of_unit(head[v].high, group) >> (4 * part + 2 * pair);
#endif
#if FORMAT == Q2_K
        const uvec2 both = uvec2(own) >> (8 * group + uvec2(0, 16));
        packed[v].first = d * vec2(float(both.x & 15u), float((both.x >> 4) & 15u));
        packed[v].second = d * vec2(float(both.y & 15u), float((both.y >> 4) & 15u));
#elif FORMAT == Q3_K
        const uvec2 places = 8 * group + 4 * part + uvec2(0, 16);
        const uvec2 both = ((uvec2(own) >> places) & 15u) | (((uvec2(all.z) >> (places + 2 * pair)) & 3u) << 4);
        packed[v].first = d * (float(both.x) - 32.0);
        packed[v].second = d * (float(both.y) - 32.0);
#elif FORMAT == Q4_K || FORMAT == Q5_K
        const uvec2 both = (part == 0 ? all.xz : all.yw) >> (16 * pair);
        packed[v].first = d * vec2(both & 0xffu);
        packed[v].second = d * vec2((both >> 8) & 0xffu);
#elif FORMAT == Q6_K
        const ivec2 both = bitfieldExtract(ivec2(half_scales >> (8 * (unit % 4))), 0, 8);
        packed[v].first = d * float(both.x);
        packed[v].second = d * float(both.y);
#else
        const uint low = (all.y >> (4 * (unit % 8))) & 15u, top = (all.x >> (16 + 2 * (unit % 8))) & 3u;
        packed[v].first = d * (float(low | (top << 4)) - 32.0);
        packed[v].second = packed[v].first;
#endif
    }
#endif
}

// What the runs of unit `unit` of a row of `k` values have.
Packed load_packed(uint64_t base, uint row, uint unit, uint k) {
    uint rows[MOST_ROWS];
    Head head[MOST_ROWS];
    Packed packed[MOST_ROWS];
    rows[0] = row;
    load_heads(base, rows, 1, unit, head);
    packed_of(base, head, 1, unit, k, packed);
    return packed[0];
}

// All of that unit.
Unit load_unit(uint64_t base, uint row, uint unit, uint k) {
    Packed packed[MOST_ROWS];
    packed[0] = load_packed(base, row, unit, k);
    Unit both;
    [[unroll]] for (uint r = 0; r < 2; r++) {
        Run run[MOST_ROWS];
        runs_of(base, packed, 1, r, run);
        [[unroll]] for (uint i = 0; i < 16; i++) {
            both.level[16 * r + i] = run[0].level[i];
        }
        if (r == 0) {
            both.first = run[0].scale;
        } else {
            both.second = run[0].scale;
        }
    }
    return both;
}

// The same of the row at an address.
Packed load_packed(uint64_t row, uint unit, uint k) {
    return load_packed(base_of(row), uint(row - base_of(row)), unit, k);
}

Unit load_unit(uint64_t row, uint unit, uint k) {
    return load_unit(base_of(row), uint(row - base_of(row)), unit, k);
}
