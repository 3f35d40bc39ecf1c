// The blocks of GGUF's weight types: where quants and scales lie. Layouts as in ggml-common.h; the
// torch reference in kernels/dequantize/reference.py says the same thing in array form.
//
// Every type is w = scale · (quant - OFFSET) - minimum over groups of GROUP weights, and offers
//   quants(block, out)    SIZE quants as bytes (two's complement where SIGNED), in order;
//   affine(block, s, m)   the float scale and minimum of each group; m stays unset without HAS_MIN.
// K-quants have SIZE 256 and also offer their integers, for arithmetic that stays in integers:
//   integers(block, sc, mn, d, dmin)   sixteen of each, one for each 16 weights.
#pragma once

#include "vectors.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

inline uint32_t word_at(const uint8_t* p) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 bytes as 32 quants: the low nibbles, then the high ones.
inline void nibbles(const uint8_t* b, uint8_t* q) {
    const Bytes16 v = load<Bytes16>(b);
    store(q, v & 15);
    store(q + 16, v >> 4);
}

// The same with a fifth bit each from a word.
inline void five_bits(const uint8_t* b, uint32_t high, uint8_t* q) {
    nibbles(b, q);
    const Bytes16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int half = 0; half < 2; ++half, high >>= 16) {
        const uint8_t low = uint8_t(high), up = uint8_t(high >> 8);
        const Bytes16 spread = {low, low, low, low, low, low, low, low, up, up, up, up, up, up, up, up};
        store(q + 16 * half, load<Bytes16>(q + 16 * half) | ((Bytes16)((spread & bit) == bit) & 16));
    }
}

struct Q8_0 {
    static constexpr int SIZE = 32, BLOCK_BYTES = 34, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) { std::memcpy(q, b + 2, 32); }
    static void affine(const uint8_t* b, float* s, float*) { s[0] = half_at(b); }
};

// Whether the quants are two's complement, from -127 on.
template <class Type>
constexpr bool SIGNED = false;
template <>
constexpr bool SIGNED<Q8_0> = true;

struct Q4_0 {
    static constexpr int SIZE = 32, BLOCK_BYTES = 18, GROUP = 32, OFFSET = 8;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) { nibbles(b + 2, q); }
    static void affine(const uint8_t* b, float* s, float*) { s[0] = half_at(b); }
};

struct Q4_1 {
    static constexpr int SIZE = 32, BLOCK_BYTES = 20, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = true;
    static void quants(const uint8_t* b, uint8_t* q) { nibbles(b + 4, q); }
    static void affine(const uint8_t* b, float* s, float* m) {
        s[0] = half_at(b);
        m[0] = -half_at(b + 2);
    }
};

struct Q5_0 {
    static constexpr int SIZE = 32, BLOCK_BYTES = 22, GROUP = 32, OFFSET = 16;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) { five_bits(b + 6, word_at(b + 2), q); }
    static void affine(const uint8_t* b, float* s, float*) { s[0] = half_at(b); }
};

struct Q5_1 {
    static constexpr int SIZE = 32, BLOCK_BYTES = 24, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = true;
    static void quants(const uint8_t* b, uint8_t* q) { five_bits(b + 8, word_at(b + 4), q); }
    static void affine(const uint8_t* b, float* s, float* m) {
        s[0] = half_at(b);
        m[0] = -half_at(b + 2);
    }
};

inline Groups widen(Bytes16 v) { return __builtin_convertvector(v, Groups); }

inline Bytes16 bytes16(uint64_t low, uint64_t high) {
    Bytes16 v;
    std::memcpy(&v, &low, 8);
    std::memcpy(reinterpret_cast<char*>(&v) + 8, &high, 8);
    return v;
}

// Float scales and minima of a K-quant from its integers.
template <class Type>
inline void affine_of_integers(const uint8_t* b, float* s, float* m) {
    Groups sc, mn;
    float d, dmin;
    Type::integers(b, sc, mn, d, dmin);
    constexpr int STEP = Type::GROUP / 16;
    for (int g = 0; g < 256 / Type::GROUP; ++g) {
        s[g] = d * sc[g * STEP];
        if (Type::HAS_MIN) m[g] = dmin * mn[g * STEP];
    }
}

