#version 460
// Attention over the latent cache (MLA): HEADS heads of one row at a time, so that each cached row is read once for all
// of them, for scores and for values. Scores and weights of a tile of cached rows live in shared memory; sums are
// rescaled as the largest score grows (online softmax, arXiv 1805.02867). A long cache is cut into chunks, whose
// results attention_merge.comp puts together.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "shared.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint SUBGROUP = 8;
layout(constant_id = 2) const uint HEADS = 4;
// Cached rows of each invocation in a tile, and latent elements.
layout(constant_id = 3) const uint VECTORS = 1;
layout(constant_id = 4) const uint ELEMENTS = 8;

layout(push_constant, scalar) uniform PushBlock {
    AttentionPush push;
};

const uint TILE = THREADS * VECTORS;
const uint SUBGROUPS = THREADS / SUBGROUP;
const uint LANES = SUBGROUP < 16 ? 8 : 16;
const uint PARTS = 16 / LANES;

shared float weight[HEADS * TILE];
shared float largest_of[HEADS * SUBGROUPS];
shared float sum_of[HEADS * SUBGROUPS];

// Global, as arrays whose sizes are specialised cannot be parameters.
uint64_t query[HEADS];
float score[HEADS * VECTORS];

// One score for each head of each of this invocation's rows.
void scores(uint first, uint last) {
    const uint lane = gl_SubgroupInvocationID;
    uint64_t row[VECTORS];
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        const uint at = min(first + v * THREADS + gl_LocalInvocationID.x, last);
        row[v] = push.cache + uint64_t(at) * push.cache_row;
    }
    [[unroll]] for (uint i = 0; i < HEADS * VECTORS; i++) {
        score[i] = 0.0;
    }
    const uint units = (push.width + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        const uint start = unit_start(unit);
        float own[HEADS][2 * PARTS];
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            Floats from = Floats(query[h]);
            [[unroll]] for (uint j = 0; j < 2 * PARTS; j++) {
                const uint at = start + j * LANES + lane % LANES;
                own[h][j] = 0.0;
                if (at < push.width) {
                    own[h][j] = from.at[at];
                }
            }
        }
        [[unroll]] for (uint v = 0; v < VECTORS; v++) {
            const Unit u = load_unit(row[v], unit, push.width);
            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                float sum = 0.0;
                [[unroll]] for (uint i = 0; i < 32; i++) {
                    sum = fma(u.level[i], subgroupBroadcast(own[h][i / LANES], i % LANES), sum);
                }
                score[h * VECTORS + v] = fma(u.first.x, sum, score[h * VECTORS + v]);
            }
        }
    }
}

// Element `at` of the cached row at `row`.
float value(uint64_t row, uint at) {
#if FORMAT == F32
    return Floats(row).at[at];
#elif FORMAT == F16
    return from_half(uint(Halves(row).at[at]));
#else
    const uint64_t block = row + 34 * uint64_t(at / 32);
    const int level = bitfieldExtract(int(byte_at(block + 2, at % 32)), 0, 8);
    return from_half(half_word(block, 0)) * float(level);
#endif
}

void attend(uint row, uint first_head, uint chunk) {
    const uint thread = gl_LocalInvocationID.x, lane = gl_SubgroupInvocationID;
    const uint seen = Step(push.step).past + row + 1;
    const uint begin = chunk * push.chunk, end = min(seen, begin + push.chunk);
    if (begin >= seen) {
        return;
    }
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const uint head = min(first_head + h, push.heads - 1);
        query[h] = push.q + 4 * (uint64_t(row) * push.q_row + uint64_t(head) * push.q_head);
    }
    float largest[HEADS], sum[HEADS], result[HEADS * ELEMENTS];
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        largest[h] = -3.4028235e38;
        sum[h] = 0.0;
    }
    [[unroll]] for (uint i = 0; i < HEADS * ELEMENTS; i++) {
        result[i] = 0.0;
    }
    for (uint first = begin; first < end; first += TILE) {
        const uint count = min(TILE, end - first);
        scores(first, end - 1);
        barrier();
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            float own = -3.4028235e38;
            [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                const uint i = h * VECTORS + v;
                score[i] *= push.scale;
                if (v * THREADS + thread < count) {
                    own = max(own, score[i]);
                }
            }
            own = subgroupMax(own);
            if (lane == 0) {
                largest_of[h * SUBGROUPS + gl_SubgroupID] = own;
            }
        }
        barrier();
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            float now = largest[h];
            for (uint i = 0; i < SUBGROUPS; i++) {
                now = max(now, largest_of[h * SUBGROUPS + i]);
            }
            float own = 0.0;
            [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                const uint at = v * THREADS + thread;
                const float w = at < count ? exp(score[h * VECTORS + v] - now) : 0.0;
                weight[h * TILE + at] = w;
                own += w;
            }
            own = subgroupAdd(own);
            if (lane == 0) {
                sum_of[h * SUBGROUPS + gl_SubgroupID] = own;
            }
            const float shrink = exp(largest[h] - now);
            largest[h] = now;
            sum[h] *= shrink;
            [[unroll]] for (uint e = 0; e < ELEMENTS; e++) {
                result[h * ELEMENTS + e] *= shrink;
            }
        }
        barrier();
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            for (uint i = 0; i < SUBGROUPS; i++) {
                sum[h] += sum_of[h * SUBGROUPS + i];
            }
        }
        for (uint block = 0; block < count; block += LANES) {
            float own[HEADS];
            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                own[h] = weight[h * TILE + block + lane % LANES];
            }
            [[unroll]] for (uint i = 0; i < LANES; i++) {
                if (block + i < count) {
                    const uint64_t at = push.cache + uint64_t(first + block + i) * push.cache_row;
                    [[unroll]] for (uint e = 0; e < ELEMENTS; e++) {
                        const float v = value(at, min(e * THREADS + thread, push.latent - 1));
                        [[unroll]] for (uint h = 0; h < HEADS; h++) {
                            result[h * ELEMENTS + e] =
                                fma(subgroupBroadcast(own[h], i), v, result[h * ELEMENTS + e]);
                        }
                    }
                }
            }
        }
    }
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const uint head = first_head + h;
        if (head < push.heads) {
            uint64_t to;
            float divisor = 1.0;
            if (push.partial != 0) {
                const uint64_t index = (uint64_t(row) * push.heads + head) * push.chunks + chunk;
                to = push.partial + 4 * index * (push.latent + 2);
                if (thread == 0) {
                    FloatsOut(to).at[0] = largest[h];
                    FloatsOut(to).at[1] = sum[h];
                }
                to += 8;
            } else {
                to = push.y + 4 * (uint64_t(row) * push.heads + head) * push.latent;
                divisor = sum[h];
            }
            [[unroll]] for (uint e = 0; e < ELEMENTS; e++) {
                if (e * THREADS + thread < push.latent) {
                    FloatsOut(to).at[e * THREADS + thread] = result[h * ELEMENTS + e] / divisor;
                }
            }
        }
    }
}

void main() {
    const uint rows = Step(push.step).rows;
    for (uint row = gl_WorkGroupID.y; row < rows; row += gl_NumWorkGroups.y) {
        attend(row, gl_WorkGroupID.x * HEADS, gl_WorkGroupID.z);
    }
}
