// One vocabulary of vectors for three instruction sets. LEVEL is 0 (portable), 2 (AVX2) or 512
// (AVX-512 with VNNI); the widths differ, the code above does not.
//
// A vector of quants has BYTES bytes. Its dot product with as many int8 has LANES 32-bit lanes of
// four neighbours each, so a piece of 16 bytes fills 4 lanes and belongs to one scale.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if PINFER_LEVEL >= 2
#include <immintrin.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pinfer {
namespace PINFER_NAMESPACE {

#if PINFER_LEVEL == 512
constexpr int BYTES = 64;
#elif PINFER_LEVEL == 2
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4, PIECES = BYTES / 16;

typedef uint8_t U8 __attribute__((vector_size(BYTES)));
typedef int8_t S8 __attribute__((vector_size(BYTES)));
typedef uint16_t U16 __attribute__((vector_size(BYTES)));
typedef int32_t I32 __attribute__((vector_size(BYTES)));
typedef float F32 __attribute__((vector_size(BYTES)));
typedef int16_t Groups __attribute__((vector_size(32)));  // one int16 for each 16 of 256 weights
typedef float F8 __attribute__((vector_size(32)));

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
inline void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

inline F32 splat(float v) { return v - F32{}; }
inline I32 splat(int32_t v) { return v - I32{}; }
inline U8 splat8(uint8_t v) { return v - U8{}; }
inline F32 to_float(I32 v) { return __builtin_convertvector(v, F32); }

template <class N>
inline N smaller(N a, N b) { return b < a ? b : a; }
template <class N>
inline N larger(N a, N b) { return a < b ? b : a; }

inline float sum(F32 v) {
#if PINFER_LEVEL == 512
    const F8 half = F8((__m256)_mm512_castps512_ps256((__m512)v)) + F8(_mm512_extractf32x8_ps((__m512)v, 1));
    return ((half[0] + half[4]) + (half[1] + half[5])) + ((half[2] + half[6]) + (half[3] + half[7]));
#else
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
#endif
}
inline float sum8(F8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The sums of COUNT vectors, each as `sum` adds it: four at a time they share their additions.
template <int COUNT>
inline void sums(const F32* v, float* out) {
#if PINFER_LEVEL == 512
    if constexpr (COUNT == 4) {
        __m128 quarter[4];
        for (int r = 0; r < 4; ++r) {
            const F8 half = F8((__m256)_mm512_castps512_ps256((__m512)v[r])) + F8(_mm512_extractf32x8_ps((__m512)v[r], 1));
            quarter[r] = _mm_add_ps(_mm256_castps256_ps128((__m256)half), _mm256_extractf128_ps((__m256)half, 1));
        }
        const __m128 first = _mm_hadd_ps(quarter[0], quarter[1]), then = _mm_hadd_ps(quarter[2], quarter[3]);
        _mm_storeu_ps(out, _mm_hadd_ps(first, then));
        return;
    }
#endif
    for (int r = 0; r < COUNT; ++r) out[r] = sum(v[r]);
}

// Whether a comparison holds in any lane.
inline bool any(I32 held) {
#if PINFER_LEVEL == 512
    return _mm512_test_epi32_mask((__m512i)held, (__m512i)held) != 0;
#elif PINFER_LEVEL == 2
    return !_mm256_testz_si256((__m256i)held, (__m256i)held);
#else
    int32_t all = 0;
    for (int i = 0; i < LANES; ++i) all |= held[i];
    return all != 0;
#endif
}

// A line that is wanted some thousand bytes from now: past the first-level cache.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// An fp16 number; the hardware's conversion where there is one.
inline float half_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
#if PINFER_LEVEL >= 2
    return _cvtsh_ss(bits);
#else
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
#endif
}

// LANES floats from as many halves.
inline F32 halves_at(const uint8_t* p) {
#if PINFER_LEVEL == 512
    return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif PINFER_LEVEL == 2
    return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    F32 v;
    for (int i = 0; i < LANES; ++i) v[i] = half_at(p + 2 * i);
    return v;
#endif
}

// LANES floats from as many bfloat16 numbers.
inline F32 bfloats_at(const uint8_t* p) {
#if PINFER_LEVEL == 512
    return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif PINFER_LEVEL == 2
    return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    F32 v;
    for (int i = 0; i < LANES; ++i) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, 2);
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        v[i] = value;
    }
    return v;