struct Q2_K {
    static constexpr int SIZE = 256, BLOCK_BYTES = 84, GROUP = 16, OFFSET = 0;
    static constexpr bool HAS_MIN = true;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int h = 0; h < 2; ++h)
            for (int s = 0; s < 4; ++s)
                for (int i = 0; i < 32; ++i) q[128 * h + 32 * s + i] = (b[16 + 32 * h + i] >> (2 * s)) & 3;
    }
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        const Bytes16 packed = load<Bytes16>(b);
        sc = widen(packed & 15), mn = widen(packed >> 4);
        d = half_at(b + 80), dmin = half_at(b + 82);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<Q2_K>(b, s, m); }
};

struct Q3_K {
    static constexpr int SIZE = 256, BLOCK_BYTES = 110, GROUP = 16, OFFSET = 4;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int h = 0; h < 2; ++h)
            for (int s = 0; s < 4; ++s)
                for (int i = 0; i < 32; ++i)
                    q[128 * h + 32 * s + i] =
                        ((b[32 + 32 * h + i] >> (2 * s)) & 3) | ((b[i] >> (4 * h + s)) & 1) << 2;
    }
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        const uint32_t a0 = word_at(b + 96), a1 = word_at(b + 100), high = word_at(b + 104);
        const uint32_t low4 = 0x0f0f0f0f, low2 = 0x03030303;
        const uint64_t w0 = (a0 & low4) | (high & low2) << 4, w1 = (a1 & low4) | ((high >> 2) & low2) << 4;
        const uint64_t w2 = ((a0 >> 4) & low4) | ((high >> 4) & low2) << 4;
        const uint64_t w3 = ((a1 >> 4) & low4) | ((high >> 6) & low2) << 4;
        sc = widen(bytes16(w0 | w1 << 32, w2 | w3 << 32)) - 32;
        mn = sc * OFFSET;
        d = dmin = half_at(b + 108);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<Q3_K>(b, s, m); }
};

// The eight six-bit scales and minima that Q4_K and Q5_K keep in 12 bytes, each twice over.
inline void six_bits(const uint8_t* p, Groups& sc, Groups& mn) {
    const uint32_t a = word_at(p), b = word_at(p + 4), c = word_at(p + 8);
    const uint64_t scales = uint64_t(a & 0x3f3f3f3f) | uint64_t((c & 0x0f0f0f0f) | ((a >> 6) & 0x03030303) << 4) << 32;
    const uint64_t minima =
        uint64_t(b & 0x3f3f3f3f) | uint64_t(((c >> 4) & 0x0f0f0f0f) | ((b >> 6) & 0x03030303) << 4) << 32;
#if defined(__x86_64__)
    const __m128i s = _mm_cvtsi64_si128(int64_t(scales)), m = _mm_cvtsi64_si128(int64_t(minima));
    sc = widen((Bytes16)_mm_unpacklo_epi8(s, s)), mn = widen((Bytes16)_mm_unpacklo_epi8(m, m));
#else
    for (int g = 0; g < 16; ++g) {
        sc[g] = int16_t(scales >> (8 * (g / 2)) & 255);
        mn[g] = int16_t(minima >> (8 * (g / 2)) & 255);
    }
#endif
}

struct Q4_K {
    static constexpr int SIZE = 256, BLOCK_BYTES = 144, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = true;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 32; ++i) q[32 * g + i] = (b[16 + 32 * (g / 2) + i] >> (4 * (g & 1))) & 15;
    }
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        six_bits(b + 4, sc, mn);
        d = half_at(b), dmin = half_at(b + 2);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<Q4_K>(b, s, m); }
};

struct Q5_K {
    static constexpr int SIZE = 256, BLOCK_BYTES = 176, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = true;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int g = 0; g < 8; ++g)
            for (int i = 0; i < 32; ++i)
                q[32 * g + i] = ((b[48 + 32 * (g / 2) + i] >> (4 * (g & 1))) & 15) | ((b[16 + i] >> g) & 1) << 4;
    }
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        six_bits(b + 4, sc, mn);
        d = half_at(b), dmin = half_at(b + 2);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<Q5_K>(b, s, m); }
};

struct Q6_K {
    static constexpr int SIZE = 256, BLOCK_BYTES = 210, GROUP = 16, OFFSET = 32;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int h = 0; h < 2; ++h)
            for (int run = 0; run < 4; ++run)  // 32 weights a run, four runs in each half
                for (int i = 0; i < 32; ++i) {
                    const int low = (b[64 * h + 32 * (run & 1) + i] >> (4 * (run / 2))) & 15;
                    q[128 * h + 32 * run + i] = low | ((b[128 + 32 * h + i] >> (2 * run)) & 3) << 4;
                }
    }
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        typedef int8_t Signed16 __attribute__((vector_size(16)));
        sc = __builtin_convertvector(load<Signed16>(b + 192), Groups);
        mn = sc * OFFSET;
        d = dmin = half_at(b + 208);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<Q6_K>(b, s, m); }
};

