#version 460
// Matrix products of few columns: lanes run along rows of weights, a unit each, so that neighbours read what lies side by
// side; their sums meet at the end. Each has several rows at once, for which activations are loaded once. Where rows are
// short, some of a subgroup's lanes have rows of their own. Best where memory is what takes the time.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint SUBGROUP = 32;

// Columns of activations, and rows of weights of each lane, that are worked on at once.
layout(constant_id = 2) const uint COLUMNS = 1;
layout(constant_id = 3) const uint ROWS = 4;

// Subgroups that share rows, each with some of the units: where there are too few rows for all.
layout(constant_id = 4) const uint SPLIT = 1;

// Lanes that run along the same rows, a power of two: those of a subgroup unless SPLIT is 1.
layout(constant_id = 5) const uint LANES = 32;

// Whether activations may be loaded four at a time.
layout(constant_id = 6) const uint FOURS = 0;

const uint SUBGROUPS = THREADS / SUBGROUP;
const uint SUBGROUP_ROWS = SUBGROUP / LANES * ROWS;
const uint GROUP_ROWS = SUBGROUPS / SPLIT * SUBGROUP_ROWS;

#include "product.glsl"

const uint SUMS = ROWS * COLUMNS;

// What each subgroup has, where it shares rows.
shared float share[SUBGROUPS * SUMS];

// The sum over the lanes that share rows.
float lanes_add(float value) {
    return LANES == SUBGROUP ? subgroupAdd(value) : add_across(value, LANES);
}

void multiply(ProductJob job, Tile tile, uint first_row) {
    const uint lane = gl_SubgroupInvocationID % LANES, part = gl_SubgroupID % SPLIT;
    const uint own_row =
        first_row + gl_SubgroupID / SPLIT * SUBGROUP_ROWS + gl_SubgroupInvocationID / LANES * ROWS;
    uint64_t x[COLUMNS], y[COLUMNS], row[ROWS];
    [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
        const uint column = tile_column(tile, c);
        x[c] = column_x(job, tile, column);
        y[c] = column_y(job, tile, column);
    }
    [[unroll]] for (uint v = 0; v < ROWS; v++) {
        row[v] = weight_row(job, tile, own_row + v);
    }
    float sum[SUMS];
    [[unroll]] for (uint i = 0; i < SUMS; i++) {
        sum[i] = 0.0;
    }
    const uint units = (job.k + 31) / 32;
    for (uint unit = part * LANES + lane; unit < units; unit += SPLIT * LANES) {
        const uint start = unit_start(unit);
        // Of each column both runs, in fours, and what they add up to.
        vec4 own[8 * COLUMNS];
        vec2 total[COLUMNS];
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            [[unroll]] for (uint i = 0; i < 8; i++) {
                const uint at = start + i / 4 * RUN_DISTANCE + i % 4 * 4;
                own[8 * c + i] = four_floats(x[c], at, job.k, FOURS != 0, PLAIN != 0);
            }
#if HAS_OFFSET
            [[unroll]] for (uint r = 0; r < 2; r++) {
                const uint i = 8 * c + 4 * r;
                total[c][r] = dot(own[i] + own[i + 1] + own[i + 2] + own[i + 3], vec4(1.0));
            }
#endif
        }
        [[unroll]] for (uint v = 0; v < ROWS; v++) {
            const Unit u = load_unit(row[v], unit, job.k);
            [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                vec2 part_sum = vec2(0.0);
                [[unroll]] for (uint i = 0; i < 16; i++) {
                    const vec2 level = vec2(u.level[i], u.level[16 + i]);
                    const vec2 value = vec2(own[8 * c + i / 4][i % 4], own[8 * c + 4 + i / 4][i % 4]);
                    part_sum = fma(level, value, part_sum);
                }
                const uint i = v * COLUMNS + c;
#if PLAIN
                sum[i] += part_sum.x + part_sum.y;
#else
                sum[i] = fma(u.first.x, part_sum.x, fma(u.second.x, part_sum.y, sum[i]));
#endif
#if HAS_OFFSET
                sum[i] = fma(u.first.y, total[c].x, fma(u.second.y, total[c].y, sum[i]));
#endif
            }
        }
    }
    [[unroll]] for (uint i = 0; i < SUMS; i++) {
        sum[i] = lanes_add(sum[i]);
    }
    if (SPLIT > 1) {
        if (lane == 0) {
            [[unroll]] for (uint i = 0; i < SUMS; i++) {
                share[gl_SubgroupID * SUMS + i] = sum[i];
            }
        }
        barrier();
        if (part == 0) {
            [[unroll]] for (uint i = 0; i < SUMS; i++) {
                for (uint other = 1; other < SPLIT; other++) {
                    sum[i] += share[(gl_SubgroupID + other) * SUMS + i];
                }
            }
        }
        // Before the next tile's come.
        barrier();
    }
    if (lane == 0 && part == 0) {
        [[unroll]] for (uint v = 0; v < ROWS; v++) {
            [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                if (own_row + v < job.m && c < tile.count) {
                    FloatsOut(y[c]).at[own_row + v] = sum[v * COLUMNS + c];
                }
            }
        }
    }
}
