// Many tokens at once: panels of LANES rows are unpacked to bytes and met by every token in turn.
//
// In a panel 32-bit lane r holds four neighbours of row r, so one instruction multiplies them for
// all rows with four activations of one token. Scales apply once per group of 16 or 32 weights.
#pragma once

#include "abi.h"
#include "dots.h"
#include "team.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

constexpr int64_t PANEL_COLUMNS = 512;  // 8 KB of quants at 16 rows: a panel stays in L1
constexpr int TOKEN_TILE = 8;

template <class Type>
constexpr int PANEL_OFFSET = SIGNED<Type> ? Q8_OFFSET : Type::OFFSET;

// Tokens rounded to int8, TOKEN_TILE side by side: four neighbours of one token, then of the next, so
// that a tile's inputs to an instruction lie together. A last tile that is not full is padded with
// zeros. `taken` is what a type's offset takes from each group, or what its minimum multiplies.
struct RoundedTokens {
    int32_t* q;    // [tiles, columns / 4, TOKEN_TILE]
    float* scale;  // [tiles, columns / 32, TOKEN_TILE]
    float* taken;  // [tiles, columns / GROUP, TOKEN_TILE]
    int64_t columns;

    RoundedTokens(uint8_t* memory, int64_t tokens, int64_t columns) : columns(columns) {
        const int64_t padded = (tokens + TOKEN_TILE - 1) / TOKEN_TILE * TOKEN_TILE;
        q = reinterpret_cast<int32_t*>(memory);
        scale = reinterpret_cast<float*>(q + padded * (columns / 4));
        taken = scale + padded * (columns / 32);
    }

    // Token t of `tokens` floats [tokens, columns]; past the last, zeros.
    template <class Type>
    void round(const float* x, int64_t t, int64_t tokens) const {
        constexpr int BLOCK = IS_K<Type> ? 256 : 32, GROUP = Type::GROUP;
        const float factor = Type::HAS_MIN ? 1.0f : -float(PANEL_OFFSET<Type>);
        const int64_t tile = t / TOKEN_TILE, in_tile = t % TOKEN_TILE;
        for (int64_t at = 0; at < columns; at += BLOCK) {
            int8_t rounded[BLOCK] = {};
            const float d = t < tokens ? round_block<BLOCK>(x + t * columns + at, rounded) : 0.0f;
            for (int i = 0; i < BLOCK; i += 4)
                std::memcpy(q + (tile * (columns / 4) + (at + i) / 4) * TOKEN_TILE + in_tile, rounded + i, 4);
            for (int i = 0; i < BLOCK; i += 32) scale[(tile * (columns / 32) + (at + i) / 32) * TOKEN_TILE + in_tile] = d;
            for (int i = 0; i < BLOCK; i += GROUP) {
                int total = 0;
                for (int j = 0; j < GROUP; ++j) total += rounded[i + j];
                taken[(tile * (columns / GROUP) + (at + i) / GROUP) * TOKEN_TILE + in_tile] = factor * d * float(total);
            }
        }
    }
};

template <class Type>
struct Panel {
    static constexpr int GROUP = Type::GROUP, OFFSET = PANEL_OFFSET<Type>;
    alignas(64) uint32_t quants[PANEL_COLUMNS / 4][LANES];
    alignas(64) float scale[PANEL_COLUMNS / GROUP][LANES];
    alignas(64) float minimum[PANEL_COLUMNS / GROUP][LANES];  // with Type::HAS_MIN

    // Columns [at, at + count) of `rows` rows from w's first; further lanes repeat the last row.
    void unpack(const uint8_t* w, int64_t stride, int rows, int64_t at, int64_t count) {
        for (int r = 0; r < LANES; ++r) {
            const uint8_t* b = w + smaller(r, rows - 1) * stride + at / Type::SIZE * Type::BLOCK_BYTES;
            for (int64_t c = 0; c < count; c += Type::SIZE, b += Type::BLOCK_BYTES) {
                uint8_t q[Type::SIZE];
                float s[Type::SIZE / GROUP], m[Type::SIZE / GROUP];
                Type::quants(b, q);
                Type::affine(b, s, m);
                for (int i = 0; i < Type::SIZE / 4; ++i) {
                    uint32_t four = word_at(q + 4 * i);
                    if (SIGNED<Type> && OFFSET) four ^= 0x80808080u;
                    quants[c / 4 + i][r] = four;
                }
                for (int g = 0; g < Type::SIZE / GROUP; ++g) {
                    scale[c / GROUP + g][r] = s[g];
                    if (Type::HAS_MIN) minimum[c / GROUP + g][r] = m[g];
                }
            }
        }
    }

