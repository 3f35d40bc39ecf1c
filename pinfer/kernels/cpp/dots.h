// Dot products of quantised rows with activations, straight from the blocks.
//
// Activations are rounded to int8 as llama.cpp rounds them: in blocks of 32 for the 32-weight types,
// of 256 for K-quants. They are packed once in the order in which a type's quants come out of its
// bytes, so that unpacking weights takes masks and shifts and no shuffle.
#pragma once

#include "blocks.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

inline S8 shifted(U8 v, int right) { return (S8)((U16)v >> right); }
inline U8 low_nibbles(U8 v) { return v & 15; }
inline U8 high_nibbles(U8 v) { return (U8)shifted(v, 4) & 15; }

// ---- how each type's bytes become vectors of quants -------------------------------------------
//
// Scaled<Type>: 32-weight types. A chunk is BLOCKS blocks, QUANTS vectors, and one float scale per
// lane. position(block, i): where weight i of a block lies among the chunk's QUANTS · BYTES quants.

template <class Type>
struct Nibbles {  // Q4_0, Q4_1, Q5_0, Q5_1: low nibbles are weights 0–15, high ones 16–31
    static constexpr int BLOCKS = PIECES, QUANTS = 2;
    static constexpr int position(int block, int i) { return BYTES * (i / 16) + 16 * block + i % 16; }
};

template <class Type>
struct Scaled;

template <>
struct Scaled<Q4_0> : Nibbles<Q4_0> {
    static constexpr int OFFSET = 8;
    static void load(const uint8_t* p, U8* q, F32& d, F32&) {
        const U8 v = pieces_at<18>(p + 2);
        q[0] = low_nibbles(v), q[1] = high_nibbles(v);
        d = scales_at<18>(p);
    }
};

template <>
struct Scaled<Q4_1> : Nibbles<Q4_1> {
    static constexpr int OFFSET = 0;
    static void load(const uint8_t* p, U8* q, F32& d, F32& m) {
        const U8 v = pieces_at<20>(p + 4);
        q[0] = low_nibbles(v), q[1] = high_nibbles(v);
        d = scales_at<20>(p), m = scales_at<20>(p + 2);
    }
};

// Bytes of 16 where a bit of `bits` is set, else 0; bit i is byte i's.
inline U8 fifth_bits(const uint16_t* bits) {
#if PINFER_LEVEL == 512
    uint64_t mask = 0;
    for (int i = 0; i < PIECES; ++i) mask |= uint64_t(bits[i]) << (16 * i);
    return (U8)_mm512_maskz_mov_epi8(mask, _mm512_set1_epi8(16));
#elif PINFER_LEVEL == 2
    const __m256i words = _mm256_set_m128i(_mm_set1_epi16(int16_t(bits[1])), _mm_set1_epi16(int16_t(bits[0])));
    const __m128i half = _mm_set_epi64x(0x0101010101010101, 0);  // the low byte for eight bytes, then the high one
    const __m256i spread = _mm256_shuffle_epi8(words, _mm256_set_m128i(half, half));
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    return (U8)_mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit), _mm256_set1_epi8(16));
#else
    U8 out;
    for (int i = 0; i < BYTES; ++i) out[i] = uint8_t(((bits[i / 16] >> (i % 16)) & 1) << 4);
    return out;
#endif
}

template <int STRIDE, int HIGH_AT>
inline void load_five_bits(const uint8_t* p, U8* q) {
    const U8 v = pieces_at<STRIDE>(p + HIGH_AT + 4);
    uint16_t low[PIECES], high[PIECES];
    for (int i = 0; i < PIECES; ++i) {
        std::memcpy(&low[i], p + i * STRIDE + HIGH_AT, 2);
        std::memcpy(&high[i], p + i * STRIDE + HIGH_AT + 2, 2);
    }
    q[0] = low_nibbles(v) | fifth_bits(low);
    q[1] = high_nibbles(v) | fifth_bits(high);
}

