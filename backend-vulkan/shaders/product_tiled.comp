#version 460
// Matrix products of many columns: a work group has a tile of results, for which it decodes each unit of weights once and
// loads each activation once to shared memory; each invocation then sums a small tile of its own in registers.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;

// The tile: rows of weights, columns of activations.
layout(constant_id = 1) const uint ROWS = 64;
layout(constant_id = 2) const uint COLUMNS = 64;

// Those of each invocation.
layout(constant_id = 3) const uint OWN_ROWS = 8;
layout(constant_id = 4) const uint OWN_COLUMNS = 4;

// Whether activations may be loaded four at a time.
layout(constant_id = 5) const uint FOURS = 0;

const uint GROUP_ROWS = ROWS;

#include "product.glsl"

// A unit in fours, and the distance of rows in shared memory: one more, so that invocations side by side, which read rows
// side by side, meet different banks.
const uint UNIT_FOURS = 8;
const uint STRIDE = UNIT_FOURS + 1;

// Invocations along the rows of a tile, and along its columns. What an invocation has lies so far apart.
const uint DOWN = ROWS / OWN_ROWS;
const uint ACROSS = COLUMNS / OWN_COLUMNS;

// Values in the order of a unit's levels: the first run, then the second.
shared vec4 weight[ROWS * STRIDE];
shared vec4 activation[COLUMNS * STRIDE];
shared uint64_t x[COLUMNS];

// Global, as an array whose size is specialised cannot be a parameter.
float sum[OWN_ROWS * OWN_COLUMNS];

void load_weights(ProductJob job, Tile tile, uint first_row, uint unit) {
    for (uint row = gl_LocalInvocationID.x; row < ROWS; row += THREADS) {
        const Unit u = load_unit(weight_row(job, tile, first_row + row), unit, job.k);
        [[unroll]] for (uint i = 0; i < UNIT_FOURS; i++) {
            vec4 four = vec4(u.level[4 * i], u.level[4 * i + 1], u.level[4 * i + 2], u.level[4 * i + 3]);
#if !PLAIN
            const vec2 scale = i < 4 ? u.first : u.second;
            four *= scale.x;
#if HAS_OFFSET
            four += scale.y;
#endif
#endif
            weight[row * STRIDE + i] = four;
        }
    }
}

void load_activations(ProductJob job, uint unit) {
    const uint start = unit_start(unit);
    for (uint index = gl_LocalInvocationID.x; index < COLUMNS * UNIT_FOURS; index += THREADS) {
        const uint column = index / UNIT_FOURS, i = index % UNIT_FOURS;
        const uint at = start + i / 4 * RUN_DISTANCE + i % 4 * 4;
        activation[column * STRIDE + i] = four_floats(x[column], at, job.k, FOURS != 0, PLAIN != 0);
    }
}

// Adds the products of what is in shared memory.
void add_products() {
    const uint down = gl_LocalInvocationID.x % DOWN, across = gl_LocalInvocationID.x / DOWN;
    for (uint i = 0; i < UNIT_FOURS; i++) {
        vec4 a[OWN_COLUMNS];
        [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
            a[c] = activation[(across + c * ACROSS) * STRIDE + i];
        }
        [[unroll]] for (uint r = 0; r < OWN_ROWS; r++) {
            const vec4 w = weight[(down + r * DOWN) * STRIDE + i];
            [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
                const uint at = r * OWN_COLUMNS + c;
                sum[at] = fma(w.x, a[c].x, fma(w.y, a[c].y, fma(w.z, a[c].z, fma(w.w, a[c].w, sum[at]))));
            }
        }
    }
}

void store(ProductJob job, Tile tile, uint first_row) {
    const uint down = gl_LocalInvocationID.x % DOWN, across = gl_LocalInvocationID.x / DOWN;
    [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
        const uint column = across + c * ACROSS;
        if (column < tile.count) {
            FloatsOut y = FloatsOut(column_y(job, tile, tile_column(tile, column)));
            [[unroll]] for (uint r = 0; r < OWN_ROWS; r++) {
                const uint row = first_row + down + r * DOWN;
                if (row < job.m) {
                    y.at[row] = sum[r * OWN_COLUMNS + c];
                }
            }
        }
    }
}

void multiply(ProductJob job, Tile tile, uint first_row) {
    // Nobody reads those of the tile before any more: the last barrier was passed.
    for (uint c = gl_LocalInvocationID.x; c < COLUMNS; c += THREADS) {
        x[c] = column_x(job, tile, tile_column(tile, c));
    }
    [[unroll]] for (uint i = 0; i < OWN_ROWS * OWN_COLUMNS; i++) {
        sum[i] = 0.0;
    }
    barrier();
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        load_weights(job, tile, first_row, unit);
        load_activations(job, unit);
        barrier();
        add_products();
        barrier();
    }
    store(job, tile, first_row);
}
