// Loading bytes of weights of some rows at once.

// Whether weights are loaded eight bytes at a time, from addresses that are multiples of eight. Where shaders run on the
// CPU a load costs the same whatever its width. The caller has seen to it that rows of plain formats, and those of blocks
// that are multiples of eight bytes long, start at such addresses, and that rows of 16-bit formats are multiples of four
// values long.
layout(constant_id = 10) const uint WIDE = 0;

const bool WIDE_LOADS = WIDE != 0;

// What the lengths of blocks are multiples of, and so their addresses where loads are wide; else at most four.
#if FORMAT == Q5_1 || FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == IQ4_XS
#define ALIGN 8
#elif FORMAT == Q4_1 || FORMAT == Q2_K
#define ALIGN 4
#else
#define ALIGN 2
#endif

// The length of a block, and how many words hold it, an even number.
#if FORMAT == Q4_0 || FORMAT == IQ4_NL
#define BLOCK_BYTES 18
#elif FORMAT == Q4_1
#define BLOCK_BYTES 20
#elif FORMAT == Q5_0
#define BLOCK_BYTES 22
#elif FORMAT == Q5_1
#define BLOCK_BYTES 24
#elif FORMAT == Q8_0
#define BLOCK_BYTES 34
#elif FORMAT == Q2_K
#define BLOCK_BYTES 84
#elif FORMAT == Q3_K
#define BLOCK_BYTES 110
#elif FORMAT == Q4_K
#define BLOCK_BYTES 144
#elif FORMAT == Q5_K
#define BLOCK_BYTES 176
#elif FORMAT == Q6_K
#define BLOCK_BYTES 210
#elif FORMAT == IQ4_XS
#define BLOCK_BYTES 136
#elif FORMAT > BF16
#error "a format without a length"
#endif
#define BLOCK_WORDS (2 * ((BLOCK_BYTES + 7) / 8))

uint half_word(uint64_t address, uint index) {
    return uint(Halves(address).at[index]);
}

// What rows are told relative to: of loads that are wide a multiple of eight. Where lanes share a base, and the driver can see
// that they do, an address is one register and 32 bits of each lane.
uint64_t base_of(uint64_t row) {
    return WIDE_LOADS ? row & ~uint64_t(7) : row;
}

// For each row `v` of `rows`, loads `BYTES` bytes, a multiple of two, of four where blocks are, that start `FROM` bytes after
// `base`, as words into the array `TO`, from number `AT` on: an even number of them, of which those beyond `BYTES` are then
// anything. Wide loads take the aligned ones around, never one that has none of the bytes, and different rows take turns: a device that waits for memory waits for all of them together.
#define LOAD_BYTES(BYTES, TO, AT, FROM) \
    if (WIDE_LOADS) { \
        uint64_t around[MOST_ROWS][(BYTES + 15 - ALIGN) / 8]; \
        [[unroll]] for (uint i = 0; i < (BYTES + 15 - ALIGN) / 8; i++) { \
            [[unroll]] for (uint v = 0; v < rows; v++) { \
                around[v][i] = 8 * i + 8 <= BYTES \
                    ? Longs(base).at[(FROM) / 8 + i] \
                    : Longs(base).at[((FROM) + min(8 * i, BYTES - 1)) / 8]; \
            } \
        } \
        [[unroll]] for (uint v = 0; v < rows; v++) { \
            const uint shift = ALIGN == 8 ? 0 : 8 * ((FROM) & 7u); \
            [[unroll]] for (uint i = 0; i < (BYTES + 7) / 8; i++) { \
                uint64_t both = around[v][i] >> shift; \
                if (ALIGN < 8 && i + 1 < (BYTES + 15 - ALIGN) / 8) { \
                    both |= (around[v][i + 1] << 1) << (63 - shift); \
                } \
                const uvec2 two = unpackUint2x32(both); \
                TO[AT + 2 * i] = two.x; \
                TO[AT + 2 * i + 1] = two.y; \
            } \
        } \
    } else { \
        [[unroll]] for (uint v = 0; v < rows; v++) { \
            const uint64_t from = base + (FROM); \
            [[unroll]] for (uint i = 0; 4 * i < BYTES; i++) { \
                if (ALIGN >= 4) { \
                    TO[AT + i] = Words(from).at[i]; \
                } else if (4 * i + 2 < BYTES) { \
                    TO[AT + i] = half_word(from, 2 * i) | (half_word(from, 2 * i + 1) << 16); \
                } else { \
                    TO[AT + i] = half_word(from, 2 * i); \
                } \
            } \
        } \
    }

// Like LOAD_BYTES, 16 bytes into a vector.
#define LOAD_16(TO, FROM) \
    { \
        uint four[MOST_ROWS][4]; \
        LOAD_BYTES(16, four[v], 0, FROM) \
        [[unroll]] for (uint v = 0; v < rows; v++) { \
            TO = uvec4(four[v][0], four[v][1], four[v][2], four[v][3]); \
        } \
    }