// What the nibbles of IQ4_NL and IQ4_XS stand for.
alignas(16) constexpr int8_t IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// 16 bytes as the levels of 32 quants.
inline void iq4_levels(const uint8_t* b, uint8_t* q) {
    nibbles(b, q);
    for (int i = 0; i < 32; ++i) q[i] = uint8_t(IQ4_LEVELS[q[i]]);
}

struct IQ4_NL {
    static constexpr int SIZE = 32, BLOCK_BYTES = 18, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) { iq4_levels(b + 2, q); }
    static void affine(const uint8_t* b, float* s, float*) { s[0] = half_at(b); }
};

struct IQ4_XS {
    static constexpr int SIZE = 256, BLOCK_BYTES = 136, GROUP = 32, OFFSET = 0;
    static constexpr bool HAS_MIN = false;
    static void quants(const uint8_t* b, uint8_t* q) {
        for (int g = 0; g < 8; ++g) iq4_levels(b + 8 + 16 * g, q + 32 * g);
    }
    // Eight scales of six bits: four in a nibble each, two in a word.
    static void integers(const uint8_t* b, Groups& sc, Groups& mn, float& d, float& dmin) {
        uint16_t high;
        std::memcpy(&high, b + 2, 2);
        for (int g = 0; g < 8; ++g) {
            const int low = (b[4 + g / 2] >> (4 * (g & 1))) & 15;
            sc[2 * g] = sc[2 * g + 1] = int16_t((low | ((high >> (2 * g)) & 3) << 4) - 32);
        }
        mn = sc * Q8_OFFSET;
        d = dmin = half_at(b);
    }
    static void affine(const uint8_t* b, float* s, float* m) { affine_of_integers<IQ4_XS>(b, s, m); }
};

template <>
constexpr bool SIGNED<IQ4_NL> = true;
template <>
constexpr bool SIGNED<IQ4_XS> = true;

// Types of one weight a block: SIZE 1, and LANES floats at a time.
struct Float32 {
    static constexpr int SIZE = 1, BLOCK_BYTES = 4;
    static F32 at(const uint8_t* p) { return load<F32>(p); }
    static float one(const uint8_t* p) {
        float v;
        std::memcpy(&v, p, 4);
        return v;
    }
};
struct Float16 {
    static constexpr int SIZE = 1, BLOCK_BYTES = 2;
    static F32 at(const uint8_t* p) { return halves_at(p); }
    static float one(const uint8_t* p) { return half_at(p); }
};
struct BFloat16 {
    static constexpr int SIZE = 1, BLOCK_BYTES = 2;
    static F32 at(const uint8_t* p) { return bfloats_at(p); }
    static float one(const uint8_t* p) {
        uint16_t bits;
        std::memcpy(&bits, p, 2);
        const uint32_t wide = uint32_t(bits) << 16;
        float v;
        std::memcpy(&v, &wide, 4);
        return v;
    }
};

// `count` weights as floats, a multiple of SIZE, from a block's start.
template <class Type>
inline void unpack(const uint8_t* b, int64_t count, float* out) {
    if constexpr (Type::SIZE == 1) {
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) store(out + i, Type::at(b + i * Type::BLOCK_BYTES));
        for (; i < count; ++i) out[i] = Type::one(b + i * Type::BLOCK_BYTES);
    } else {
        for (int64_t i = 0; i < count; i += Type::SIZE, b += Type::BLOCK_BYTES) {
            uint8_t q[Type::SIZE];
            float s[Type::SIZE / Type::GROUP], m[Type::SIZE / Type::GROUP];
            Type::quants(b, q);
            Type::affine(b, s, m);
            for (int g = 0; g < Type::SIZE / Type::GROUP; ++g) {
                const float minimum = Type::HAS_MIN ? m[g] : 0.0f;
                for (int j = g * Type::GROUP; j < (g + 1) * Type::GROUP; ++j) {
                    const int quant = SIGNED<Type> ? int(int8_t(q[j])) : int(q[j]);
                    out[i + j] = s[g] * float(quant - Type::OFFSET) - minimum;
                }
            }
        }
    }
}

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