#endif
}

// LANES floats from as many int8.
inline F32 int8s_at(const uint8_t* p) {
#if PINFER_LEVEL == 512
    return (F32)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif PINFER_LEVEL == 2
    return (F32)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    F32 v;
    for (int i = 0; i < LANES; ++i) v[i] = float(int8_t(p[i]));
    return v;
#endif
}

// Dot products of four neighbours, quants times int8. Quants below 128 may be given as either sign;
// only VNNI takes them up to 255, which is why Q8_0 is offset there and signed elsewhere.
#if PINFER_LEVEL == 512
constexpr int Q8_OFFSET = 128;
inline I32 dot4(I32 sum, U8 w, S8 x) { return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
#elif PINFER_LEVEL == 2
constexpr int Q8_OFFSET = 0;
inline I32 dot4(I32 sum, U8 w, S8 x) {
    // The sign moves to x, which is never -128: that has no negative.
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
    return sum + (I32)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
#else
constexpr int Q8_OFFSET = 0;
inline I32 dot4(I32 sum, U8 w, S8 x) {
    const S8 s = (S8)w;
    for (int i = 0; i < LANES; ++i)
        sum[i] += s[4 * i] * x[4 * i] + s[4 * i + 1] * x[4 * i + 1] + s[4 * i + 2] * x[4 * i + 2] + s[4 * i + 3] * x[4 * i + 3];
    return sum;
}
#endif

// sum + a · scale in each lane; both must fit int16, and the scale's upper half must be zero.
inline I32 scale_add(I32 sum, I32 a, I32 scale) {
#if PINFER_LEVEL == 512
    return (I32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)scale);
#elif PINFER_LEVEL == 2
    return sum + (I32)_mm256_madd_epi16((__m256i)a, (__m256i)scale);
#else
    for (int i = 0; i < LANES; ++i) sum[i] += a[i] * int16_t(scale[i]);
    return sum;
#endif
}

// The same where `a` does not fit int16; slower.
inline I32 scale_add_wide(I32 sum, I32 a, I32 scale) { return sum + a * ((scale << 16) >> 16); }

// table[i] for each byte i < 16 of v.
inline U8 looked_up(const int8_t* table, U8 v) {
#if PINFER_LEVEL == 512
    return (U8)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), (__m512i)v);
#elif PINFER_LEVEL == 2
    return (U8)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table)), (__m256i)v);
#else
    for (int i = 0; i < BYTES; ++i) v[i] = uint8_t(table[v[i]]);
    return v;
#endif
}

// Σ over neighbouring pairs, as floats: the part of a K-quant that its minima or offset take away.
inline F8 pair_sums(Groups a, Groups b) {
#if PINFER_LEVEL >= 2
    return (F8)_mm256_cvtepi32_ps(_mm256_madd_epi16((__m256i)a, (__m256i)b));
#else
    F8 v;
    for (int i = 0; i < 8; ++i) v[i] = float(int(a[2 * i]) * b[2 * i] + int(a[2 * i + 1]) * b[2 * i + 1]);
    return v;
#endif
}

// 16 bytes from each of p, p + stride, …, side by side.
template <int STRIDE>
inline U8 pieces_at(const uint8_t* p) {
#if PINFER_LEVEL == 512
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + STRIDE)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 2 * STRIDE)), 2);
    return (U8)_mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 3 * STRIDE)), 3);
#elif PINFER_LEVEL == 2
    const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return (U8)_mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(p + STRIDE)), 1);
#else
    return load<U8>(p);
#endif
}

// The halves at p, p + stride, …, one for every PER pieces, over the lanes of those pieces.
template <int STRIDE, int PER = 1>
inline F32 scales_at(const uint8_t* p) {
    [[maybe_unused]] constexpr int COUNT = PIECES / PER;
#if PINFER_LEVEL == 512
    if constexpr (STRIDE % 2 == 0 && (COUNT - 1) * STRIDE + 2 <= 64 && COUNT * STRIDE >= 64) {
        // One load covers them all; the chunk has at least as many bytes.
        constexpr int W = STRIDE / 2;
        alignas(64) static constexpr uint16_t AT[32] = {
            0,           0,           0,           0,           (1 / PER) * W, (1 / PER) * W, (1 / PER) * W, (1 / PER) * W,
            (2 / PER) * W, (2 / PER) * W, (2 / PER) * W, (2 / PER) * W, (3 / PER) * W, (3 / PER) * W, (3 / PER) * W, (3 / PER) * W};
        const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(AT), _mm512_loadu_si512(p));
        return (F32)_mm512_cvtph_ps(_mm512_castsi512_si256(words));
    }