template <>
struct Scaled<Q5_0> : Nibbles<Q5_0> {
    static constexpr int OFFSET = 16;
    static void load(const uint8_t* p, U8* q, F32& d, F32&) {
        load_five_bits<22, 2>(p, q);
        d = scales_at<22>(p);
    }
};

template <>
struct Scaled<Q5_1> : Nibbles<Q5_1> {
    static constexpr int OFFSET = 0;
    static void load(const uint8_t* p, U8* q, F32& d, F32& m) {
        load_five_bits<24, 4>(p, q);
        d = scales_at<24>(p), m = scales_at<24>(p + 2);
    }
};

template <>
struct Scaled<Q8_0> {
    static constexpr int BLOCKS = PIECES == 1 ? 1 : PIECES / 2, QUANTS = PIECES == 1 ? 2 : 1, OFFSET = Q8_OFFSET;
    static constexpr int position(int block, int i) { return 32 * block + i; }
    static void load(const uint8_t* p, U8* q, F32& d, F32&) {
#if PINFER_LEVEL == 512
        const __m512i v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(p + 2)));
        const __m512i both = _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i*)(p + 36)), 1);
        q[0] = (U8)both ^ 0x80;  // + 128
        d = scales_at<34, 2>(p);
#else
        for (int i = 0; i < QUANTS; ++i) q[i] = pinfer::PINFER_NAMESPACE::load<U8>(p + 2 + i * BYTES);
        d = splat(half_at(p));
#endif
    }
};

// Levels raised by what dot4 wants of quants that are signed.
inline U8 iq4_levels_of(U8 nibbles) { return looked_up(IQ4_LEVELS, nibbles) ^ splat8(Q8_OFFSET); }

template <>
struct Scaled<IQ4_NL> : Nibbles<IQ4_NL> {
    static constexpr int OFFSET = Q8_OFFSET;
    static void load(const uint8_t* p, U8* q, F32& d, F32&) {
        const U8 v = pieces_at<18>(p + 2);
        q[0] = iq4_levels_of(low_nibbles(v)), q[1] = iq4_levels_of(high_nibbles(v));
        d = scales_at<18>(p);
    }
};

// Integral<Type>: K-quants. A chunk is one block of 256 weights in 256 / BYTES vectors; weight_at says
// which weight each byte is. Scales stay integers until the block's end.
constexpr int K_VECTORS = 256 / BYTES;

template <class Type>
struct Integral;

template <>
struct Integral<Q4_K> {
    static constexpr int weight_at(int vector, int byte) {
        const int p = vector / 2 * BYTES + byte;
        return p / 32 * 64 + 32 * (vector & 1) + p % 32;
    }
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 2; ++i) {
            const U8 v = pinfer::PINFER_NAMESPACE::load<U8>(b + 16 + i * BYTES);
            q[2 * i] = low_nibbles(v), q[2 * i + 1] = high_nibbles(v);
        }
    }
};

// The bytes b[0..32) as often as they fit a vector, or the vector's part of them.
inline U8 thirty_two(const uint8_t* b, int part) {
#if PINFER_LEVEL == 512
    return (U8)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)b));
#else
    return load<U8>(b + part * BYTES % 32);
#endif
}

// Shift counts for 16-bit lanes: `first` for the first 32 bytes of a 64-byte vector, else `then`.
inline U16 counts(int first, int then) {
    U16 v;
    for (int i = 0; i < BYTES / 2; ++i) v[i] = uint16_t(i < 16 ? first : then);
    return v;
}

template <>
struct Integral<Q5_K> {
    static constexpr int weight_at(int vector, int byte) { return Integral<Q4_K>::weight_at(vector, byte); }
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 2; ++i) {
            const U8 v = pinfer::PINFER_NAMESPACE::load<U8>(b + 48 + i * BYTES);
            const U16 high = (U16)thirty_two(b + 16, i);
            const int group = i * BYTES / 32 * 2;  // of the vector's first byte; the next 32 are two on
            q[2 * i] = low_nibbles(v) | ((U8)(high >> counts(group, group + 2)) & 1) << 4;
            q[2 * i + 1] = high_nibbles(v) | ((U8)(high >> counts(group + 1, group + 3)) & 1) << 4;
        }
    }
};

