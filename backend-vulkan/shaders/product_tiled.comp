#version 460
// Matrix products of many columns in f32: weights lie decoded in shared memory.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;

#include "tile.glsl"

// A unit in fours, and the distance of rows in shared memory: one more, so that invocations side by side, which read rows
// side by side, meet different banks.
const uint UNIT_FOURS = 8;
const uint STRIDE = UNIT_FOURS + 1;

// Values in the order of a unit's levels: the first run, then the second.
shared vec4 weight[ROWS * STRIDE];
shared vec4 activation[COLUMNS * STRIDE];

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
