#version 460
// Matrix products, a subgroup each: every lane has rows of weights of its own, and activations are handed round, so that
// nothing is loaded twice and nothing waits for a barrier. Best where subgroups are narrow, as where shaders run on the CPU.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "lanes.glsl"
#define MOST_ROWS 8
#define ALL_UNITS 1
#include "formats.glsl"

// Invocations of a subgroup.
layout(constant_id = 0) const uint SUBGROUP = 8;
layout(local_size_x_id = 0) in;

// Rows of weights of each lane, at most MOST_ROWS, and columns of activations, that are worked on at once: powers of two.
layout(constant_id = 1) const uint VECTORS = 4;
layout(constant_id = 2) const uint COLUMNS = 1;

const uint GROUP_ROWS = VECTORS * SUBGROUP;

// Of those, as many as there are registers for.
const uint SOME_VECTORS = VECTORS < 4 ? VECTORS : 4;
const uint SOME_COLUMNS = COLUMNS < 4 ? COLUMNS : 4;

#include "product.glsl"

// Whether columns of activations start at multiples of eight bytes.
layout(constant_id = 3) const uint PAIRS = 0;

// Lanes that a run of 16 activations is spread over, two to a lane.
const uint LANES = 8;

void multiply(ProductJob job, Tile tile, uint first_row) {
    const uint lane = gl_SubgroupInvocationID;
    uint64_t x[COLUMNS], y[COLUMNS];
    [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
        const uint column = tile_column(tile, c);
        x[c] = all_lanes(column_x(job, tile, column));
        y[c] = column_y(job, tile, column);
    }
    const uint64_t base = all_lanes(base_of(weight_row(job, tile, first_row)));
    uint row[MOST_ROWS];
    float sum[VECTORS * COLUMNS];
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        row[v] = uint(weight_row(job, tile, first_row + v * SUBGROUP + lane) - base);
    }
    [[unroll]] for (uint i = 0; i < VECTORS * COLUMNS; i++) {
        sum[i] = 0.0;
    }
    // Loops that say so stay loops: what is longer than an instruction cache holds is read anew for each unit.
    const uint units = (job.k + 31) / 32;
    for (uint first = 0; first < units; first += HEAD_UNITS) {
        Head head[MOST_ROWS];
        load_heads(base, row, VECTORS, first, head);
        [[dont_unroll]] for (uint unit = first; unit < first + HEAD_UNITS; unit++) {
            const uint start = unit_start(unit) + 2 * (lane % LANES);
            Packed packed[MOST_ROWS];
            packed_of(base, head, VECTORS, unit, job.k, packed);
            [[dont_unroll]] for (uint r = 0; r < 2; r++) {
                // Of each column the lane's two values, and what all lanes' add up to.
                vec2 own[COLUMNS];
                float total[COLUMNS];
                [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                    own[c] = two_floats(x[c], start + r * RUN_DISTANCE, job.k, PAIRS != 0, PLAIN != 0);
#if HAS_OFFSET
                    total[c] = add_across(own[c].x + own[c].y, LANES);
#endif
                }
                Run run[MOST_ROWS];
                runs_of(base, packed, VECTORS, r, run);
                float part[VECTORS * COLUMNS];
                [[unroll]] for (uint cs = 0; cs < COLUMNS / SOME_COLUMNS; cs++) {
                    [[unroll]] for (uint vs = 0; vs < VECTORS / SOME_VECTORS; vs++) {
                        [[unroll]] for (uint i = 0; i < 16; i++) {
                            [[unroll]] for (uint cc = 0; cc < SOME_COLUMNS; cc++) {
                                const uint c = SOME_COLUMNS * cs + cc;
                                const float value = subgroupShuffle(own[c][i % 2], i / 2);
                                [[unroll]] for (uint vv = 0; vv < SOME_VECTORS; vv++) {
                                    const uint v = SOME_VECTORS * vs + vv, to = v * COLUMNS + c;
                                    part[to] = i == 0 ? run[v].level[i] * value : fma(run[v].level[i], value, part[to]);
                                }
                            }
                        }
                    }
                }
                [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                        const uint i = v * COLUMNS + c;
#if PLAIN
                        sum[i] += part[i];
#else
                        sum[i] = fma(run[v].scale.x, part[i], sum[i]);
#endif
#if HAS_OFFSET
                        sum[i] = fma(run[v].scale.y, total[c], sum[i]);
#endif
                    }
                }
            }
        }
    }
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        const uint to = first_row + v * SUBGROUP + lane;
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            if (to < job.m && c < tile.count) {
                FloatsOut(y[c]).at[to] = sum[v * COLUMNS + c];
            }
        }
    }
}
