#version 460
// Rows of a table, decoded.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"
#include "formats.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;

layout(push_constant, scalar) uniform PushBlock {
    EmbedPush push;
};

void main() {
    const uint rows = extent(Step(push.step), push.extent, push.fixed_count);
    for (uint row = gl_WorkGroupID.x; row < rows; row += gl_NumWorkGroups.x) {
        const uint id = min(Words(push.ids).at[row], push.vocabulary - 1);
        const uint64_t from = push.table + uint64_t(id) * push.row_bytes;
        FloatsOut to = FloatsOut(push.y + 4 * uint64_t(row) * push.width);
        for (uint i = gl_LocalInvocationID.x; i < (push.width + 31) / 32; i += THREADS) {
            const Unit unit = load_unit(from, i, push.width);
            const uint start = unit_start(i);
            [[unroll]] for (uint j = 0; j < 16; j++) {
                // Exactly as format::decode: one rounding for the product, one for the sum.
                precise float first = unit.first.x * unit.level[j];
                precise float second = unit.second.x * unit.level[16 + j];
#if HAS_OFFSET
                first += unit.first.y;
                second += unit.second.y;
#endif
                if (start + j < push.width) {
                    to.at[start + j] = first;
                }
                if (start + RUN_DISTANCE + j < push.width) {
                    to.at[start + RUN_DISTANCE + j] = second;
                }
            }
        }
    }
}
