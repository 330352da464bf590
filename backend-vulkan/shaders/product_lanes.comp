#version 460
// Matrix products, a subgroup each: every lane has rows of weights of its own, and activations are handed round by
// broadcasts, so that nothing is loaded twice and nothing waits for a barrier. Best where subgroups are narrow.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "shared.glsl"
#include "formats.glsl"

// Invocations of a subgroup.
layout(constant_id = 0) const uint SUBGROUP = 8;
layout(local_size_x_id = 0) in;

// Rows of weights of each lane, and columns of activations, that are worked on at once.
layout(constant_id = 1) const uint VECTORS = 4;
layout(constant_id = 2) const uint COLUMNS = 1;

#include "product.glsl"

// Lanes that activations are spread over: a run's length at most.
const uint LANES = SUBGROUP < 16 ? 8 : 16;
const uint PARTS = 16 / LANES;

void tile(ProductJob job, uint first_row, uint columns) {
    const uint lane = gl_SubgroupInvocationID;
    uint64_t row[VECTORS];
    float sum[VECTORS * COLUMNS];
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        row[v] = weights + uint64_t(min(first_row + v * SUBGROUP + lane, job.m - 1)) * job.w_row;
    }
    [[unroll]] for (uint i = 0; i < VECTORS * COLUMNS; i++) {
        sum[i] = 0.0;
    }
    const uint units = (job.k + 31) / 32;
    for (uint unit = 0; unit < units; unit++) {
        const uint start = unit_start(unit);
        // Lane l of `own[c][j]` has value LANES j + l of the unit's two runs.
        float own[COLUMNS][2 * PARTS];
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            Floats from = Floats(x[c]);
            [[unroll]] for (uint j = 0; j < 2 * PARTS; j++) {
                const uint at = start + (j / PARTS) * RUN_DISTANCE + (j % PARTS) * LANES + lane % LANES;
                own[c][j] = 0.0;
#if PLAIN
                if (at < job.k) {
                    own[c][j] = from.at[at];
                }
#else
                own[c][j] = from.at[at];
#endif
            }
        }
#if HAS_OFFSET
        float total[COLUMNS][2];
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            float run[2] = {0.0, 0.0};
            [[unroll]] for (uint j = 0; j < 2 * PARTS; j++) {
                run[j / PARTS] += own[c][j];
            }
            total[c][0] = subgroupAdd(lane < LANES ? run[0] : 0.0);
            total[c][1] = subgroupAdd(lane < LANES ? run[1] : 0.0);
        }
#endif
        [[unroll]] for (uint v = 0; v < VECTORS; v++) {
            const Unit u = load_unit(row[v], unit, job.k);
            [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
                float first = 0.0, second = 0.0;
                [[unroll]] for (uint i = 0; i < 16; i++) {
                    first = fma(u.level[i], subgroupBroadcast(own[c][i / LANES], i % LANES), first);
                    second = fma(u.level[16 + i], subgroupBroadcast(own[c][PARTS + i / LANES], i % LANES), second);
                }
#if PLAIN
                sum[v * COLUMNS + c] += first + second;
#else
                sum[v * COLUMNS + c] = fma(u.first.x, first, fma(u.second.x, second, sum[v * COLUMNS + c]));
#if HAS_OFFSET
                sum[v * COLUMNS + c] =
                    fma(u.first.y, total[c][0], fma(u.second.y, total[c][1], sum[v * COLUMNS + c]));
#endif
#endif
            }
        }
    }
    [[unroll]] for (uint v = 0; v < VECTORS; v++) {
        const uint to = first_row + v * SUBGROUP + lane;
        [[unroll]] for (uint c = 0; c < COLUMNS; c++) {
            if (to < job.m && c < columns) {
                FloatsOut(y[c]).at[to] = sum[v * COLUMNS + c];
            }
        }
    }
}

void main() {
    const ProductJob job = find_job(gl_WorkGroupID.x);
    const uint local = gl_WorkGroupID.x - job.first_group;
    const uint tiles = (job.m + VECTORS * SUBGROUP - 1) / (VECTORS * SUBGROUP);
    const uint batch = local / tiles;
    const uint first_row = local % tiles * VECTORS * SUBGROUP;
    const uint count = column_tiles(job);
    for (uint index = gl_WorkGroupID.y; index < count; index += gl_NumWorkGroups.y) {
        const uint columns = column_tile(job, index, batch);
        if (columns > 0) {
            tile(job, first_row, columns);
        }
    }
}
