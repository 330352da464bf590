#version 460
// Matrix products, a subgroup each: every lane has rows of weights of its own, and activations are handed round by
// broadcasts, so that nothing is loaded twice and nothing waits for a barrier. Best where subgroups are narrow.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"

// Invocations of a subgroup.
layout(constant_id = 0) const uint SUBGROUP = 8;
layout(local_size_x_id = 0) in;

// Rows of weights of each lane, and columns of activations, that are worked on at once.
layout(constant_id = 1) const uint VECTORS = 4;
layout(constant_id = 2) const uint COLUMNS = 1;

const uint GROUP_ROWS = VECTORS * SUBGROUP;

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
        x[c] = column_x(job, tile, column);
        y[c] = column_y(job, tile, column);
    }
    uint64_t row[VECTORS];
    float sum[VECTORS * COLUMNS];
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        row[v] = weight_row(job, tile, first_row + v * SUBGROUP + lane);
    }
    [[unroll]] for (uint i = 0; i < VECTORS * COLUMNS; i++) {
        sum[i] = 0.0;
    }
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit += UNITS) {
        Units loaded[VECTORS];
        [[unroll]] for (uint v = 0; v < VECTORS; v++) {
            loaded[v] = load_units(row[v], unit, job.k);
        }
        [[unroll]] for (uint number = 0; number < UNITS; number++) {
            const uint start = unit_start(unit + number) + 2 * (lane % LANES);
            // Of column c and run r, the lane's two values.
            vec2 own[2 * COLUMNS];
            [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                [[unroll]] for (uint r = 0; r < 2; r++) {
                    own[2 * c + r] = two_floats(x[c], start + r * RUN_DISTANCE, job.k, PAIRS != 0, PLAIN != 0);
                }
            }
            Unit u[VECTORS];
            [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                u[v] = unit_at(loaded[v], number);
            }
            [[unroll]] for (uint r = 0; r < 2; r++) {
                float part[VECTORS * COLUMNS];
                [[unroll]] for (uint i = 0; i < VECTORS * COLUMNS; i++) {
                    part[i] = 0.0;
                }
#if HAS_OFFSET
                // What the values add up to.
                float total[COLUMNS];
                [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                    total[c] = 0.0;
                }
#endif
                [[unroll]] for (uint i = 0; i < 16; i++) {
                    [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                        const float value = subgroupBroadcast(own[2 * c + r][i % 2], i / 2);
#if HAS_OFFSET
                        total[c] += value;
#endif
                        [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                            part[v * COLUMNS + c] = fma(u[v].level[16 * r + i], value, part[v * COLUMNS + c]);
                        }
                    }
                }
                [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                        const vec2 scale = r == 0 ? u[v].first : u[v].second;
                        const uint i = v * COLUMNS + c;
#if PLAIN
                        sum[i] += part[i];
#else
                        sum[i] = fma(scale.x, part[i], sum[i]);
#endif
#if HAS_OFFSET
                        sum[i] = fma(scale.y, total[c], sum[i]);
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
