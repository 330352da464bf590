#version 460
// A run of operations that each work row by row: one workgroup takes one row of the step through all of them, so that
// a chain of small operations costs one dispatch. Values pass between invocations through memory, with a barrier of
// the workgroup after each operation; the caller has seen to it that no row touches what another one writes.

#extension GL_GOOGLE_include_directive : require
#include "common.glsl"

layout(constant_id = 0) const uint THREADS = 64;
layout(local_size_x_id = 0) in;

// The kinds of the links, a constant each, so that a chain is a straight line of code: where shaders run on the CPU, the
// branches that are not taken cost as much as the one that is.
layout(constant_id = 1) const uint LINKS = 1;
layout(constant_id = 2) const uint KIND_0 = 0;
layout(constant_id = 3) const uint KIND_1 = 0;
layout(constant_id = 4) const uint KIND_2 = 0;
layout(constant_id = 5) const uint KIND_3 = 0;
layout(constant_id = 6) const uint KIND_4 = 0;
layout(constant_id = 7) const uint KIND_5 = 0;
layout(constant_id = 8) const uint KIND_6 = 0;
layout(constant_id = 9) const uint KIND_7 = 0;

layout(push_constant, scalar) uniform PushBlock {
    RowsPush push;
};

layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer RowOps { RowOp at[]; };

// What a chain reads may have been written by another invocation, earlier in the chain.
layout(buffer_reference, scalar, buffer_reference_align = 4) coherent readonly buffer In { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) coherent readonly buffer InWords { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 2) coherent readonly buffer InHalves { uint16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) coherent writeonly buffer Out { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) coherent writeonly buffer OutWords { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 2) coherent writeonly buffer OutHalves { uint16_t at[]; };

// Partial results of subgroups: as many as THREADS / 8 at most, subgroups having 8 invocations or more.
shared float partial[128];
shared float score[MAX_EXPERTS];
shared float probability[MAX_EXPERTS];
shared uint rejected;
shared uint chosen[MAX_EXPERTS];

float sum_of_all(float value) {
    const float own = subgroupAdd(value);
    barrier();
    if (subgroupElect()) {
        partial[gl_SubgroupID] = own;
    }
    barrier();
    float sum = 0.0;
    for (uint i = 0; i < gl_NumSubgroups; i++) {
        sum += partial[i];
    }
    return sum;
}

float max_of_all(float value) {
    const float own = subgroupMax(value);
    barrier();
    if (subgroupElect()) {
        partial[gl_SubgroupID] = own;
    }
    barrier();
    float largest = partial[0];
    for (uint i = 1; i < gl_NumSubgroups; i++) {
        largest = max(largest, partial[i]);
    }
    return largest;
}

// Elements before the innermost row `inner` of row `row`, of a tensor with these strides.
uint64_t offset_of(uvec3 strides, uint row, uint inner, uint inner_extent) {
    return uint64_t(row) * strides.x + uint64_t(inner / inner_extent) * strides.y + uint64_t(inner % inner_extent) * strides.z;
}

uint64_t address(uint64_t base, uvec3 strides, uint row, uint inner, uint inner_extent) {
    return base + 4 * offset_of(strides, row, inner, inner_extent);
}

void rms_norm(RowOp op, uint row) {
    for (uint inner = 0; inner < op.inner; inner++) {
        In x = In(address(op.a, op.a_strides, row, inner, op.inner_extent));
        Out y = Out(address(op.out0, op.out_strides, row, inner, op.inner_extent));
        In weight = In(op.b);
        float squares = 0.0;
        for (uint i = gl_LocalInvocationID.x; i < op.width; i += THREADS) {
            const float v = x.at[i];
            squares = fma(v, v, squares);
        }
        const float mean = sum_of_all(squares) / float(op.width);
        const float factor = 1.0 / sqrt(mean + op.factor);
        for (uint i = gl_LocalInvocationID.x; i < op.width; i += THREADS) {
            y.at[i] = x.at[i] * factor * weight.at[i];
        }
    }
}

// b: cosines and sines of this step, pair by pair, a row for each token.
void rope(RowOp op, uint row) {
    Floats table = Floats(op.b + 4 * uint64_t(row) * op.width);
    const uint pairs = op.width / 2;
    for (uint i = gl_LocalInvocationID.x; i < op.inner * pairs; i += THREADS) {
        const uint inner = i / pairs, pair = i % pairs;
        In x = In(address(op.a, op.a_strides, row, inner, op.inner_extent));
        Out y = Out(address(op.out0, op.out_strides, row, inner, op.inner_extent));
        const float cosine = table.at[2 * pair], sine = table.at[2 * pair + 1];
        const float even = x.at[2 * pair], odd = x.at[2 * pair + 1];
        y.at[2 * pair] = even * cosine - odd * sine;
        y.at[2 * pair + 1] = even * sine + odd * cosine;
    }
}

