// GGUF weight blocks to floats. Layouts as in ggml-common.h; the torch reference in
// kernels/dequantize/reference.py says the same thing in array form.
#pragma once

#include <cstdint>
#include <cstring>

namespace pinfer {

inline float half_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    const uint32_t magnitude = bits & 0x7fffu;
    uint32_t out = magnitude << 13;
    float value;
    std::memcpy(&value, &out, 4);
    value *= 0x1p112f;  // rebiases the exponent, subnormals included
    std::memcpy(&out, &value, 4);
    if (magnitude >= 0x7c00u) out = (magnitude << 13) | 0x7f800000u;
    out |= uint32_t(bits & 0x8000u) << 16;
    std::memcpy(&value, &out, 4);
    return value;
}

// Every type offers SIZE weights in BYTES bytes and unpack(block, SIZE floats).
struct F32 {
    static constexpr int SIZE = 1, BYTES = 4;
    static void unpack(const uint8_t* b, float* y) { std::memcpy(y, b, 4); }
};

struct F16 {
    static constexpr int SIZE = 1, BYTES = 2;
    static void unpack(const uint8_t* b, float* y) { *y = half_at(b); }
};

struct BF16 {
    static constexpr int SIZE = 1, BYTES = 2;
    static void unpack(const uint8_t* b, float* y) {
        uint16_t bits;
        std::memcpy(&bits, b, 2);
        const uint32_t wide = uint32_t(bits) << 16;
        std::memcpy(y, &wide, 4);
    }
};

struct Q8_0 {
    static constexpr int SIZE = 32, BYTES = 34;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b);
        const int8_t* q = reinterpret_cast<const int8_t*>(b + 2);
        for (int i = 0; i < 32; ++i) y[i] = d * q[i];
    }
};

struct Q4_0 {
    static constexpr int SIZE = 32, BYTES = 18;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b);
        for (int i = 0; i < 16; ++i) {
            y[i] = d * (int(b[2 + i] & 15) - 8);
            y[i + 16] = d * (int(b[2 + i] >> 4) - 8);
        }
    }
};

struct Q4_1 {
    static constexpr int SIZE = 32, BYTES = 20;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b), m = half_at(b + 2);
        for (int i = 0; i < 16; ++i) {
            y[i] = d * (b[4 + i] & 15) + m;
            y[i + 16] = d * (b[4 + i] >> 4) + m;
        }
    }
};

inline uint32_t word_at(const uint8_t* p) {
    return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

struct Q5_0 {
    static constexpr int SIZE = 32, BYTES = 22;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b);
        const uint32_t high = word_at(b + 2);
        for (int i = 0; i < 16; ++i) {
            y[i] = d * (int((b[6 + i] & 15) | ((high >> i) & 1) << 4) - 16);
            y[i + 16] = d * (int((b[6 + i] >> 4) | ((high >> (i + 16)) & 1) << 4) - 16);
        }
    }
};

struct Q5_1 {
    static constexpr int SIZE = 32, BYTES = 24;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b), m = half_at(b + 2);
        const uint32_t high = word_at(b + 4);
        for (int i = 0; i < 16; ++i) {
            y[i] = d * int((b[8 + i] & 15) | ((high >> i) & 1) << 4) + m;
            y[i + 16] = d * int((b[8 + i] >> 4) | ((high >> (i + 16)) & 1) << 4) + m;
        }
    }
};

struct Q2_K {
    static constexpr int SIZE = 256, BYTES = 84;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b + 80), dmin = half_at(b + 82);
        for (int g = 0; g < 16; ++g) {  // 16 groups of 16 weights
            const float scale = d * (b[g] & 15), minimum = dmin * (b[g] >> 4);
            const uint8_t* q = b + 16 + 32 * (g / 8) + 16 * (g & 1);
            const int shift = 2 * ((g / 2) & 3);
            for (int i = 0; i < 16; ++i) y[16 * g + i] = scale * ((q[i] >> shift) & 3) - minimum;
        }
    }
};

