// What every shader needs: types at addresses, and the step.
//
// All memory is reached by address (VK_KHR_buffer_device_address): no descriptor, no limit on a binding's range.
// Blocks are declared readonly or writeonly wherever they are.

#extension GL_EXT_buffer_reference : require
#extension GL_EXT_buffer_reference2 : require
#extension GL_EXT_scalar_block_layout : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_control_flow_attributes : require
#extension GL_KHR_shader_subgroup_basic : require
#extension GL_KHR_shader_subgroup_arithmetic : require
#extension GL_KHR_shader_subgroup_shuffle : require

#include "shared.glsl"

layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Floats { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) writeonly buffer FloatsOut { float at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) readonly buffer Words { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 4) writeonly buffer WordsOut { uint at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 2) readonly buffer Halves { uint16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 2) writeonly buffer HalvesOut { uint16_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 8) readonly buffer Longs { uint64_t at[]; };
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Fours { vec4 at[]; };

// The numbers of a step, first in its buffer.
layout(buffer_reference, scalar, buffer_reference_align = 16) readonly buffer Step {
    uint rows;
    uint past;
    uint outputs;
    uint kv_len;
};

// How often a dispatch repeats: a number, or an extent of the step.
uint extent(Step step, uint kind, uint fixed_count) {
    if (kind == EXTENT_ROWS) {
        return step.rows;
    }
    return kind == EXTENT_OUTPUTS ? step.outputs : fixed_count;
}

// The f16 in the lower 16 bits as f32, by its bits: `unpackHalf2x16` may make zeros of denormals, which scales of
// K-quants often are.
float from_half(uint bits) {
    const uint magnitude = bits & 0x7fffu;
    const uint shifted = (magnitude << 13) + 0x38000000u;
    // Of a denormal, as the fraction beyond 2^-14.
    const float small = uintBitsToFloat(shifted + 0x00800000u) - uintBitsToFloat(0x38800000u);
    uint all = magnitude < 0x0400u ? floatBitsToUint(small) : shifted;
    all = magnitude >= 0x7c00u ? shifted + 0x38000000u : all;
    return uintBitsToFloat(all | ((bits & 0x8000u) << 16));
}

vec2 from_halves(uint bits) {
    return vec2(from_half(bits), from_half(bits >> 16));
}

// f32 to the bits of the nearest f16, ties to even, on every driver: what too large a value becomes is `overflow`
// (infinity, or the largest finite number).
uint to_half(float value, uint overflow) {
    const uint bits = floatBitsToUint(value);
    const uint sign = (bits >> 16) & 0x8000u;
    const uint magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return sign | 0x7e00u;
    }
    if (magnitude == 0x7f800000u) {
        return sign | 0x7c00u;
    }
    uint half_bits;
    if (magnitude >= 0x38800000u) {
        half_bits = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        if (half_bits >= 0x7c00u) {
            half_bits = overflow;
        }
    } else {
        // Denormals: the mantissa, with its leading one, in units of 2^-24.
        const uint shift = 126u - (magnitude >> 23);
        if (shift > 25u) {
            return sign;
        }
        const uint mantissa = (magnitude & 0x7fffffu) | 0x800000u;
        const uint rest = mantissa & ((1u << shift) - 1u);
        const uint middle = 1u << (shift - 1u);
        half_bits = mantissa >> shift;
        if (rest > middle || (rest == middle && (half_bits & 1u) == 1u)) {
            half_bits += 1u;
        }
    }
    return sign | half_bits;
}

bool is_finite(float value) {
    return (floatBitsToUint(value) & 0x7f800000u) != 0x7f800000u;
}

bool is_nan(float value) {
    return (floatBitsToUint(value) & 0x7fffffffu) > 0x7f800000u;
}

float nan() {
    return uintBitsToFloat(0x7fc00000u);
}

// Values `at` and `at + 1` of the row of `n` at `row`; zero beyond it, if it is to be minded. Together, if all rows start
// at multiples of eight bytes, and `at` and `n` are even.
vec2 two_floats(uint64_t row, uint at, uint n, bool together, bool mind) {
    if (together) {
        uint64_t pair = 0;
        if (!mind || at < n) {
            pair = Longs(row).at[at / 2];
        }
        return uintBitsToFloat(unpackUint2x32(pair));
    }
    vec2 two = vec2(0.0);
    if (!mind || at < n) {
        two.x = Floats(row).at[at];
    }
    if (!mind || at + 1 < n) {
        two.y = Floats(row).at[at + 1];
    }
    return two;
}

// Values `at` to `at + 3`, likewise. Together, if all rows start at multiples of 16 bytes, and `at` and `n` are multiples of
// four.
vec4 four_floats(uint64_t row, uint at, uint n, bool together, bool mind) {
    vec4 four = vec4(0.0);
    if (together) {
        if (!mind || at < n) {
            four = Fours(row).at[at / 4];
        }
        return four;
    }
    [[unroll]] for (uint i = 0; i < 4; i++) {
        if (!mind || at + i < n) {
            four[i] = Floats(row).at[at + i];
        }
    }
    return four;
}