void swi_glu(RowOp op, uint row) {
    for (uint i = gl_LocalInvocationID.x; i < op.inner * op.width; i += THREADS) {
        const uint inner = i / op.width, j = i % op.width;
        const float gate = In(address(op.a, op.a_strides, row, inner, op.inner_extent)).at[j];
        const float up = In(address(op.b, op.b_strides, row, inner, op.inner_extent)).at[j];
        Out(address(op.out0, op.out_strides, row, inner, op.inner_extent)).at[j] = gate / (1.0 + exp(-gate)) * up;
    }
}

void add(RowOp op, uint row) {
    for (uint i = gl_LocalInvocationID.x; i < op.inner * op.width; i += THREADS) {
        const uint inner = i / op.width, j = i % op.width;
        const float a = In(address(op.a, op.a_strides, row, inner, op.inner_extent)).at[j];
        const float b = In(address(op.b, op.b_strides, row, inner, op.inner_extent)).at[j];
        Out(address(op.out0, op.out_strides, row, inner, op.inner_extent)).at[j] = a + b;
    }
}

// Words, so that NaNs keep their bits.
void concat(RowOp op, uint row) {
    const uint whole = op.width + op.width_b;
    for (uint i = gl_LocalInvocationID.x; i < op.inner * whole; i += THREADS) {
        const uint inner = i / whole, j = i % whole;
        uint value;
        if (j < op.width) {
            value = InWords(address(op.a, op.a_strides, row, inner, op.inner_extent)).at[j];
        } else {
            value = InWords(address(op.b, op.b_strides, row, inner, op.inner_extent)).at[j - op.width];
        }
        OutWords(address(op.out0, op.out_strides, row, inner, op.inner_extent)).at[j] = value;
    }
}

// b: ids; `width_b`: rows of a.
void select_rows(RowOp op, uint row, uint rows_of_a) {
    if (rows_of_a == 0) {
        return;
    }
    const uint id = min(InWords(op.b).at[row], rows_of_a - 1);
    for (uint i = gl_LocalInvocationID.x; i < op.inner * op.width; i += THREADS) {
        const uint inner = i / op.width, j = i % op.width;
        const uint value = InWords(address(op.a, op.a_strides, id, inner, op.inner_extent)).at[j];
        OutWords(address(op.out0, op.out_strides, row, inner, op.inner_extent)).at[j] = value;
    }
}

// Strides in elements of the format of each side.
void convert(RowOp op, uint row) {
    for (uint i = gl_LocalInvocationID.x; i < op.inner * op.width; i += THREADS) {
        const uint inner = i / op.width, j = i % op.width;
        const uint64_t from = offset_of(op.a_strides, row, inner, op.inner_extent) + j;
        const uint64_t to = offset_of(op.out_strides, row, inner, op.inner_extent) + j;
        const bool from_f16 = (op.flags & CAST_FROM_F16) != 0, to_f16 = (op.flags & CAST_TO_F16) != 0;
        if (from_f16 && to_f16) {
            OutHalves(op.out0 + 2 * to).at[0] = InHalves(op.a + 2 * from).at[0];
        } else if (from_f16) {
            Out(op.out0 + 4 * to).at[0] = from_half(uint(InHalves(op.a + 2 * from).at[0]));
        } else if (to_f16) {
            OutHalves(op.out0 + 2 * to).at[0] = uint16_t(to_half(In(op.a + 4 * from).at[0], 0x7c00u));
        } else {
            OutWords(op.out0 + 4 * to).at[0] = InWords(op.a + 4 * from).at[0];
        }
    }
}

// a / b, both positive, rounded to the nearest f32 as a device's own division need not be; but where the quotient or an
// operand is denormal.
float quotient(float a, float b) {
    const uint bits_a = floatBitsToUint(a), bits_b = floatBitsToUint(b);
    const uint divisor = (bits_b & 0x007fffffu) | 0x00800000u;
    const uint64_t dividend = uint64_t((bits_a & 0x007fffffu) | 0x00800000u) << 25;
    // 25 bits, or 26: 24 of the result, and what it is rounded by.
    const uint whole = uint(dividend / divisor);
    const bool more = uint64_t(whole) * divisor != dividend;
    const uint extra = whole < (1u << 25) ? 1 : 2;
    const int exponent = int(bits_a >> 23) - int(bits_b >> 23) + 125 + int(extra);
    if (exponent <= 0 || exponent >= 255 || bits_a < 0x00800000u || bits_b < 0x00800000u) {
        return a / b;
    }
    const uint kept = whole >> extra, rest = whole & ((1u << extra) - 1), middle = 1u << (extra - 1);
    const bool up = rest > middle || (rest == middle && (more || (kept & 1u) != 0));
    return uintBitsToFloat((uint(exponent) << 23) + kept - 0x00800000u + uint(up));
}

