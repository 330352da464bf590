#version 460
// Matrix products of many columns with integer dot products, as product_tiled.comp else: weights stay levels of 8 bits,
// activations are rounded to 8 bits as they are loaded, with a scale for each run of 16. For formats whose levels are
// integers.

#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_integer_dot_product : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;

#include "tile.glsl"

// Words of a unit, four levels each, of which either run has half; and the distance of rows in shared memory: one more, so
// that invocations side by side meet different banks.
const uint WORDS = 8;
const uint STRIDE = WORDS + 1;

shared int weight[ROWS * STRIDE];
shared int activation[COLUMNS * STRIDE];
// Of the first run scale and offset, then of the second.
shared vec4 weight_scale[ROWS];
// Of the first run the scale and what its activations add up to, then of the second.
shared vec4 activation_scale[COLUMNS];

int packed_bytes(vec4 bytes) {
    const ivec4 low = ivec4(bytes) & 0xff;
    return low.x | (low.y << 8) | (low.z << 16) | (low.w << 24);
}

void load_weights(ProductJob job, Tile tile, uint first_row, uint unit) {
    for (uint row = gl_LocalInvocationID.x; row < ROWS; row += THREADS) {
        const Packed packed = load_packed(weight_row(job, tile, first_row + row), unit, job.k);
        [[unroll]] for (uint r = 0; r < 2; r++) {
            const uvec4 bytes = signed_bytes_of(packed, r);
            [[unroll]] for (uint i = 0; i < 4; i++) {
                weight[row * STRIDE + 4 * r + i] = int(bytes[i]);
            }
        }
        weight_scale[row] = vec4(packed.first, packed.second);
    }
}

void load_activations(ProductJob job, uint unit) {
    const uint start = unit_start(unit);
    for (uint index = gl_LocalInvocationID.x; index < COLUMNS * 2; index += THREADS) {
        const uint column = index / 2, run = index % 2;
        vec4 own[4];
        vec4 largest = vec4(0.0);
        bool finite = true;
        [[unroll]] for (uint i = 0; i < 4; i++) {
            own[i] = four_floats(x[column], start + run * RUN_DISTANCE + 4 * i, job.k, FOURS != 0, false);
            largest = max(largest, abs(own[i]));
            [[unroll]] for (uint j = 0; j < 4; j++) {
                finite = finite && is_finite(own[i][j]);
            }
        }
        const float most = max(max(largest.x, largest.y), max(largest.z, largest.w));
        // What is not finite makes every output of its column NaN; max() may pass over it.
        const float scale = finite ? most / 127.0 : nan();
        // Of less than that the inverse would be infinite, and products nothing.
        const float inverse = most > 1.0e-30 ? 127.0 / most : 0.0;
        vec4 total = vec4(0.0);
        [[unroll]] for (uint i = 0; i < 4; i++) {
            const vec4 level = clamp(roundEven(own[i] * inverse), vec4(-127.0), vec4(127.0));
            total += level;
            activation[column * STRIDE + 4 * run + i] = packed_bytes(level);
        }
        activation_scale[column][2 * run] = scale;
        activation_scale[column][2 * run + 1] = scale * dot(total, vec4(1.0));
    }
}

// Adds the products of what is in shared memory.
void add_products() {
    const uint down = gl_LocalInvocationID.x % DOWN, across = gl_LocalInvocationID.x / DOWN;
    [[unroll]] for (uint run = 0; run < 2; run++) {
        int a[OWN_COLUMNS * 4];
        vec2 a_scale[OWN_COLUMNS];
        [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
            const uint column = across + c * ACROSS;
            [[unroll]] for (uint i = 0; i < 4; i++) {
                a[4 * c + i] = activation[column * STRIDE + 4 * run + i];
            }
            const vec4 scale = activation_scale[column];
            a_scale[c] = run == 0 ? scale.xy : scale.zw;
        }
        [[unroll]] for (uint r = 0; r < OWN_ROWS; r++) {
            const uint row = down + r * DOWN;
            int w[4];
            [[unroll]] for (uint i = 0; i < 4; i++) {
                w[i] = weight[row * STRIDE + 4 * run + i];
            }
            const vec4 scale = weight_scale[row];
            const vec2 w_scale = run == 0 ? scale.xy : scale.zw;
            [[unroll]] for (uint c = 0; c < OWN_COLUMNS; c++) {
                int products = 0;
                [[unroll]] for (uint i = 0; i < 4; i++) {
                    products += dotPacked4x8EXT(w[i], a[4 * c + i]);
                }
                const uint at = r * OWN_COLUMNS + c;
                sum[at] = fma(w_scale.x * a_scale[c].x, float(products), sum[at]);
#if HAS_OFFSET
                sum[at] = fma(w_scale.y, a_scale[c].y, sum[at]);
#endif
            }
        }
    }
}