template <>
struct Integral<Q6_K> {
    static constexpr int PER_HALF = 64 / BYTES;  // vectors of low bits in each half
    static constexpr int weight_at(int vector, int byte) {
        const int pair = vector / 2, p = pair % PER_HALF * BYTES + byte;
        return 128 * (pair / PER_HALF) + 64 * (vector & 1) + p;
    }
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 2; ++i) {
            const int half = i / PER_HALF, at = i % PER_HALF * BYTES;
            const U8 low = pinfer::PINFER_NAMESPACE::load<U8>(b + 64 * half + at);
            const U16 high = (U16)thirty_two(b + 128 + 32 * half, i);
            const int run = at / 32;  // its two bits lie 2 · run up; 4 more for the high nibbles
            q[2 * i] = low_nibbles(low) | ((U8)(high << counts(4 - 2 * run, 2 - 2 * run)) & 0x30);
            q[2 * i + 1] = high_nibbles(low) | ((U8)(high >> counts(2 * run, 2 * run + 2)) & 0x30);
        }
    }
};

struct TwoBits {  // Q2_K, Q3_K: 64 bytes, four weights each, 32 apart
    static constexpr int weight_at(int vector, int byte) {
        const int p = vector / 4 * BYTES + byte;
        return 128 * (p / 32) + 32 * (vector & 3) + p % 32;
    }
};

template <>
struct Integral<Q2_K> : TwoBits {
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 4; ++i) {
            const U8 v = pinfer::PINFER_NAMESPACE::load<U8>(b + 16 + i * BYTES);
            for (int s = 0; s < 4; ++s) q[4 * i + s] = (U8)shifted(v, 2 * s) & 3;
        }
    }
};

template <>
struct Integral<Q3_K> : TwoBits {
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 4; ++i) {
            const U8 v = pinfer::PINFER_NAMESPACE::load<U8>(b + 32 + i * BYTES);
            const U16 high = (U16)thirty_two(b, i);
            const int half = i * BYTES / 32;
            for (int s = 0; s < 4; ++s) {
                const U8 bit = (U8)(high >> counts(4 * half + s, 4 * half + 4 + s)) & 1;
                q[4 * i + s] = ((U8)shifted(v, 2 * s) & 3) | bit << 2;
            }
        }
    }
};

template <>
struct Integral<IQ4_XS> {  // 16 bytes a group: low nibbles are its weights 0–15, high ones 16–31
    static constexpr int weight_at(int vector, int byte) {
        const int p = vector / 2 * BYTES + byte;
        return p / 16 * 32 + 16 * (vector & 1) + p % 16;
    }
    static void load(const uint8_t* b, U8* q) {
        for (int i = 0; i < K_VECTORS / 2; ++i) {
            const U8 v = pinfer::PINFER_NAMESPACE::load<U8>(b + 8 + i * BYTES);
            q[2 * i] = iq4_levels_of(low_nibbles(v)), q[2 * i + 1] = iq4_levels_of(high_nibbles(v));
        }
    }
};

// ---- packed activations ------------------------------------------------------------------------

template <class Type>
struct ScaledPack {  // one chunk
    S8 q[Scaled<Type>::QUANTS];
    F32 d;  // the block's scale, in its lanes
    // What the offset takes from a lane, or (types with a minimum) what the minimum multiplies.
    F32 correction;
};

struct IntegralPack {  // 256 weights
    alignas(64) S8 q[K_VECTORS];
    Groups sums;  // of each 16 neighbours
    float d;
};

template <class Type>
constexpr bool IS_K = Type::SIZE == 256;