// out0: the cache, `out_strides.x` bytes a row.
void kv_store(RowOp op, uint row, uint position) {
    const uint64_t to = op.out0 + uint64_t(position) * op.out_strides.x;
    In x = In(op.a + 4 * uint64_t(row) * op.a_strides.x);
    if (op.flags == CACHE_F32) {
        for (uint i = gl_LocalInvocationID.x; i < op.width; i += THREADS) {
            Out(to).at[i] = x.at[i];
        }
    } else if (op.flags == CACHE_F16) {
        for (uint i = gl_LocalInvocationID.x; i < op.width; i += THREADS) {
            OutHalves(to).at[i] = uint16_t(to_half(x.at[i], 0x7c00u));
        }
    } else {
        // A block of 32 each, as format::BlockQ8_0 rounds.
        const uint blocks = (op.width + 31) / 32;
        for (uint block = gl_LocalInvocationID.x; block < blocks; block += THREADS) {
            const uint first = 32 * block, n = min(32u, op.width - first);
            uint largest = 0;
            for (uint i = 0; i < n; i++) {
                largest = max(largest, floatBitsToUint(x.at[first + i]) & 0x7fffffffu);
            }
            OutHalves quants = OutHalves(to + 34 * uint64_t(block));
            if (largest >= 0x7f800000u) {
                quants.at[0] = uint16_t(0x7e00u);
                for (uint i = 1; i < 17; i++) {
                    quants.at[i] = uint16_t(0);
                }
                continue;
            }
            const float size = uintBitsToFloat(largest);
            const uint d = to_half(quotient(size, 127.0), 0x7bffu);
            const float inverse = (d & 0x7fffu) == 0 ? 0.0 : quotient(127.0, size);
            quants.at[0] = uint16_t(d);
            for (uint i = 0; i < 32; i += 2) {
                const int low = i < n ? int(roundEven(x.at[first + i] * inverse)) : 0;
                const int high = i + 1 < n ? int(roundEven(x.at[first + i + 1] * inverse)) : 0;
                quants.at[1 + i / 2] = uint16_t((uint(low) & 0xffu) | ((uint(high) & 0xffu) << 8));
            }
        }
    }
}

// a: the experts' rows [used, width]; b: their weights.
void combine(RowOp op, uint row) {
    In weights = In(op.b + 4 * uint64_t(row) * op.b_strides.x);
    Out y = Out(op.out0 + 4 * uint64_t(row) * op.out_strides.x);
    for (uint i = gl_LocalInvocationID.x; i < op.width; i += THREADS) {
        float sum = 0.0;
        for (uint choice = 0; choice < op.inner; choice++) {
            In x = In(op.a + 4 * (uint64_t(row) * op.a_strides.x + uint64_t(choice) * op.a_strides.z));
            sum = fma(weights.at[choice], x.at[i], sum);
        }
        y.at[i] = sum;
    }
}

// `RouteAttributes::CLOSED`, -2^126.
const uint CLOSED = 0xfe800000u;

