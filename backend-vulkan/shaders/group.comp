#version 460
// Pairs of rows and choices, grouped by expert, in tiles of at most `width`: so that a matrix product reads each chosen
// expert once for many rows. The list: the number of tiles; expert, first pair and count of each; the pairs.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;

layout(push_constant, scalar) uniform PushBlock {
    GroupPush push;
};

shared uint counts[MAX_EXPERTS];
shared uint pair_start[MAX_EXPERTS];
shared uint tile_start[MAX_EXPERTS];

void main() {
    const uint pairs = extent(Step(push.step), push.extent, push.fixed_count) * push.used;
    Words ids = Words(push.ids);
    for (uint e = gl_LocalInvocationID.x; e < push.experts; e += THREADS) {
        uint count = 0;
        for (uint i = 0; i < pairs; i++) {
            count += uint(min(ids.at[i], push.experts - 1) == e);
        }
        counts[e] = count;
    }
    barrier();
    if (gl_LocalInvocationID.x == 0) {
        uint pair = 0, tile = 0;
        for (uint e = 0; e < push.experts; e++) {
            pair_start[e] = pair;
            tile_start[e] = tile;
            pair += counts[e];
            tile += (counts[e] + push.width - 1) / push.width;
        }
        WordsOut(push.order).at[0] = tile;
    }
    barrier();
    WordsOut tiles = WordsOut(push.order + 4);
    WordsOut list = WordsOut(push.order + 4 * (1 + 3 * uint64_t(push.order_tiles)));
    for (uint e = gl_LocalInvocationID.x; e < push.experts; e += THREADS) {
        uint next = pair_start[e];
        for (uint first = 0, tile = tile_start[e]; first < counts[e]; first += push.width, tile++) {
            tiles.at[3 * tile] = e;
            tiles.at[3 * tile + 1] = next + first;
            tiles.at[3 * tile + 2] = min(push.width, counts[e] - first);
        }
        for (uint i = 0; i < pairs && next < pair_start[e] + counts[e]; i++) {
            if (min(ids.at[i], push.experts - 1) == e) {
                list.at[next++] = i;
            }
        }
    }
}