// Bytes of a packed token of `columns` activations, a multiple of 64.
template <class Type>
inline int64_t pack_bytes(int64_t columns) {
    if constexpr (IS_K<Type>) {
        return columns / 256 * int64_t(sizeof(IntegralPack));
    } else {
        const int64_t chunk = 32 * Scaled<Type>::BLOCKS;
        return (columns + chunk - 1) / chunk * int64_t(sizeof(ScaledPack<Type>));
    }
}

// Rounds COUNT activations to int8 by their largest magnitude; returns the scale.
template <int COUNT>
inline float round_block(const float* x, int8_t* q) {
    float peak = 0;
    for (int i = 0; i < COUNT; ++i) {
        const float v = __builtin_fabsf(x[i]);
        peak = v > peak || v != v ? v : peak;  // a NaN must not vanish
    }
    const float d = peak / 127.0f, inverse = peak != 0 ? 127.0f / peak : 0.0f;
    if (!(peak < 1e30f) || inverse > 1e38f) {  // too large to add up, infinite, NaN, or too small to divide by
        for (int i = 0; i < COUNT; ++i) q[i] = peak < 1e30f ? 0 : 1;
        return peak < 1e30f ? 0.0f : __builtin_nanf("");
    }
    for (int i = 0; i < COUNT; ++i) {
        const float magic = 12582912.0f;  // adding 1.5 · 2^23 rounds to the nearest, ties to even
        const float shifted = x[i] * inverse + magic;
        int32_t bits;
        std::memcpy(&bits, &shifted, 4);
        q[i] = int8_t(bits - 0x4B400000);
    }
    return d;
}

// Chunks [first, last) of one token's pack.
template <class Type>
inline void pack(const float* x, int64_t columns, int64_t first, int64_t last, uint8_t* out) {
    if constexpr (IS_K<Type>) {
        for (int64_t c = first; c < last; ++c) {
            IntegralPack& p = reinterpret_cast<IntegralPack*>(out)[c];
            int8_t q[256];
            p.d = round_block<256>(x + 256 * c, q);
            for (int g = 0; g < 16; ++g) {
                int total = 0;
                for (int i = 0; i < 16; ++i) total += q[16 * g + i];
                p.sums[g] = int16_t(total);
            }
            for (int i = 0; i < 256; i += 16)
                std::memcpy(reinterpret_cast<char*>(p.q) + i, q + Integral<Type>::weight_at(i / BYTES, i % BYTES), 16);
        }
    } else {
        using Layout = Scaled<Type>;
        constexpr int WEIGHTS = 32 * Layout::BLOCKS;
        for (int64_t c = first; c < last; ++c) {
            ScaledPack<Type>& p = reinterpret_cast<ScaledPack<Type>*>(out)[c];
            alignas(64) int8_t q[WEIGHTS] = {};
            alignas(64) float scale[Layout::BLOCKS] = {};
            alignas(64) int8_t turned[WEIGHTS];
            for (int b = 0; b < Layout::BLOCKS; ++b) {
                const int64_t at = c * WEIGHTS + 32 * b;
                if (at < columns) scale[b] = round_block<32>(x + at, q + 32 * b);
                for (int i = 0; i < 32; i += 16) std::memcpy(turned + Layout::position(b, i), q + 32 * b + i, 16);
            }
            std::memcpy(p.q, turned, WEIGHTS);
            for (int lane = 0; lane < LANES; ++lane) {
                int total = 0;
                for (int v = 0; v < Layout::QUANTS; ++v)
                    for (int i = 0; i < 4; ++i) total += turned[v * BYTES + 4 * lane + i];
                const float d = scale[lane * Layout::BLOCKS / LANES];
                p.d[lane] = d;
                p.correction[lane] = Type::HAS_MIN ? d * float(total) : -d * float(Layout::OFFSET * total);
            }
        }
    }
}

// ---- R rows at a time ----------------------------------------------------------------------------