#endif
#if PINFER_LEVEL >= 2
    uint64_t bits = 0;
    for (int i = 0; i < COUNT; ++i) {
        uint16_t half;
        std::memcpy(&half, p + i * STRIDE, 2);
        bits |= uint64_t(half) << (16 * i);
    }
    const __m128 wide = _mm_cvtph_ps(_mm_cvtsi64_si128(int64_t(bits)));
#if PINFER_LEVEL == 512
    const __m512i lanes = _mm512_set_epi32(
        3 / PER, 3 / PER, 3 / PER, 3 / PER, 2 / PER, 2 / PER, 2 / PER, 2 / PER, 1 / PER, 1 / PER, 1 / PER, 1 / PER, 0, 0, 0, 0);
    return (F32)_mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(wide));
#else
    const __m256i lanes = _mm256_set_epi32(1 / PER, 1 / PER, 1 / PER, 1 / PER, 0, 0, 0, 0);
    return (F32)_mm256_permutevar8x32_ps(_mm256_castps128_ps256(wide), lanes);
#endif
#else
    return splat(half_at(p));
#endif
}

// exp, to about 2 units in the last place (Cody and Waite's reduction, a polynomial of degree 6).
inline F32 exponential(F32 x) {
    x = x < -87.3f ? splat(-87.3f) : x;  // NaN passes through both
    x = x > 88.3f ? splat(88.3f) : x;
    const F32 magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
    const F32 shifted = x * 1.44269504f + magic;
    const F32 n = shifted - magic;
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I32 power = ((I32)shifted - 0x4B400000 + 127) << 23;
    return p * (F32)power;
}

// tanh, to about 2 units in the last place: Cephes' polynomial near 0, where 1 - 2 / (exp(2 x) + 1) would cancel.
inline F32 hyperbolic_tangent(F32 x) {
    const F32 z = x * x, size = x < 0.0f ? -x : x;
    F32 p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const F32 far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
    return size < 0.625f ? p * z * x + x : (x < 0.0f ? -far : far);
}

// Half of erfc(z) for z >= 0, with a relative error below 1.2e-7 (Press et al., Numerical Recipes, erfcc).
inline F32 half_erfc(F32 z) {
    const F32 t = 1.0f / (1.0f + 0.5f * z);
    F32 p = splat(0.17087277f);
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    return 0.5f * t * exponential(p - z * z);
}

// g · Φ(g), Φ the normal distribution's (Hendrycks and Gimpel 2016)
inline F32 gelu(F32 g) {
    const F32 beyond = g * half_erfc((g < 0.0f ? -g : g) * 0.70710678118654752f);
    return g < 0.0f ? beyond : g - beyond;
}

enum Activation { SILU = 0, GELU_TANH = 1, RELU = 2, RELU2 = 3, DRELU = 4, GELU = 5 };

// `cutoff` is RELU's alone: up to it the activation is 0.
inline F32 activate(int kind, F32 g, float cutoff) {
    const F32 zero = {};
    switch (kind) {
        case SILU: return g / (1.0f + exponential(-g));
        // 0.5 (1 + tanh z) = 1 / (1 + exp(-2 z))
        case GELU_TANH: return g / (1.0f + exponential(g * -1.5957691216057308f * (1.0f + 0.044715f * g * g)));
        case GELU: return gelu(g);
        // NaN passes through: it must not look like an inactive neuron.
        case RELU: return g <= cutoff ? zero : g;
        case DRELU: return g < zero ? zero : g;
        default: return g < zero ? zero : g * g;
    }
}
inline float activate(int kind, float g, float cutoff) { return activate(kind, splat(g), cutoff)[0]; }

// What the up product contributes: dReLU clamps it, others take it as it is. NaN passes through.
inline F32 activate_up(int kind, F32 u) {
    const F32 zero = {};
    return kind == DRELU ? (u < zero ? zero : u) : u;
}
inline float activate_up(int kind, float u) { return kind == DRELU && u < 0.0f ? 0.0f : u; }

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
