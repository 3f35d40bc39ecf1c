// Sums of scaled rows: y += Σ_r h_r · row_r, the down half of a sparse FFN and TEAL's matvec.
#pragma once

#include <type_traits>

#include "blocks.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

constexpr int RUN = 256;  // columns unpacked at a time where a type has no kernel of its own

// h_r times the halves at rows[r] + at, for four rows.
inline void factors_at(const uint8_t* const* rows, int64_t at, const float* h, float* factors) {
#if PINFER_LEVEL >= 2
    uint64_t bits = 0;  // gathered on the integer side, which has room
    for (int r = 0; r < 4; ++r) {
        uint16_t half;
        std::memcpy(&half, rows[r] + at, 2);
        bits |= uint64_t(half) << (16 * r);
    }
    _mm_storeu_ps(factors, _mm_mul_ps(_mm_loadu_ps(h), _mm_cvtph_ps(_mm_cvtsi64_si128(int64_t(bits)))));
#else
    for (int r = 0; r < 4; ++r) factors[r] = h[r] * half_at(rows[r] + at);
#endif
}

// y[0..count) += Σ over four rows; `rows` point at the first of these columns, on a block's start.
// `ahead` are the rows of the next call, which are read into the cache meanwhile.
template <class Type>
inline void add_four_rows(const uint8_t* const* rows, const uint8_t* const* ahead, const float* h, int64_t count,
                          float* y) {
    if constexpr (Type::SIZE == 1) {
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) {
            F32 sum = load<F32>(y + i);
            if (i * Type::BLOCK_BYTES % 64 == 0)
                for (int r = 0; r < 4; ++r) prefetch(ahead[r] + i * Type::BLOCK_BYTES);
            for (int r = 0; r < 4; ++r) sum += h[r] * Type::at(rows[r] + i * Type::BLOCK_BYTES);
            store(y + i, sum);
        }
        for (; i < count; ++i)
            for (int r = 0; r < 4; ++r) y[i] += h[r] * Type::one(rows[r] + i * Type::BLOCK_BYTES);
    } else if constexpr (std::is_same_v<Type, Q8_0>) {
        for (int64_t i = 0; i < count; i += 32) {
            const int64_t at = i / 32 * 34;
            float factor[4];
            factors_at(rows, at, h, factor);
            if (i % 64 == 0)
                for (int r = 0; r < 4; ++r) prefetch(ahead[r] + at);
            for (int j = 0; j < 32; j += LANES) {
                F32 sum = load<F32>(y + i + j);
                for (int r = 0; r < 4; ++r) sum += factor[r] * int8s_at(rows[r] + at + 2 + j);
                store(y + i + j, sum);
            }
        }
    } else {
        float weights[4][RUN];
        for (int64_t i = 0; i < count; i += RUN) {
            const int64_t run = smaller<int64_t>(RUN, count - i);
            for (int r = 0; r < 4; ++r) unpack<Type>(rows[r] + i / Type::SIZE * Type::BLOCK_BYTES, run, weights[r]);
            for (int64_t j = 0; j < run; ++j)
                y[i + j] += h[0] * weights[0][j] + h[1] * weights[1][j] + h[2] * weights[2][j] + h[3] * weights[3][j];
        }
    }
}

// The same for several tokens: each run of the four rows is unpacked once.
template <class Type>
inline void add_four_rows_to_many(const uint8_t* const* rows, const float* h, int64_t tokens, int64_t count, float* y,
                                  int64_t y_stride) {
    float weights[4][RUN];
    for (int64_t i = 0; i < count; i += RUN) {
        const int64_t run = smaller<int64_t>(RUN, count - i);
        for (int r = 0; r < 4; ++r) unpack<Type>(rows[r] + i / Type::SIZE * Type::BLOCK_BYTES, run, weights[r]);
        for (int64_t t = 0; t < tokens; ++t) {
            const float h0 = h[t], h1 = h[tokens + t], h2 = h[2 * tokens + t], h3 = h[3 * tokens + t];
            float* out = y + t * y_stride + i;
            for (int64_t j = 0; j < run; ++j)
                out[j] += h0 * weights[0][j] + h1 * weights[1][j] + h2 * weights[2][j] + h3 * weights[3][j];
        }
    }
}

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
