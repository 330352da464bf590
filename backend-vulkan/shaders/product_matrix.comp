#version 460
// Matrix products of many columns with cooperative matrices (VK_KHR_cooperative_matrix): a work group brings a unit of
// weights and activations to shared memory as 16-bit floats; each subgroup multiplies blocks of them, and sums in f32.
// For quantised formats, beside which activations may be rounded.

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

// Words of a unit, two values each, and the distance of rows in shared memory: in whole 16 bytes, so that they can be loaded
// together, and some more, so that rows side by side meet different banks.
const uint WORDS = 16;
const uint STRIDE = WORDS + 4;

// The largest 16-bit float.
const float LARGEST = 65504.0;

shared uint weight[ROWS * STRIDE];
shared uint activation[COLUMNS * STRIDE];
shared uint64_t x[COLUMNS];
// The bits of the largest activation that does not fit 16 bits, if any does not.
shared uint too_large;
// A block of results of each subgroup, on its way to memory.
shared float result[SUBGROUPS * BLOCK_ROWS * BLOCK_COLUMNS];

void load_weights(ProductJob job, Tile tile, uint first_row, uint unit) {
    for (uint row = gl_LocalInvocationID.x; row < ROWS; row += THREADS) {
        const Unit u = load_unit(weight_row(job, tile, first_row + row), unit, job.k);
        [[unroll]] for (uint i = 0; i < WORDS; i++) {
            vec2 two = vec2(u.level[2 * i], u.level[2 * i + 1]);
            const vec2 scale = i < 8 ? u.first : u.second;
            two *= scale.x;
#if HAS_OFFSET
            two += scale.y;
#endif
            weight[row * STRIDE + i] = packHalf2x16(two);
        }
    }
}

void load_activations(ProductJob job, uint unit, float scale) {
    const uint start = unit_start(unit);
    for (uint index = gl_LocalInvocationID.x; index < COLUMNS * 8; index += THREADS) {
        const uint column = index / 8, i = index % 8;
        const uint at = start + i / 4 * RUN_DISTANCE + i % 4 * 4;
        const vec4 four = four_floats(x[column], at, job.k, FOURS != 0, false);
        const vec4 scaled = scale * four;
        activation[column * STRIDE + 2 * i] = packHalf2x16(scaled.xy);
        activation[column * STRIDE + 2 * i + 1] = packHalf2x16(scaled.zw);
        if (any(greaterThan(abs(scaled), vec4(LARGEST)))) {
            const vec4 size = abs(four);
            const float most = max(max(size.x, size.y), max(size.z, size.w));
            atomicMax(too_large, floatBitsToUint(min(most, 3.0e38)));
        }
    }
}

void multiply(ProductJob job, Tile tile, uint first_row) {
    // Nobody reads those of the tile before any more: the last barrier was passed.
    for (uint c = gl_LocalInvocationID.x; c < COLUMNS; c += THREADS) {
        x[c] = column_x(job, tile, tile_column(tile, c));
    }
    if (gl_LocalInvocationID.x == 0) {
        too_large = 0;
    }
    // What activations are multiplied with to fit: a power of two, that of the largest so far.
    float scale = 1.0;
    coopmat<float, gl_ScopeSubgroup, BLOCK_ROWS, BLOCK_COLUMNS, gl_MatrixUseAccumulator> sum[OWN_BLOCKS];
    [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
        sum[i] = coopmat<float, gl_ScopeSubgroup, BLOCK_ROWS, BLOCK_COLUMNS, gl_MatrixUseAccumulator>(0.0);
    }
    barrier();
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        load_weights(job, tile, first_row, unit);
        load_activations(job, unit, scale);
        barrier();
        if (too_large != 0) {
            // One over the next power of two.
            const uint exponent = floatBitsToUint(uintBitsToFloat(too_large) / LARGEST) >> 23;
            const float smaller = uintBitsToFloat((253 - exponent) << 23);
            [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
                sum[i] *= smaller / scale;
            }
            scale = smaller;
            barrier();
            if (gl_LocalInvocationID.x == 0) {
                too_large = 0;
            }
            barrier();
            load_activations(job, unit, scale);
            barrier();
        }
        [[unroll]] for (uint i = 0; i < OWN_BLOCKS; i++) {
            const uint block = gl_SubgroupID + i * SUBGROUPS;
            if (block < BLOCKS) {
                const uint row = block % DOWN * BLOCK_ROWS, column = block / DOWN * BLOCK_COLUMNS;
                [[unroll]] for (uint k = 0; k < 32; k += DEPTH) {
                    coopmat<float16_t, gl_ScopeSubgroup, BLOCK_ROWS, DEPTH, gl_MatrixUseA> w;
                    coopmat<float16_t, gl_ScopeSubgroup, DEPTH, BLOCK_COLUMNS, gl_MatrixUseB> a;
                    coopMatLoad(w, weight, row * STRIDE + k / 2, STRIDE, gl_CooperativeMatrixLayoutRowMajor);
                    coopMatLoad(a, activation, column * STRIDE + k / 2, STRIDE, gl_CooperativeMatrixLayoutColumnMajor);
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
                    FloatsOut(column_y(job, tile, tile_column(tile, column))).at[row] = result[own + at] / scale;
                }
            }
        }
        barrier();
    }
}
