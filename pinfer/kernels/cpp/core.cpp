// The CPU core: dequantise, matmul over quantised rows, compaction and the sparse FFN.
//
// A plain C ABI over raw pointers, so that ctypes (and later a CUDA host node) can call it.
// Every result is bitwise independent of the number of threads: work is split over outputs, never
// over a sum. Weights are read once per call, 256 at a time, whatever the number of tokens.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "blocks.h"

namespace {

using namespace pinfer;

constexpr int RUN = 256;        // weights unpacked at a time: a K-quant block, 1 KB of floats
constexpr int TOKEN_TILE = 16;  // tokens that share one unpacking

enum Activation { SILU = 0, GELU_TANH = 1, RELU = 2, RELU2 = 3 };

float activate(int kind, float g) {
    switch (kind) {
        case SILU: return g / (1.0f + std::exp(-g));
        case GELU_TANH: return 0.5f * g * (1.0f + std::tanh(0.7978845608028654f * (g + 0.044715f * g * g * g)));
        // NaN passes through: it must not look like an inactive neuron.
        case RELU: return g < 0 ? 0.0f : g;
        default: return g < 0 ? 0.0f : g * g;
    }
}

float dot(const float* a, const float* b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

// out[t] = row · x[t] for tokens x[0..count), x rows `columns` apart.
void row_dots(const Layout& layout, const uint8_t* row, int64_t columns, const float* const* x, int count, float* out) {
    float unpacked[RUN];
    std::fill(out, out + count, 0.0f);
    for (int64_t at = 0; at < columns; at += RUN) {
        const int64_t run = std::min<int64_t>(RUN, columns - at);
        layout.unpack(row + at / layout.size * layout.bytes, run, unpacked);
        for (int t = 0; t < count; ++t) out[t] += dot(unpacked, x[t] + at, run);
    }
}

}  // namespace

extern "C" {

struct pinfer_matrix {
    const uint8_t* blocks;
    int64_t row_stride;  // bytes from one row to the next
    int64_t rows, columns;
    int32_t type;  // GGUF's number
};

int32_t pinfer_knows_type(int32_t type) { return layout_for(type).size != 0; }

// out [rows, columns]
void pinfer_dequantize(const pinfer_matrix* w, float* out, int32_t threads) {
    const Layout layout = layout_for(w->type);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < w->rows; ++r)
        layout.unpack(w->blocks + r * w->row_stride, w->columns, out + r * w->columns);
}

// y [tokens, rows] = x [tokens, columns] · wᵀ
void pinfer_matmul(const pinfer_matrix* w, const float* x, int64_t tokens, float* y, int32_t threads) {
    const Layout layout = layout_for(w->type);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < w->rows; ++r) {
        for (int64_t first = 0; first < tokens; first += TOKEN_TILE) {
            const int count = int(std::min<int64_t>(TOKEN_TILE, tokens - first));
            const float* inputs[TOKEN_TILE];
            float sums[TOKEN_TILE];
            for (int t = 0; t < count; ++t) inputs[t] = x + (first + t) * w->columns;
            row_dots(layout, w->blocks + r * w->row_stride, w->columns, inputs, count, sums);
            for (int t = 0; t < count; ++t) y[(first + t) * w->rows + r] = sums[t];
        }
    }
}

// indices: ascending n with scores[t, n] above threshold[n * threshold_stride], or NaN, for some t; returns their number.
int64_t pinfer_select_active(const float* scores, int64_t tokens, int64_t neurons, const float* threshold,
                             int64_t threshold_stride, int32_t* indices) {
    int64_t count = 0;
    for (int64_t n = 0; n < neurons; ++n) {
        bool active = false;
        for (int64_t t = 0; t < tokens; ++t) active |= !(scores[t * neurons + n] <= threshold[n * threshold_stride]);
        indices[count] = int32_t(n);  // overwritten unless active
        count += active;
    }
    return count;
}

// y [tokens, D] = Σ over listed neurons n of act(g_n) · (up_n · x) · down_n.
//
// `gate_values` [tokens, N] replaces the products gate_n · x where the predictor has made them;
// `up` may be null (ungated FFN: act(g_n) · down_n); `mask` [tokens, N] or null restricts tokens.
void pinfer_sparse_ffn(const pinfer_matrix* gate, const pinfer_matrix* up, const pinfer_matrix* down, const float* x,
                       int64_t tokens, const int32_t* indices, int64_t active, const uint8_t* mask,
                       const float* gate_values, int32_t activation, float* y, int32_t threads) {
    const int64_t neurons = gate->rows, width = down->columns;
    std::vector<float> hidden(size_t(active * tokens));

#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t k = 0; k < active; ++k) {
        const int64_t n = indices[k];
        for (int64_t first = 0; first < tokens; first += TOKEN_TILE) {
            const float* inputs[TOKEN_TILE];
            int64_t owner[TOKEN_TILE];
            float values[TOKEN_TILE], ups[TOKEN_TILE];
            int count = 0;
            for (int64_t t = first; t < std::min(tokens, first + TOKEN_TILE); ++t) {
                hidden[k * tokens + t] = 0;
                if (mask && !mask[t * neurons + n]) continue;
                owner[count] = t;
                inputs[count++] = x + t * gate->columns;
            }
            if (gate_values) {
                for (int i = 0; i < count; ++i) values[i] = gate_values[owner[i] * neurons + n];
            } else {
                row_dots(layout_for(gate->type), gate->blocks + n * gate->row_stride, gate->columns, inputs, count,
                         values);
            }
            int alive = 0;  // exact for ReLU: a neuron whose activation is zero needs no up or down
            for (int i = 0; i < count; ++i) {
                const float h = activate(activation, values[i]);
                if (h == 0) continue;
                values[alive] = h;
                owner[alive] = owner[i];
                inputs[alive++] = inputs[i];
            }
            if (up && alive)
                row_dots(layout_for(up->type), up->blocks + n * up->row_stride, up->columns, inputs, alive, ups);
            for (int i = 0; i < alive; ++i) hidden[k * tokens + owner[i]] = up ? values[i] * ups[i] : values[i];
        }
    }

    // Split over columns: each output element sums its neurons in list order.
    const Layout layout = layout_for(down->type);
    const int64_t runs = (width + RUN - 1) / RUN;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < runs; ++r) {
        const int64_t at = r * RUN, run = std::min<int64_t>(RUN, width - at);
        float unpacked[RUN];
        for (int64_t t = 0; t < tokens; ++t) std::fill_n(y + t * width + at, run, 0.0f);
        for (int64_t k = 0; k < active; ++k) {
            const float* h = &hidden[size_t(k * tokens)];
            if (std::all_of(h, h + tokens, [](float v) { return v == 0; })) continue;
            const uint8_t* row = down->blocks + int64_t(indices[k]) * down->row_stride;
            layout.unpack(row + at / layout.size * layout.bytes, run, unpacked);
            for (int64_t t = 0; t < tokens; ++t) {
                if (h[t] == 0) continue;
                float* out = y + t * width + at;
                for (int64_t i = 0; i < run; ++i) out[i] += h[t] * unpacked[i];
            }
        }
    }
}

}  // extern "C"