    // out[t] += panel · token t of a tile, t < USED, over columns [at, at + count).
    template <int USED>
    void multiply(const RoundedTokens& x, int64_t tile, int64_t at, int64_t count, F32* out) const {
        const int32_t* q = x.q + (tile * (x.columns / 4) + at / 4) * TOKEN_TILE;
        const float* d = x.scale + (tile * (x.columns / 32) + at / 32) * TOKEN_TILE;
        const float* taken = x.taken + (tile * (x.columns / GROUP) + at / GROUP) * TOKEN_TILE;
        F32 total[USED];
        for (int t = 0; t < USED; ++t) total[t] = out[t];
        for (int64_t g = 0; g < count / GROUP; ++g, q += GROUP / 4 * TOKEN_TILE) {
            I32 dot[USED];
#pragma GCC unroll 8
            for (int t = 0; t < USED; ++t) dot[t] = I32{};
#pragma GCC unroll 8
            for (int i = 0; i < GROUP / 4; ++i) {
                const U8 w = load<U8>(quants[g * GROUP / 4 + i]);
#pragma GCC unroll 8
                for (int t = 0; t < USED; ++t) dot[t] = dot4(dot[t], w, (S8)splat(q[i * TOKEN_TILE + t]));
            }
            const F32 scales = load<F32>(scale[g]);
            const float *dg = d + g * GROUP / 32 * TOKEN_TILE, *away = taken + g * TOKEN_TILE;
#pragma GCC unroll 8
            for (int t = 0; t < USED; ++t) {
                F32 scaled = to_float(dot[t]) * dg[t];
                if constexpr (!Type::HAS_MIN && OFFSET != 0) scaled += away[t];
                total[t] += scaled * scales;
            }
            if constexpr (Type::HAS_MIN) {
                const F32 minima = load<F32>(minimum[g]);
#pragma GCC unroll 8
                for (int t = 0; t < USED; ++t) total[t] -= minima * away[t];
            }
        }
        for (int t = 0; t < USED; ++t) out[t] = total[t];
    }
};

constexpr int64_t GEMM_TOKENS = 256;  // accumulators kept at a time: 16 KB

template <class Type>
inline void gemm_panel(const pinfer_matrix& w, const RoundedTokens& x, int64_t tokens, int64_t row, const float* bias, float* y) {
    Panel<Type> panel;
    const int rows = int(smaller<int64_t>(LANES, w.rows - row));
    for (int64_t begin = 0; begin < tokens; begin += GEMM_TOKENS) {
        const int64_t end = smaller(begin + GEMM_TOKENS, tokens);
        F32 sums[GEMM_TOKENS];
        for (int64_t t = 0; t < end - begin; ++t) sums[t] = F32{};
        for (int64_t at = 0; at < w.columns; at += PANEL_COLUMNS) {
            const int64_t count = smaller(PANEL_COLUMNS, w.columns - at);
            panel.unpack(w.blocks + row * w.row_stride, w.row_stride, rows, at, count);
            for (int64_t t = begin; t < end; t += TOKEN_TILE) {
                const auto multiply = end - t > TOKEN_TILE / 2 ? &Panel<Type>::template multiply<TOKEN_TILE>
                                                               : &Panel<Type>::template multiply<TOKEN_TILE / 2>;
                (panel.*multiply)(x, t / TOKEN_TILE, at, count, sums + (t - begin));
            }
        }
        for (int64_t t = begin; t < end; ++t)
            for (int r = 0; r < rows; ++r) y[t * w.rows + row + r] = sums[t - begin][r] + (bias ? bias[row + r] : 0.0f);
    }
}

template <class Type>
void gemm(Team& team, const pinfer_matmul_arguments& a) {
    const RoundedTokens x(a.scratch, a.tokens, a.w.columns);
    team.share((a.tokens + TOKEN_TILE - 1) / TOKEN_TILE * TOKEN_TILE, 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) x.round<Type>(a.x, t, a.tokens);
    });
    team.barrier();
    const int64_t panels = (a.w.rows + LANES - 1) / LANES;
    team.share(panels, 1, [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) gemm_panel<Type>(a.w, x, a.tokens, p * LANES, a.bias, a.y);
    });
    team.barrier();
}

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