// a: scores [width experts]; b: bias, or 0; out0: ids, out1: weights, [inner chosen]; width_b groups, of which
// `groups_used` are open.
void route(RowOp op, uint row) {
    const uint thread = gl_LocalInvocationID.x, experts = op.width, used = op.inner;
    In scores = In(op.a + 4 * uint64_t(row) * op.a_strides.x);
    if (thread == 0) {
        rejected = 0;
    }
    float largest = 0.0, sum = 1.0;
    const bool softmax = (op.flags & ROUTE_SOFTMAX) != 0;
    if (softmax) {
        largest = scores.at[0];
        for (uint e = thread; e < experts; e += THREADS) {
            largest = max(largest, scores.at[e]);
        }
        largest = max_of_all(largest);
        float own = 0.0;
        for (uint e = thread; e < experts; e += THREADS) {
            const float p = exp(scores.at[e] - largest);
            probability[e] = p;
            own += p;
        }
        sum = sum_of_all(own);
    }
    barrier();
    for (uint e = thread; e < experts; e += THREADS) {
        const float p = softmax ? probability[e] / sum : 1.0 / (1.0 + exp(-scores.at[e]));
        const float bias = op.b == 0 ? 0.0 : In(op.b).at[e];
        // Bits of what was read, as arithmetic need not keep NaN. A bias of -inf closes an expert.
        const bool closed = floatBitsToUint(bias) == 0xff800000u;
        const float s = closed ? uintBitsToFloat(CLOSED) : (op.b == 0 ? p : p + bias);
        probability[e] = p;
        score[e] = s;
        if (is_nan(scores.at[e]) || (!closed && !is_finite(bias)) || !is_finite(s)) {
            atomicOr(rejected, 1u);
        }
    }
    barrier();
    OutWords ids = OutWords(op.out0 + 4 * uint64_t(row) * used);
    Out weights = Out(op.out1 + 4 * uint64_t(row) * used);
    if (rejected != 0) {
        for (uint i = thread; i < used; i += THREADS) {
            ids.at[i] = i;
            weights.at[i] = nan();
        }
        return;
    }
    const uint groups = op.width_b, group_len = experts / groups;
    if (groups > 1) {
        // Each group's two best, in `partial`'s stead: its sum lies where the group's number is.
        for (uint g = thread; g < groups; g += THREADS) {
            float best = score[g * group_len], second = 0.0;
            for (uint i = 1; i < group_len; i++) {
                const float s = score[g * group_len + i];
                if (i == 1) {
                    second = min(best, s);
                    best = max(best, s);
                } else {
                    second = max(second, min(best, s));
                    best = max(best, s);
                }
            }
            chosen[g] = floatBitsToUint(group_len > 1 ? best + second : best);
        }
        barrier();
        for (uint g = thread; g < groups; g += THREADS) {
            const float own = uintBitsToFloat(chosen[g]);
            uint better = 0;
            for (uint other = 0; other < groups; other++) {
                const float s = uintBitsToFloat(chosen[other]);
                better += uint(s > own || (s == own && other < g));
            }
            // Scores are finite: what is below them all is not chosen.
            if (better >= op.groups_used) {
                for (uint i = 0; i < group_len; i++) {
                    score[g * group_len + i] = uintBitsToFloat(0xff800000u);
                }
            }
        }
        barrier();
    }
    for (uint e = thread; e < experts; e += THREADS) {
        const float own = score[e];
        if (!is_finite(own)) {
            continue;
        }
        uint better = 0;
        for (uint other = 0; other < experts && better < used; other++) {
            const float s = score[other];
            if (s > own || (s == own && other < e)) {
                better++;
            }
        }
        if (better < used) {
            chosen[better] = e;
        }
    }
    barrier();
    float divisor = 1.0;
    if ((op.flags & ROUTE_RENORMALISE) != 0) {
        float total = 0.0;
        for (uint i = 0; i < used; i++) {
            total += probability[chosen[i]];
        }
        divisor = max(total, 1.0 / 16384.0);
    }
    for (uint i = thread; i < used; i += THREADS) {
        ids.at[i] = chosen[i];
        weights.at[i] = probability[chosen[i]] / divisor * op.factor;
    }
}

void link(uint index, uint kind, uint row) {
    const RowOp op = RowOps(push.table).at[index];
    Step step = Step(push.step);
    switch (kind) {
        case ROW_RMS_NORM: rms_norm(op, row); break;
        case ROW_ROPE: rope(op, row); break;
        case ROW_SWI_GLU: swi_glu(op, row); break;
        case ROW_ADD: add(op, row); break;
        case ROW_CONCAT: concat(op, row); break;
        case ROW_SELECT: select_rows(op, row, extent(step, op.flags, op.width_b)); break;
        case ROW_CAST: convert(op, row); break;
        case ROW_KV_STORE: kv_store(op, row, step.past + row); break;
        case ROW_COMBINE: combine(op, row); break;
        case ROW_ROUTE: route(op, row); break;
    }
    // Before the barrier what was written is told, after it what is read is new.
    memoryBarrierBuffer();
    barrier();
    memoryBarrierBuffer();
}

void main() {
    const uint rows = extent(Step(push.step), push.extent, push.fixed_count);
    for (uint row = gl_WorkGroupID.x; row < rows; row += gl_NumWorkGroups.x) {
        link(0, KIND_0, row);
        if (LINKS > 1) { link(1, KIND_1, row); }
        if (LINKS > 2) { link(2, KIND_2, row); }
        if (LINKS > 3) { link(3, KIND_3, row); }
        if (LINKS > 4) { link(4, KIND_4, row); }
        if (LINKS > 5) { link(5, KIND_5, row); }
        if (LINKS > 6) { link(6, KIND_6, row); }
        if (LINKS > 7) { link(7, KIND_7, row); }
    }
}
