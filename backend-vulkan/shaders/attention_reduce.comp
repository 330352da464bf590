#version 460
// Attention over the latent cache, as in attention.comp, with lanes along cached rows, so that neighbours read what lies
// side by side. A subgroup loads a few rows to registers, for HEADS heads, once for scores and values; it has sums of its
// own, rescaled as its largest score grows, and those of all subgroups meet at the end.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"
#include "cache.glsl"

layout(constant_id = 0) const uint THREADS = 128;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint SUBGROUP = 32;
layout(constant_id = 2) const uint HEADS = 4;
// Cached rows of each subgroup at once.
layout(constant_id = 3) const uint ROWS = 2;
// What each lane has of a row, in fours, and of its latent elements.
layout(constant_id = 4) const uint ROW_FOURS = 5;
layout(constant_id = 5) const uint LATENT_FOURS = 4;

// Whether elements of the query are loaded four at a time, and those of the cache.
layout(constant_id = 6) const uint QUERY_FOURS = 0;
layout(constant_id = 7) const uint FOURS = 0;

#include "attention.glsl"

const uint SUBGROUPS = THREADS / SUBGROUP;
const uint LATENT = 4 * LATENT_FOURS * SUBGROUP;
const float LOWEST = -3.4028235e38;

shared float largest_of[SUBGROUPS * HEADS];
shared float sum_of[SUBGROUPS * HEADS];
shared vec4 merged[HEADS * LATENT / 4];

void attend(uint row, uint first_head, uint chunk) {
    const uint thread = gl_LocalInvocationID.x, lane = gl_SubgroupInvocationID;
    const uint seen = Step(push.step).past + row + 1;
    const uint begin = chunk * push.chunk, end = min(seen, begin + push.chunk);
    if (begin >= seen) {
        return;
    }
    vec4 query[HEADS * ROW_FOURS], result[HEADS * LATENT_FOURS];
    float largest[HEADS], sum[HEADS];
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const uint head = min(first_head + h, push.heads - 1);
        const uint64_t from = push.q + 4 * (uint64_t(row) * push.q_row + uint64_t(head) * push.q_head);
        [[unroll]] for (uint i = 0; i < ROW_FOURS; i++) {
            query[h * ROW_FOURS + i] =
                push.scale * four_floats(from, 4 * (i * SUBGROUP + lane), push.width, QUERY_FOURS != 0, true);
        }
        [[unroll]] for (uint i = 0; i < LATENT_FOURS; i++) {
            result[h * LATENT_FOURS + i] = vec4(0.0);
        }
        largest[h] = LOWEST;
        sum[h] = 0.0;
    }
    for (uint first = begin + gl_SubgroupID * ROWS; first < end; first += SUBGROUPS * ROWS) {
        vec4 values[ROWS * ROW_FOURS];
        [[unroll]] for (uint v = 0; v < ROWS; v++) {
            const uint64_t from = push.cache + uint64_t(min(first + v, end - 1)) * push.cache_row;
            [[unroll]] for (uint i = 0; i < ROW_FOURS; i++) {
                values[v * ROW_FOURS + i] =
                    four_values(from, 0, 4 * (i * SUBGROUP + lane), push.width, FOURS != 0);
            }
        }
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            float score[ROWS];
            float now = largest[h];
            [[unroll]] for (uint v = 0; v < ROWS; v++) {
                vec4 products = vec4(0.0);
                [[unroll]] for (uint i = 0; i < ROW_FOURS; i++) {
                    products = fma(query[h * ROW_FOURS + i], values[v * ROW_FOURS + i], products);
                }
                score[v] = subgroupAdd(products.x + products.y + products.z + products.w);
                now = max(now, score[v]);
            }
            const float shrink = exp(largest[h] - now);
            largest[h] = now;
            sum[h] *= shrink;
            [[unroll]] for (uint i = 0; i < LATENT_FOURS; i++) {
                result[h * LATENT_FOURS + i] *= shrink;
            }
            [[unroll]] for (uint v = 0; v < ROWS; v++) {
                // Past the end the last row was scored again.
                if (first + v < end) {
                    const float weight = exp(score[v] - now);
                    sum[h] += weight;
                    [[unroll]] for (uint i = 0; i < LATENT_FOURS; i++) {
                        const uint at = h * LATENT_FOURS + i;
                        result[at] = fma(vec4(weight), values[v * ROW_FOURS + i], result[at]);
                    }
                }
            }
        }
    }
    // What comes of the row before has been read.
    barrier();
    if (lane == 0) {
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            largest_of[gl_SubgroupID * HEADS + h] = largest[h];
            sum_of[gl_SubgroupID * HEADS + h] = sum[h];
        }
    }
    barrier();
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        float overall = LOWEST, all = 0.0;
        for (uint i = 0; i < SUBGROUPS; i++) {
            overall = max(overall, largest_of[i * HEADS + h]);
        }
        for (uint i = 0; i < SUBGROUPS; i++) {
            all += sum_of[i * HEADS + h] * exp(largest_of[i * HEADS + h] - overall);
        }
        const float shrink = exp(largest[h] - overall);
        [[unroll]] for (uint i = 0; i < LATENT_FOURS; i++) {
            result[h * LATENT_FOURS + i] *= shrink;
        }
        largest[h] = overall;
        sum[h] = all;
    }
    // In order, so that a step repeats itself to the bit.
    for (uint turn = 0; turn < SUBGROUPS; turn++) {
        if (turn == gl_SubgroupID) {
            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                [[unroll]] for (uint i = 0; i < LATENT_FOURS; i++) {
                    const uint at = (h * LATENT_FOURS + i) * SUBGROUP + lane;
                    const vec4 own = result[h * LATENT_FOURS + i];
                    merged[at] = turn == 0 ? own : merged[at] + own;
                }
            }
        }
        barrier();
    }
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const uint head = first_head + h;
        if (head < push.heads) {
            float divisor;
            const uint64_t to = result_place(row, head, chunk, largest[h], sum[h], divisor);
            for (uint i = thread; i < push.latent; i += THREADS) {
                FloatsOut(to).at[i] = merged[h * LATENT / 4 + i / 4][i % 4] / divisor;
            }
        }
    }
}
