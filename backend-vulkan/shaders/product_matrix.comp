#version 460
// Matrix products of many columns with cooperative matrices (VK_KHR_cooperative_matrix): a work group brings a unit of
// weights and activations to shared memory as 16-bit floats; each subgroup multiplies blocks of them, and sums in f32.
// For quantised formats, beside which activations may be rounded; each column of them is scaled to fit.

#extension GL_GOOGLE_include_directive : require
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint SUBGROUP = 32;

// The tile: rows of weights, columns of activations.
layout(constant_id = 2) const uint ROWS = 64;
layout(constant_id = 3) const uint COLUMNS = 64;

// What the device multiplies at once: ROWS and COLUMNS are multiples of the first two, 32 of the last.
layout(constant_id = 4) const uint BLOCK_ROWS = 16;
layout(constant_id = 5) const uint BLOCK_COLUMNS = 16;
layout(constant_id = 6) const uint DEPTH = 16;

// Whether activations may be loaded four at a time.
layout(constant_id = 7) const uint FOURS = 0;

const uint GROUP_ROWS = ROWS;

#include "product.glsl"

// Blocks of the tile, of which each subgroup has as many as any other; those of a subgroup lie in the same rows, where there
// are subgroups enough.
const uint SUBGROUPS = THREADS / SUBGROUP;
const uint DOWN = ROWS / BLOCK_ROWS;
const uint BLOCKS = DOWN * (COLUMNS / BLOCK_COLUMNS);
const uint OWN_BLOCKS = (BLOCKS + SUBGROUPS - 1) / SUBGROUPS;

// A unit in 16 bytes, eight values each, and the distance of rows in shared memory: one more, so that rows side by side meet
// different banks.
const uint PARTS = 4;
const uint STRIDE = PARTS + 1;

shared uvec4 weight[ROWS * STRIDE];
shared uvec4 activation[COLUMNS * STRIDE];
shared uint64_t x[COLUMNS];
// Of each column the bits of its largest finite activation.
shared uint largest[COLUMNS];
// A block of results of each subgroup, on its way to memory.
shared float result[SUBGROUPS * BLOCK_ROWS * BLOCK_COLUMNS];

// The power of two that brings a column's largest activation to 2^14 and more: to the upper end of 16-bit floats, which have
// 65504 for their largest, as far from their smallest as can be.
float column_scale(uint column) {
    const uint exponent = largest[column] >> 23;
    return largest[column] == 0 ? 1.0 : uintBitsToFloat(min(268 - exponent, 254) << 23);
}

void find_largest(ProductJob job) {
    const uint fours = (job.k + 3) / 4;
    for (uint index = gl_LocalInvocationID.x; index < COLUMNS * 8; index += THREADS) {
        const uint column = index / 8;
        float most = 0.0;
        for (uint i = index % 8; i < fours; i += 8) {
            const vec4 four = abs(four_floats(x[column], 4 * i, job.k, FOURS != 0, false));
            [[unroll]] for (uint j = 0; j < 4; j++) {
                if (is_finite(four[j]) && four[j] > most) {
                    most = four[j];
                }
            }
        }
        atomicMax(largest[column], floatBitsToUint(most));
    }
}

void load_weights(ProductJob job, Tile tile, uint first_row, uint unit) {
    for (uint row = gl_LocalInvocationID.x; row < ROWS; row += THREADS) {
        const Unit u = load_unit(weight_row(job, tile, first_row + row), unit, job.k);
        [[unroll]] for (uint i = 0; i < PARTS; i++) {
            const vec2 scale = i < 2 ? u.first : u.second;
            uvec4 part;
            [[unroll]] for (uint j = 0; j < 4; j++) {
                vec2 two = vec2(u.level[8 * i + 2 * j], u.level[8 * i + 2 * j + 1]) * scale.x;
#if HAS_OFFSET
                two += scale.y;
#endif
                part[j] = packHalf2x16(two);
            }
            weight[row * STRIDE + i] = part;
        }
    }
}

void load_activations(ProductJob job, uint unit) {
    const uint start = unit_start(unit);
    for (uint index = gl_LocalInvocationID.x; index < COLUMNS * PARTS; index += THREADS) {
        const uint column = index / PARTS, i = index % PARTS;
        const uint at = start + i / 2 * RUN_DISTANCE + i % 2 * 8;
        const float scale = column_scale(column);
        const vec4 low = scale * four_floats(x[column], at, job.k, FOURS != 0, false);
        const vec4 high = scale * four_floats(x[column], at + 4, job.k, FOURS != 0, false);
        activation[column * STRIDE + i] = uvec4(
            packHalf2x16(low.xy), packHalf2x16(low.zw), packHalf2x16(high.xy), packHalf2x16(high.zw)
        );
    }
}

void multiply(ProductJob job, Tile tile, uint first_row) {
    // Nobody reads those of the tile before any more: the last barrier was passed.
    for (uint c = gl_LocalInvocationID.x; c < COLUMNS; c += THREADS) {
        x[c] = column_x(job, tile, tile_column(tile, c));
        largest[c] = 0;
    }
    coopmat<float, gl_ScopeSubgroup, BLOCK_ROWS, BLOCK_COLUMNS, gl_MatrixUseAccumulator> sum[OWN_BLOCKS];
    [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
        sum[i] = coopmat<float, gl_ScopeSubgroup, BLOCK_ROWS, BLOCK_COLUMNS, gl_MatrixUseAccumulator>(0.0);
    }
    barrier();
    find_largest(job);
    barrier();
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        load_weights(job, tile, first_row, unit);
        load_activations(job, unit);
        barrier();
        [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
            const uint block = gl_SubgroupID + i * SUBGROUPS;
            if (block < BLOCKS) {
                const uint row = block % DOWN * BLOCK_ROWS, column = block / DOWN * BLOCK_COLUMNS;
                [[unroll]] for (uint k = 0; k < 32; k += DEPTH) {
                    coopmat<float16_t, gl_ScopeSubgroup, BLOCK_ROWS, DEPTH, gl_MatrixUseA> w;
                    coopmat<float16_t, gl_ScopeSubgroup, DEPTH, BLOCK_COLUMNS, gl_MatrixUseB> a;
                    coopMatLoad(w, weight, row * STRIDE + k / 8, STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                    coopMatLoad(a, activation, column * STRIDE + k / 8, STRIDE, gl_CooperativeMatrixLayoutColumnMajor);
                    sum[i] = coopMatMulAdd(w, a, sum[i]);
                }
            }
        }
        barrier();
    }
    [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
        const uint block = gl_SubgroupID + i * SUBGROUPS;
        const uint own = gl_SubgroupID * BLOCK_ROWS * BLOCK_COLUMNS;
        if (block < BLOCKS) {
            coopMatStore(sum[i], result, own, BLOCK_ROWS, gl_CooperativeMatrixLayoutColumnMajor);
        }
        barrier();
        if (block < BLOCKS) {
            for (uint at = gl_SubgroupInvocationID; at < BLOCK_ROWS * BLOCK_COLUMNS; at += SUBGROUP) {
                const uint row = first_row + block % DOWN * BLOCK_ROWS + at % BLOCK_ROWS;
                const uint column = block / DOWN * BLOCK_COLUMNS + at / BLOCK_ROWS;
                if (row < job.m && column < tile.count) {
                    FloatsOut(column_y(job, tile, tile_column(tile, column))).at[row] =
                        result[own + at] / column_scale(column);
                }
            }
        }
        barrier();
    }
}