//
// All read `ahead`, the rows of the next call, into the cache line by line as they go through theirs:
// gathered rows are pages apart, where the hardware's own prefetching stops.

// A row may end within a chunk, as a predictor's short rows do. Its last chunk is then read on into what
// follows it, with scales of 0, as long as that lies before `end`, where the matrix ends: padding it first
// cost such a row three times its dot, for loads across fresh stores.
template <class Type, int R>
inline void dot_scaled(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns, const uint8_t* packed,
                       const uint8_t* end, float* out) {
    using Layout = Scaled<Type>;
    constexpr int64_t STEP = Layout::BLOCKS * Type::BLOCK_BYTES;
    const int64_t blocks = columns / 32, chunks = blocks / Layout::BLOCKS;
    const auto* x = reinterpret_cast<const ScaledPack<Type>*>(packed);
    F32 total[R] = {};
    auto add = [&](const uint8_t* p, const ScaledPack<Type>& c, I32 keep, F32& sum) {
        U8 q[Layout::QUANTS];
        F32 d, m;
        Layout::load(p, q, d, m);
        d = (F32)((I32)d & keep);
        if constexpr (Type::HAS_MIN) m = (F32)((I32)m & keep);
        I32 dot = {};
        for (int v = 0; v < Layout::QUANTS; ++v) dot = dot4(dot, q[v], c.q[v]);
        if constexpr (Type::HAS_MIN) {
            sum += d * (to_float(dot) * c.d);
            sum += m * c.correction;
        } else if constexpr (Layout::OFFSET != 0) {
            sum += d * (to_float(dot) * c.d + c.correction);
        } else {
            sum += d * (to_float(dot) * c.d);
        }
    };
    for (int64_t c = 0; c < chunks; ++c) {
        for (int r = 0; r < R; ++r) {
            prefetch(ahead[r] + c * STEP);
            add(rows[r] + c * STEP, x[c], ~I32{}, total[r]);
        }
    }
    if (const int64_t rest = blocks % Layout::BLOCKS) {
        constexpr int64_t SPAN = STEP < 64 ? 64 : STEP;
        I32 keep;
        for (int lane = 0; lane < LANES; ++lane) keep[lane] = lane * Layout::BLOCKS / LANES < rest ? -1 : 0;
        for (int r = 0; r < R; ++r) {
            const uint8_t* p = rows[r] + chunks * STEP;
            if (end - p >= SPAN) {
                add(p, x[chunks], keep, total[r]);
            } else {
                uint8_t padded[SPAN] = {};
                std::memcpy(padded, p, size_t(rest * Type::BLOCK_BYTES));
                add(padded, x[chunks], keep, total[r]);
            }
        }
    }
    sums<R>(total, out);
}

// A group's scale in the four lanes of each of its pieces, for vector v of a block.
template <class Type>
struct LaneScales {
#if PINFER_LEVEL == 512
    __m512i scales;
    struct Table {
        alignas(64) uint16_t at[K_VECTORS][32] = {};
        constexpr Table() {
            for (int v = 0; v < K_VECTORS; ++v)
                for (int i = 0; i < 32; ++i)  // 16 is a zero beyond the scales
                    at[v][i] = uint16_t(i % 2 ? 16 : Integral<Type>::weight_at(v, 2 * i) / 16);
        }
    };
    static constexpr Table TABLE{};
    explicit LaneScales(Groups sc) : scales(_mm512_zextsi256_si512((__m256i)sc)) {}
    I32 of(int v) const { return (I32)_mm512_permutexvar_epi16(_mm512_load_si512(TABLE.at[v]), scales); }
#else
    int16_t scales[16];
    explicit LaneScales(const Groups& sc) { std::memcpy(scales, &sc, 32); }
    I32 of(int v) const {
        I32 out;
        for (int i = 0; i < LANES; ++i) out[i] = uint16_t(scales[Integral<Type>::weight_at(v, 4 * i) / 16]);
        return out;
    }
#endif
};

