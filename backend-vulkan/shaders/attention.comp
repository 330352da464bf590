#version 460
// Attention over the latent cache (MLA): HEADS heads of one row at a time, so that each cached row is read once for all
// of them, for scores and for values; each invocation scores cached rows of its own. Scores and weights of a tile of
// cached rows live in shared memory; sums are rescaled as the largest score grows (online softmax, arXiv 1805.02867). A
// long cache is cut into chunks, whose results attention_merge.comp puts together.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "lanes.glsl"
#include "formats.glsl"
#include "cache.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;
layout(constant_id = 1) const uint SUBGROUP = 8;
layout(constant_id = 2) const uint HEADS = 4;
// Cached rows of each invocation in a tile, and latent elements.
layout(constant_id = 3) const uint VECTORS = 1;
layout(constant_id = 4) const uint ELEMENTS = 8; // a multiple of 4

// Whether heads of the query start at multiples of eight bytes, and whether four latent elements are loaded at once.
layout(constant_id = 5) const uint PAIRS = 0;
layout(constant_id = 6) const uint FOURS = 0;

#include "attention.glsl"

const uint TILE = THREADS * VECTORS;
const uint SUBGROUPS = THREADS / SUBGROUP;
// Lanes that 16 values are spread over, two to a lane.
const uint LANES = 8;

shared float weight[HEADS * TILE];
shared float largest_of[HEADS * SUBGROUPS];
shared float sum_of[HEADS * SUBGROUPS];

// Global, as arrays whose sizes are specialised cannot be parameters.
uint64_t query[HEADS];
float score[HEADS * VECTORS];

// What the rows from `first` on are told relative to, and where one of them starts.
uint64_t cache_base(uint first) {
    return all_lanes(base_of(push.cache + uint64_t(first) * push.cache_row));
}

uint cached_row(uint64_t base, uint row) {
    return uint(push.cache + uint64_t(row) * push.cache_row - base);
}

// One score for each head of each of this invocation's rows.
void scores(uint first, uint last) {
    const uint lane = gl_SubgroupInvocationID;
    const uint64_t base = cache_base(first);
    uint row[VECTORS];
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        const uint at = min(first + v * THREADS + gl_LocalInvocationID.x, last);
        row[v] = cached_row(base, at);
    }
    [[unroll]] for (uint i = 0; i < HEADS * VECTORS; i++) {
        score[i] = 0.0;
    }
    const uint units = (push.width + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        const uint start = unit_start(unit) + 2 * (lane % LANES);
        vec2 own[2 * HEADS];
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            [[unroll]] for (uint r = 0; r < 2; r++) {
                own[2 * h + r] = two_floats(query[h], start + 16 * r, push.width, PAIRS != 0, true);
            }
        }
        Unit u[VECTORS];
        [[unroll]] for (uint v = 0; v < VECTORS; v++) {
            u[v] = load_unit(base, row[v], unit, push.width);
        }
        float part[HEADS * VECTORS];
        [[unroll]] for (uint i = 0; i < HEADS * VECTORS; i++) {
            part[i] = 0.0;
        }
        [[unroll]] for (uint i = 0; i < 32; i++) {
            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                const float q = subgroupShuffle(own[2 * h + i / 16][i % 2], i % 16 / 2);
                [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                    part[h * VECTORS + v] = fma(u[v].level[i], q, part[h * VECTORS + v]);
                }
            }
        }
        [[unroll]] for (uint h = 0; h < HEADS; h++) {
            [[unroll]] for (uint v = 0; v < VECTORS; v++) {
                score[h * VECTORS + v] = fma(u[v].first.x, part[h * VECTORS + v], score[h * VECTORS + v]);
            }
        }
    }
}

// The latent element that this invocation has as its `e`th: in fours, so that four are loaded at once.
uint element(uint e) {
    return 4 * ((e / 4) * THREADS + gl_LocalInvocationID.x) + e % 4;
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
        query[h] = all_lanes(push.q + 4 * (uint64_t(row) * push.q_row + uint64_t(head) * push.q_head));
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
        const uint64_t base = cache_base(first);
        for (uint block = 0; block < count; block += LANES) {
            float own[HEADS];
            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                own[h] = weight[h * TILE + block + lane % LANES];
            }
            [[unroll]] for (uint i = 0; i < LANES; i++) {
                if (block + i < count) {
                    const uint at = cached_row(base, first + block + i);
                    float w[HEADS];
                    [[unroll]] for (uint h = 0; h < HEADS; h++) {
                        w[h] = subgroupShuffle(own[h], i);
                    }
                    [[unroll]] for (uint e = 0; e < ELEMENTS; e += 4) {
                        const vec4 v = four_values(base, at, element(e), push.latent, FOURS != 0);
                        [[unroll]] for (uint j = 0; j < 4; j++) {
                            [[unroll]] for (uint h = 0; h < HEADS; h++) {
                                result[h * ELEMENTS + e + j] = fma(w[h], v[j], result[h * ELEMENTS + e + j]);
                            }
                        }
                    }
                }
            }
        }
    }
    [[unroll]] for (uint h = 0; h < HEADS; h++) {
        const uint head = first_head + h;
        if (head < push.heads) {
            float divisor;
            const uint64_t to = result_place(row, head, chunk, largest[h], sum[h], divisor);
            [[unroll]] for (uint e = 0; e < ELEMENTS; e++) {
                if (element(e) < push.latent) {
                    FloatsOut(to).at[element(e)] = result[h * ELEMENTS + e] / divisor;
                }
            }
        }
    }
}