struct Q3_K {
    static constexpr int SIZE = 256, BYTES = 110;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b + 108);
        const uint8_t* packed = b + 96;
        for (int g = 0; g < 16; ++g) {
            const int low = (packed[g & 7] >> (4 * (g / 8))) & 15;
            const int high = (packed[8 + (g & 3)] >> (2 * (g / 4))) & 3;
            const float scale = d * ((low | high << 4) - 32);
            const uint8_t* q = b + 32 + 32 * (g / 8) + 16 * (g & 1);
            const uint8_t* mask = b + 16 * (g & 1);
            const int shift = 2 * ((g / 2) & 3), bit = g / 2;
            for (int i = 0; i < 16; ++i)
                y[16 * g + i] = scale * (int((q[i] >> shift) & 3) + 4 * int((mask[i] >> bit) & 1) - 4);
        }
    }
};

// The six-bit scale and minimum of group g (0..7) that Q4_K and Q5_K keep in 12 bytes.
inline void scale_and_minimum(const uint8_t* p, int g, int* scale, int* minimum) {
    if (g < 4) {
        *scale = p[g] & 63;
        *minimum = p[g + 4] & 63;
    } else {
        *scale = (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
        *minimum = (p[g + 4] >> 4) | (p[g] >> 6) << 4;
    }
}

struct Q4_K {
    static constexpr int SIZE = 256, BYTES = 144;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b), dmin = half_at(b + 2);
        for (int g = 0; g < 8; ++g) {
            int s, m;
            scale_and_minimum(b + 4, g, &s, &m);
            const float scale = d * s, minimum = dmin * m;
            const uint8_t* q = b + 16 + 32 * (g / 2);
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; ++i) y[32 * g + i] = scale * ((q[i] >> shift) & 15) - minimum;
        }
    }
};

struct Q5_K {
    static constexpr int SIZE = 256, BYTES = 176;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b), dmin = half_at(b + 2);
        for (int g = 0; g < 8; ++g) {
            int s, m;
            scale_and_minimum(b + 4, g, &s, &m);
            const float scale = d * s, minimum = dmin * m;
            const uint8_t* q = b + 48 + 32 * (g / 2);
            const int shift = 4 * (g & 1);
            for (int i = 0; i < 32; ++i) {
                const int value = ((q[i] >> shift) & 15) | ((b[16 + i] >> g) & 1) << 4;
                y[32 * g + i] = scale * value - minimum;
            }
        }
    }
};

struct Q6_K {
    static constexpr int SIZE = 256, BYTES = 210;
    static void unpack(const uint8_t* b, float* y) {
        const float d = half_at(b + 208);
        const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192);
        for (int g = 0; g < 16; ++g) {
            const float scale = d * scales[g];
            const int run = (g / 2) & 3;  // 32 weights a run, four runs in each half
            const uint8_t* low = b + 64 * (g / 8) + 32 * (run & 1) + 16 * (g & 1);
            const uint8_t* high = b + 128 + 32 * (g / 8) + 16 * (g & 1);
            const int low_shift = 4 * (run / 2), high_shift = 2 * run;
            for (int i = 0; i < 16; ++i) {
                const int value = ((low[i] >> low_shift) & 15) | ((high[i] >> high_shift) & 3) << 4;
                y[16 * g + i] = scale * (value - 32);
            }
        }
    }
};

// Weights [0, count) of a run that starts on a block boundary.
template <class Type>
inline void unpack_run(const uint8_t* blocks, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += Type::SIZE) Type::unpack(blocks + i / Type::SIZE * Type::BYTES, out + i);
}

using UnpackRun = void (*)(const uint8_t*, int64_t, float*);

struct Layout {
    UnpackRun unpack;
    int size, bytes;
};

template <class Type>
constexpr Layout layout_of() {
    return {unpack_run<Type>, Type::SIZE, Type::BYTES};
}

// By GGUF's type number; size 0 marks a type this core does not know.
inline Layout layout_for(int ggml_id) {
    switch (ggml_id) {
        case 0: return layout_of<F32>();
        case 1: return layout_of<F16>();
        case 2: return layout_of<Q4_0>();
        case 3: return layout_of<Q4_1>();
        case 6: return layout_of<Q5_0>();
        case 7: return layout_of<Q5_1>();
        case 8: return layout_of<Q8_0>();
        case 10: return layout_of<Q2_K>();
        case 11: return layout_of<Q3_K>();
        case 12: return layout_of<Q4_K>();
        case 13: return layout_of<Q5_K>();
        case 14: return layout_of<Q6_K>();
        case 30: return layout_of<BF16>();
        default: return {nullptr, 0, 0};
    }
}

}  // namespace pinfer