template <class Type, int R>
inline void dot_integral(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns,
                         const uint8_t* packed, float* out) {
    const auto* x = reinterpret_cast<const IntegralPack*>(packed);
    F32 total[R] = {};
    F8 taken[R] = {};
    for (int64_t c = 0; c < columns / 256; ++c) {
        for (int r = 0; r < R; ++r) {
            const uint8_t* b = rows[r] + c * Type::BLOCK_BYTES;
            for (int i = 0; i < Type::BLOCK_BYTES; i += 64) prefetch(ahead[r] + c * Type::BLOCK_BYTES + i);
            U8 q[K_VECTORS];
            Groups sc, mn;
            float d, dmin;
            Integral<Type>::load(b, q);
            Type::integers(b, sc, mn, d, dmin);
            const LaneScales<Type> scales(sc);
            I32 dot = {};
            for (int v = 0; v < K_VECTORS; ++v) {
                const I32 four = dot4(I32{}, q[v], x[c].q[v]);
                dot = SIGNED<Type> ? scale_add_wide(dot, four, scales.of(v)) : scale_add(dot, four, scales.of(v));
            }
            total[r] += to_float(dot) * (d * x[c].d);
            taken[r] += pair_sums(mn, x[c].sums) * (dmin * x[c].d);
        }
    }
    sums<R>(total, out);
    for (int r = 0; r < R; ++r) out[r] -= sum8(taken[r]);
}

template <class Type, int R>
inline void dot_packed(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns, const uint8_t* packed,
                       const uint8_t* end, float* out) {
    if constexpr (IS_K<Type>) dot_integral<Type, R>(rows, ahead, columns, packed, out);
    else dot_scaled<Type, R>(rows, ahead, columns, packed, end, out);
}

// Float activations: types of one weight a block as they are, others unpacked 256 at a time.
template <class Type, int R>
inline void dot_float(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns, const float* x,
                      float* out) {
    F32 total[R][2] = {};
    float rest[R] = {};
    auto add = [&](auto weight_at, auto one_at, int64_t at, int64_t count) {
        int64_t i = 0;
        for (; i + 2 * LANES <= count; i += 2 * LANES) {
            const F32 x0 = load<F32>(x + at + i), x1 = load<F32>(x + at + i + LANES);
            for (int r = 0; r < R; ++r) {
                constexpr int STEP = 2 * LANES * Type::BLOCK_BYTES;
                if (Type::SIZE == 1)
                    for (int j = 0; j < STEP; j += 64) prefetch(ahead[r] + i * Type::BLOCK_BYTES + j);
                total[r][0] += weight_at(r, i) * x0;
                total[r][1] += weight_at(r, i + LANES) * x1;
            }
        }
        for (; i < count; ++i)
            for (int r = 0; r < R; ++r) rest[r] += one_at(r, i) * x[at + i];
    };
    if constexpr (Type::SIZE == 1) {
        add([&](int r, int64_t i) { return Type::at(rows[r] + i * Type::BLOCK_BYTES); },
            [&](int r, int64_t i) { return Type::one(rows[r] + i * Type::BLOCK_BYTES); }, 0, columns);
    } else {
        constexpr int RUN = 256;
        float weights[R][RUN];
        for (int64_t at = 0; at < columns; at += RUN) {
            const int64_t count = smaller<int64_t>(RUN, columns - at);
            for (int r = 0; r < R; ++r) unpack<Type>(rows[r] + at / Type::SIZE * Type::BLOCK_BYTES, count, weights[r]);
            add([&](int r, int64_t i) { return load<F32>(weights[r] + i); },
                [&](int r, int64_t i) { return weights[r][i]; }, at, count);
        }
    }
    F32 both[R];
    for (int r = 0; r < R; ++r) both[r] = total[r][0] + total[r][1];
    sums<R>(both, out);
    for (int r = 0; r < R; ++r) out[r] += rest[r];
}

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
