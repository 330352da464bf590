#version 460
// The results of a cache's chunks, put together: each with its largest score and the sum of its weights.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;

layout(push_constant, scalar) uniform PushBlock {
    MergePush push;
};

void main() {
    const uint rows = Step(push.step).rows * push.heads;
    for (uint row = gl_WorkGroupID.x; row < rows; row += gl_NumWorkGroups.x) {
        const uint seen = Step(push.step).past + row / push.heads + 1;
        const uint chunks = (seen + push.chunk - 1) / push.chunk;
        const uint stride = push.latent + 2;
        Floats from = Floats(push.partial + 4 * uint64_t(row) * push.chunks * stride);
        float largest = from.at[0];
        for (uint c = 1; c < chunks; c++) {
            largest = max(largest, from.at[c * stride]);
        }
        float sum = 0.0;
        for (uint c = 0; c < chunks; c++) {
            sum += from.at[c * stride + 1] * exp(from.at[c * stride] - largest);
        }
        FloatsOut to = FloatsOut(push.y + 4 * uint64_t(row) * push.latent);
        for (uint i = gl_LocalInvocationID.x; i < push.latent; i += THREADS) {
            float total = 0.0;
            for (uint c = 0; c < chunks; c++) {
                total = fma(exp(from.at[c * stride] - largest), from.at[c * stride + 2 + i], total);
            }
            to.at[i] = total / sum;
        }
    }
}
