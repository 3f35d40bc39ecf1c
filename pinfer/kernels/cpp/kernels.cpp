// Every step of the core for one instruction set; compiled once for each PINFER_LEVEL.
//
// Results do not depend on the number of threads, bit for bit: work is split over outputs and
// never over a sum.
#include <algorithm>

#include "abi.h"
#include "kernels.h"
#include "types.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

constexpr int64_t GEMM_FROM_TOKENS = 6;     // below it, unpacking for each token costs less than a panel
constexpr int64_t PIECE_BYTES = 32 * 1024;  // of weights handed out at a time
constexpr int64_t NEURON_PIECE = 128;       // listed neurons handed out at a time, at most
constexpr int MANY_TOKENS = 16;             // tokens of one sparse pass over the rows

// ---- weights as floats ---------------------------------------------------------------------------

void dequantize(Team& team, const pinfer_dequantize_arguments& a) {
    const Type& type = type_of(a.w.type);
    team.share(a.w.rows, 4, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r)
            type.unpack(a.w.blocks + r * a.w.row_stride, a.w.columns, a.out + r * a.w.columns);
    });
    team.barrier();
}

void embed(Team& team, const pinfer_embed_arguments& a) {
    const Type& type = type_of(a.w.type);
    team.share(a.tokens, 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            float* out = a.out + t * a.w.columns;
            type.unpack(a.w.blocks + a.ids[t] * a.w.row_stride, a.w.columns, out);
            for (int64_t i = 0; i < a.w.columns; ++i) out[i] *= a.scale;
        }
    });
    team.barrier();
}

// ---- x · wᵀ ----------------------------------------------------------------------------------------

// The activations that dots are taken with: packed for a type where they are rounded, else as they are.
struct Inputs {
    const float* x;
    const uint8_t* packed;  // null: floats
    int64_t tokens;
};

// Rounds and packs the tokens for w's type; pieces go to the threads. Floats stay where it has no int8 dots.
inline Inputs pack_tokens(Team& team, const pinfer_matrix& w, const float* x, int64_t tokens, bool int8, uint8_t* out) {
    const Type& type = type_of(w.type);
    if (!int8 || !type.pack) return {x, nullptr, tokens};
    const int64_t chunks = (w.columns + type.chunk - 1) / type.chunk, stride = type.pack_bytes(w.columns);
    team.share(tokens * chunks, larger<int64_t>(2048 / type.chunk, 1), [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last;) {
            const int64_t t = at / chunks, from = at % chunks, to = smaller(chunks, from + (last - at));
            type.pack(x + t * w.columns, w.columns, from, to, out + t * stride);
            at += to - from;
        }
    });
    team.barrier();
    return {x, out, tokens};
}

// Dots of rows `index(k)` for k in [first, last) with every token: visit(k, token, dot).
template <class Index, class Visit>
inline void dot_rows(const pinfer_matrix& w, const Inputs& in, int64_t first, int64_t last, Index index, Visit visit) {
    const Type& type = type_of(w.type);
    const int64_t stride = in.packed ? type.pack_bytes(w.columns) : 0;
    const auto point = [&](int64_t k, const uint8_t** rows) {
        for (int r = 0; r < R; ++r) rows[r] = w.blocks + index(smaller(k + r, last - 1)) * w.row_stride;
    };
    // Where a row may be read on into the next one: rows that lie apart end each for itself.
    const int64_t row_bytes = w.columns / type.size * type.bytes;
    const uint8_t *rows[R], *ahead[R], *end = w.blocks + (w.row_stride == row_bytes ? w.rows * row_bytes : 0);
    if (first < last) point(first, ahead);
    for (int64_t k = first; k < last; k += R) {
        std::memcpy(rows, ahead, sizeof rows);
        if (k + R < last) point(k + R, ahead);
        for (int64_t t = 0; t < in.tokens; ++t) {
            float dots[R];
            if (in.packed) type.dot_packed(rows, ahead, w.columns, in.packed + t * stride, end, dots);
            else type.dot_float(rows, ahead, w.columns, in.x + t * w.columns, dots);
            for (int r = 0; r < R && k + r < last; ++r) visit(k + r, t, dots[r]);
        }
    }
}

void matmul(Team& team, const pinfer_matmul_arguments& a) {
    const pinfer_matrix& w = a.w;
    const Type& type = type_of(w.type);
    if (a.int8 && type.gemm && a.tokens >= GEMM_FROM_TOKENS) return type.gemm(team, a);
    const Inputs in = pack_tokens(team, w, a.x, a.tokens, a.int8, a.scratch);
    const int64_t row_bytes = larger<int64_t>(w.row_stride, 1);
    const int64_t fair = smaller(PIECE_BYTES / row_bytes, w.rows / (8 * team.size));
    team.share(w.rows, larger<int64_t>(fair / R * R, R), [&](int64_t first, int64_t last) {
        const auto same = [](int64_t k) { return k; };
        if (a.bias) dot_rows(w, in, first, last, same, [&](int64_t k, int64_t t, float dot) { a.y[t * w.rows + k] = dot + a.bias[k]; });
        else dot_rows(w, in, first, last, same, [&](int64_t k, int64_t t, float dot) { a.y[t * w.rows + k] = dot; });
    });
    team.barrier();
}

// ---- the sparse FFN --------------------------------------------------------------------------------

void select_active(Team& team, const pinfer_select_arguments& a) {
    if (team.id == 0) {
        int32_t count = 0;
        int64_t n = 0;
#if PINFER_LEVEL == 512
        if (a.tokens == 1) {
            for (; n + 16 <= a.neurons; n += 16) {
                const __m512 limit = a.threshold_stride ? _mm512_loadu_ps(a.threshold + n) : _mm512_set1_ps(*a.threshold);
                const __mmask16 on = _mm512_cmp_ps_mask(_mm512_loadu_ps(a.scores + n), limit, _CMP_NLE_UQ);
                const __m512i numbers = _mm512_add_epi32(
                    _mm512_set1_epi32(int(n)), _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
                _mm512_mask_compressstoreu_epi32(a.indices + count, on, numbers);
                count += __builtin_popcount(on);
            }
        }
#endif
        for (; n < a.neurons; ++n) {
            bool active = false;
            for (int64_t t = 0; t < a.tokens; ++t)
                active |= !(a.scores[t * a.neurons + n] <= a.threshold[n * a.threshold_stride]);
            a.indices[count] = int32_t(n);  // overwritten unless active
            count += active;
        }
        *a.count = count;
    }
    team.barrier();
}

void sign_scores(Team& team, const pinfer_sign_scores_arguments& a) {
    const int64_t words = (a.columns + 31) / 32;
    team.share(a.tokens * words, 256, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t token = i / words, from = i % words * 32, to = smaller(from + 32, a.columns);
            uint32_t word = 0;
            for (int64_t d = from; d < to; ++d) word |= uint32_t(a.x[token * a.columns + d] < 0) << (d - from);
            a.packed[i] = word;
        }
    });
    team.barrier();
    team.share(a.neurons, 1024, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n)
            for (int64_t t = 0; t < a.tokens; ++t) {
                const uint32_t *signs = a.signs + n * words, *of_x = a.packed + t * words;
                int64_t differing = 0, w = 0;
                for (; w + 2 <= words; w += 2) {
                    uint64_t one, other;
                    std::memcpy(&one, signs + w, 8);
                    std::memcpy(&other, of_x + w, 8);
                    differing += __builtin_popcountll(one ^ other);
                }
                for (; w < words; ++w) differing += __builtin_popcount(signs[w] ^ of_x[w]);
                a.scores[t * a.neurons + n] = float(a.columns - 2 * differing);
            }
    });
    team.barrier();
}

// y [tokens, columns] = Σ over k < count of hidden[k, t] · row index(k) of w; zeros are skipped, and
// every element adds its rows in the order of k, four at a time.
template <class Index>
inline void add_rows(Team& team, const pinfer_matrix& w, const float* hidden, int64_t tokens, int64_t count,
                     float* y, Index index) {
    const Type& type = type_of(w.type);
    // Pieces of whole blocks, long enough that a row's part is worth its first miss.
    const int64_t pieces = larger<int64_t>(1, smaller<int64_t>(w.columns / 1024, team.size == 1 ? 1 : 2 * team.size));
    const int64_t width = (w.columns / pieces + RUN - 1) / RUN * RUN;
    team.share(w.columns, width, [&](int64_t from, int64_t to) {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = from; i < to; ++i) y[t * w.columns + i] = 0;
        const int64_t offset = from / type.size * type.bytes;
        float h[R * MANY_TOKENS];
        const uint8_t *rows[R], *ready[R];
        int held = 0;
        // Four rows are collected, and added when the next four are known.
        float late[R * MANY_TOKENS];
        bool waiting = false;
        auto add_late = [&] {
            if (tokens == 1) type.add_rows(ready, rows, late, to - from, y + from);
            else type.add_rows_to_many(ready, late, tokens, to - from, y + from, w.columns);
        };
        auto turn = [&] {
            if (waiting) add_late();
            for (int r = 0; r < R; ++r) ready[r] = rows[r];
            std::memcpy(late, h, sizeof(float) * size_t(R * tokens));
            waiting = true;
            held = 0;
        };
        for (int64_t k = 0; k < count; ++k) {
            const float* values = hidden + k * tokens;
            bool any = false;
            for (int64_t t = 0; t < tokens; ++t) any |= values[t] != 0;
            if (!any) continue;
            rows[held] = w.blocks + index(k) * w.row_stride + offset;
            std::memcpy(h + held * tokens, values, sizeof(float) * size_t(tokens));
            if (++held == R) turn();
        }
        if (held) {
            for (int r = held; r < R; ++r) {
                rows[r] = rows[held - 1];
                for (int64_t t = 0; t < tokens; ++t) h[r * tokens + t] = 0;
            }
            turn();
        }
        if (waiting) add_late();
    });
    team.barrier();
}

// Gate, activation and up of listed neurons [first, last), at most NEURON_PIECE of them; survivors
// alone read their up rows.
void hidden_values(const pinfer_sparse_ffn_arguments& a, const Inputs& gate_in, const Inputs& up_in, int64_t first,
                   int64_t last) {
    const int64_t T = a.tokens, N = a.gate.rows;
    const auto listed = [&](int64_t k) { return int64_t(a.indices[k]); };
    const auto put = [&](int64_t k, int64_t t, float g) {
        const bool wanted = !a.mask || a.mask[t * N + listed(k)];
        const float shift = a.shift ? a.shift[listed(k)] : 0.0f;
        a.hidden[k * T + t] = wanted ? activate(a.activation, g, a.cutoff) - shift : 0.0f;
    };
    if (a.gate_values) {  // with their bias
        for (int64_t k = first; k < last; ++k)
            for (int64_t t = 0; t < T; ++t) put(k, t, a.gate_values[t * N + listed(k)]);
    } else {
        if (a.gate_bias)
            dot_rows(a.gate, gate_in, first, last, listed,
                     [&](int64_t k, int64_t t, float g) { put(k, t, g + a.gate_bias[listed(k)]); });
        else dot_rows(a.gate, gate_in, first, last, listed, put);
    }
    if (!a.up.blocks) return;
    int32_t alive[NEURON_PIECE];
    int64_t count = 0;
    for (int64_t k = first; k < last; ++k) {
        bool any = false;
        for (int64_t t = 0; t < T; ++t) any |= a.hidden[k * T + t] != 0;
        alive[count] = int32_t(k);
        count += any;
    }
    dot_rows(
        a.up, up_in, 0, count, [&](int64_t i) { return int64_t(a.indices[alive[i]]); },
        [&](int64_t i, int64_t t, float u) {
            float& h = a.hidden[alive[i] * T + t];
            if (h != 0) h *= activate_up(a.activation, u);  // a neuron that does not count must not become NaN
        });
}

void sparse_ffn(Team& team, const pinfer_sparse_ffn_arguments& a) {
    const int64_t count = *a.count;
    Inputs gate_in{a.x, nullptr, a.tokens}, up_in = gate_in;
    if (!a.gate_values) gate_in = pack_tokens(team, a.gate, a.x, a.tokens, a.int8, a.scratch);
    if (a.up.blocks) {
        uint8_t* second = a.scratch + pinfer_scratch_bytes(a.tokens, a.gate.columns);
        const bool shared = !a.gate_values && a.up.type == a.gate.type;
        up_in = shared ? gate_in : pack_tokens(team, a.up, a.x, a.tokens, a.int8, second);
    }
    // Long pieces, as each begins with rows that nothing has read ahead; some for each thread.
    const int64_t fair = larger<int64_t>(count / (4 * team.size) / R * R, 32);
    team.share(count, smaller(fair, NEURON_PIECE),
               [&](int64_t first, int64_t last) { hidden_values(a, gate_in, up_in, first, last); });
    team.barrier();
    add_rows(team, a.down, a.hidden, a.tokens, count, a.y, [&](int64_t k) { return int64_t(a.indices[k]); });
}

void input_sparse(Team& team, const pinfer_input_sparse_arguments& a) {
    const int64_t inputs = a.w.rows;
    const float threshold = *a.threshold;
    team.share(inputs, 4096, [&](int64_t first, int64_t last) {
        for (int64_t j = first; j < last; ++j)
            for (int64_t t = 0; t < a.tokens; ++t) {
                const float v = a.x[t * inputs + j];
                a.hidden[j * a.tokens + t] = __builtin_fabsf(v) <= threshold ? 0.0f : v;  // NaN passes
            }
    });
    team.barrier();
    add_rows(team, a.w, a.hidden, a.tokens, inputs, a.y, [](int64_t j) { return j; });
}

void tally(Team& team, const pinfer_tally_arguments& a) {
    if (team.id == 0) {
        int64_t active = int64_t(*a.count) * a.tokens;
        if (a.mask) {
            active = 0;
            for (int64_t i = 0; i < a.tokens * a.neurons; ++i) active += a.mask[i];
        }
        a.totals[0] += active;
        a.totals[1] += a.tokens;
    }
    team.barrier();
}

void tally_kept(Team& team, const pinfer_tally_kept_arguments& a) {
    if (team.id == 0) {
        const float threshold = *a.threshold;
        int64_t skipped = 0;
        for (int64_t i = 0; i < a.tokens * a.inputs; ++i) skipped += __builtin_fabsf(a.x[i]) <= threshold;  // not NaN
        a.totals[0] += a.tokens * a.inputs - skipped;
        a.totals[1] += a.tokens;
    }
    team.barrier();
}

void top_k(Team& team, const pinfer_top_k_arguments& a) {
    if (team.id == 0) {
        int64_t held = 0;
        F32 odd = {};  // NaN once something is not finite
        float rest_odd = 0;
        const auto offer = [&](int64_t i) {
            const float v = a.scores[i];
            if (held == a.k && !(v > a.values[held - 1])) return;
            int64_t at = held < a.k ? held++ : held - 1;
            for (; at > 0 && v > a.values[at - 1]; --at) {
                a.values[at] = a.values[at - 1];
                a.indices[at] = a.indices[at - 1];
            }
            a.values[at] = v;
            a.indices[at] = i;
        };
        constexpr int64_t STEP = 4 * LANES;
        int64_t i = 0;
        for (; i + STEP <= a.count; i += STEP) {
            F32 peak = load<F32>(a.scores + i);
            odd += peak - peak;
            for (int j = 1; j < 4; ++j) {
                const F32 v = load<F32>(a.scores + i + j * LANES);
                odd += v - v;
                peak = v > peak ? v : peak;
            }
            if (held == a.k && !any(peak > splat(a.values[held - 1]))) continue;
            for (int64_t j = i; j < i + STEP; ++j) offer(j);
        }
        for (; i < a.count; ++i) {
            rest_odd += a.scores[i] - a.scores[i];
            offer(i);
        }
        if (!(sum(odd) + rest_odd == 0.0f))
            for (int64_t j = 0; j < a.k; ++j) a.values[j] = __builtin_nanf("");
        for (int64_t j = held; j < a.k; ++j) a.indices[j] = 0;  // NaNs alone were offered to no avail
    }
    team.barrier();
}

// ---- elementwise, norm, rotary embedding -----------------------------------------------------------

void rms_norm(Team& team, const pinfer_rms_norm_arguments& a) {
    team.share(a.rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* x = a.x + row * a.columns;
            const float* residual = a.residual ? a.residual + row * a.columns : nullptr;
            float* y = a.y + row * a.columns;
            F32 squares = {};
            float rest = 0;
            int64_t i = 0;
            for (; i + LANES <= a.columns; i += LANES) {
                const F32 v = load<F32>(x + i);
                squares += v * v;
            }
            for (; i < a.columns; ++i) rest += x[i] * x[i];
            const float factor = 1.0f / __builtin_sqrtf((sum(squares) + rest) / float(a.columns) + a.eps);
            for (i = 0; i < a.columns; ++i) y[i] = x[i] * factor * a.weight[i] + (residual ? residual[i] : 0.0f);
        }
    });
    team.barrier();
}

void layer_norm(Team& team, const pinfer_layer_norm_arguments& a) {
    team.share(a.rows, 1, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const float* x = a.x + row * a.columns;
            const float* residual = a.residual ? a.residual + row * a.columns : nullptr;
            float* y = a.y + row * a.columns;
            // Σ part(v): the mean, and then the squares about it, which do not cancel.
            const auto total = [&](auto part) {
                F32 all = {};
                float rest = 0;
                int64_t i = 0;
                for (; i + LANES <= a.columns; i += LANES) all += part(load<F32>(x + i));
                for (; i < a.columns; ++i) rest += part(splat(x[i]))[0];
                return sum(all) + rest;
            };
            const float mean = total([](F32 v) { return v; }) / float(a.columns);
            const float squares = total([mean](F32 v) { return (v - mean) * (v - mean); });
            const float factor = 1.0f / __builtin_sqrtf(squares / float(a.columns) + a.eps);
            for (int64_t i = 0; i < a.columns; ++i) y[i] = (x[i] - mean) * factor * a.weight[i];
            if (a.bias)
                for (int64_t i = 0; i < a.columns; ++i) y[i] += a.bias[i];
            if (residual)
                for (int64_t i = 0; i < a.columns; ++i) y[i] += residual[i];
        }
    });
    team.barrier();
}

// body(first, last) over elements; a few thousand stay with one thread.
template <class Body>
inline void elementwise(Team& team, int64_t count, Body body) {
    team.share(count, 8192, body);
    team.barrier();
}

void add(Team& team, const pinfer_add_arguments& a) {
    elementwise(team, a.count, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) a.y[i] = a.a[i] + a.b[i];
    });
}

void softcap(Team& team, const pinfer_softcap_arguments& a) {
    elementwise(team, a.count, [&](int64_t first, int64_t last) {
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) store(a.y + i, a.cap * hyperbolic_tangent(load<F32>(a.x + i) / a.cap));
        for (; i < last; ++i) a.y[i] = a.cap * hyperbolic_tangent(splat(a.x[i] / a.cap))[0];
    });
}

void glu(Team& team, const pinfer_glu_arguments& a) {
    // shift, bias: of `first`, or null
    const auto some = [&](int64_t first, int64_t last, const float* shift, const float* bias) {
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) {
            F32 v = load<F32>(a.gate + i);
            if (bias) v += load<F32>(bias + (i - first));
            v = activate(a.activation, v, a.cutoff);
            if (shift) v -= load<F32>(shift + (i - first));
            if (a.magnitude) v = v < 0.0f ? -v : v;
            if (a.up) v *= activate_up(a.activation, load<F32>(a.up + i));
            store(a.y + i, v);
        }
        for (; i < last; ++i) {
            float v = activate(a.activation, bias ? a.gate[i] + bias[i - first] : a.gate[i], a.cutoff);
            if (shift) v -= shift[i - first];
            if (a.magnitude) v = __builtin_fabsf(v);
            a.y[i] = a.up ? v * activate_up(a.activation, a.up[i]) : v;
        }
    };
    elementwise(team, a.count, [&](int64_t first, int64_t last) {
        if (!a.shift && !a.gate_bias) return some(first, last, nullptr, nullptr);
        while (first < last) {  // row by row, as each begins with the first neuron's shift and bias
            const int64_t n = first % a.neurons, end = smaller(last, first + a.neurons - n);
            some(first, end, a.shift ? a.shift + n : nullptr, a.gate_bias ? a.gate_bias + n : nullptr);
            first = end;
        }
    });
}

void rope(Team& team, const pinfer_rope_arguments& a) {
    const int64_t half = a.dim / 2, start = *a.start;
    team.share(a.tokens, 4, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t) {
            const float *cos = a.cos + (start + t) * half, *sin = a.sin + (start + t) * half;
            for (int64_t h = 0; h < a.heads; ++h) {
                const float* x = a.x + (t * a.heads + h) * a.head_dim;
                float* y = a.y + (t * a.heads + h) * a.head_dim;
                for (int64_t i = 0; i < half; ++i) {
                    const int64_t p = a.interleaved ? 2 * i : i, q = a.interleaved ? 2 * i + 1 : i + half;
                    const float u = x[p], v = x[q];
                    y[p] = u * cos[i] - v * sin[i];
                    y[q] = u * sin[i] + v * cos[i];
                }
                for (int64_t i = a.dim; i < a.head_dim; ++i) y[i] = x[i];
            }
        }
    });
    team.barrier();
}

// ---- attention ---------------------------------------------------------------------------------------

// scores [count], padded with room for LANES more, become their softmax.
inline void softmax(float* scores, int64_t count) {
    float peak = scores[0];
    for (int64_t j = 1; j < count; ++j) peak = scores[j] > peak ? scores[j] : peak;
    for (int64_t j = count; j < count + LANES; ++j) scores[j] = -1e30f;
    F32 total = {};
    for (int64_t j = 0; j < count; j += LANES) {
        F32 e = exponential(load<F32>(scores + j) - peak);
        if (j + LANES > count)
            for (int i = int(count - j); i < LANES; ++i) e[i] = 0;
        store(scores + j, e);
        total += e;
    }
    const float inverse = 1.0f / sum(total);
    for (int64_t j = 0; j < count; ++j) scores[j] *= inverse;
}

void attend(const pinfer_attention_arguments& a, int64_t t, int64_t head, int64_t seen, float* scores) {
    const int64_t d = a.head_dim, first = a.window && seen > a.window ? seen - a.window : 0, count = seen - first;
    const int64_t base = (head / (a.heads / a.kv_heads) * a.context + first) * d;
    const auto *keys = reinterpret_cast<const uint8_t*>(a.keys + base), *values = reinterpret_cast<const uint8_t*>(a.values + base);
    const float* query = a.query + (t * a.heads + head) * d;
    float* y = a.y + (t * a.heads + head) * d;
    const uint8_t* rows[R];
    const auto point = [&](const uint8_t* base_row, int64_t j) {
        for (int r = 0; r < R; ++r) rows[r] = base_row + smaller(j + r, count - 1) * d * 4;
    };
    for (int64_t j = 0; j < count; j += R) {
        float dots[R];
        point(keys, j);
        dot_float<Float32, R>(rows, rows, d, query, dots);
        for (int r = 0; r < R && j + r < count; ++r) scores[j + r] = dots[r] * a.scale;
    }
    if (a.softcap > 0)
        for (int64_t j = 0; j < count; j += LANES)
            store(scores + j, a.softcap * hyperbolic_tangent(load<F32>(scores + j) / a.softcap));
    softmax(scores, count);
    for (int64_t i = 0; i < d; ++i) y[i] = 0;
    for (int64_t j = 0; j < count; j += R) {
        float h[R];
        for (int r = 0; r < R; ++r) h[r] = j + r < count ? scores[j + r] : 0.0f;
        point(values, j);
        add_four_rows<Float32>(rows, rows, h, d, y);
    }
}

void attention(Team& team, const pinfer_attention_arguments& a) {
    const int64_t start = *a.start, d = a.head_dim;
    team.share(a.tokens * a.kv_heads, 8, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t t = i / a.kv_heads, h = i % a.kv_heads, to = (h * a.context + start + t) * d;
            std::memcpy(a.keys + to, a.key + i * d, sizeof(float) * size_t(d));
            std::memcpy(a.values + to, a.value + i * d, sizeof(float) * size_t(d));
        }
    });
    team.barrier();
    float* scores = a.scores + team.id * (a.context + 64);
    team.share(a.tokens * a.heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) attend(a, i / a.heads, i % a.heads, start + i / a.heads + 1, scores);
    });
    team.barrier();
}

// ---- parts of lists, copies ------------------------------------------------------------------------------

void split_active(Team& team, const pinfer_split_active_arguments& a) {
    team.share(a.parts, 1, [&](int64_t first, int64_t last) {
        const int32_t* end = a.indices + *a.count;
        for (int64_t p = first; p < last; ++p) {
            const auto from = std::lower_bound(a.indices, end, int32_t(a.bounds[p]));
            const auto to = std::lower_bound(from, end, int32_t(a.bounds[p + 1]));
            for (auto i = from; i < to; ++i) a.out[a.bounds[p] + (i - from)] = *i - int32_t(a.bounds[p]);
            a.counts[p] = int32_t(to - from);
        }
    });
    team.barrier();
}

void copy(Team& team, const pinfer_copy_arguments& a) {
    team.share(a.bytes, 1 << 20, [&](int64_t first, int64_t last) {
        std::memcpy(a.to + first, a.from + first, size_t(last - first));
    });
    team.barrier();
}

// ---- the table -----------------------------------------------------------------------------------------

template <class Arguments, void (*RUN_STEP)(Team&, const Arguments&)>
void erased(Team& team, const void* arguments) {
    RUN_STEP(team, *static_cast<const Arguments*>(arguments));
}

uint64_t read_all(const uint8_t* p, int64_t count) {
    typedef uint64_t Words __attribute__((vector_size(BYTES)));
    Words total[4] = {};
    for (int64_t i = 0; i + 4 * BYTES <= count; i += 4 * BYTES)
        for (int j = 0; j < 4; ++j) total[j] += load<Words>(p + i + j * BYTES);
    const Words all = total[0] + total[1] + total[2] + total[3];
    uint64_t out = 0;
    for (int i = 0; i < BYTES / 8; ++i) out += all[i];
    return out;
}

bool knows(int32_t type) { return type_of(type).size != 0; }

extern const Kernels TABLE;
const Kernels TABLE = {
    {
        erased<pinfer_dequantize_arguments, dequantize>,
        erased<pinfer_embed_arguments, embed>,
        erased<pinfer_matmul_arguments, matmul>,
        erased<pinfer_select_arguments, select_active>,
        erased<pinfer_sparse_ffn_arguments, sparse_ffn>,
        erased<pinfer_input_sparse_arguments, input_sparse>,
        erased<pinfer_rms_norm_arguments, rms_norm>,
        erased<pinfer_add_arguments, add>,
        erased<pinfer_glu_arguments, glu>,
        erased<pinfer_rope_arguments, rope>,
        erased<pinfer_attention_arguments, attention>,
        erased<pinfer_tally_arguments, tally>,
        erased<pinfer_top_k_arguments, top_k>,
        erased<pinfer_sign_scores_arguments, sign_scores>,
        erased<pinfer_tally_kept_arguments, tally_kept>,
        erased<pinfer_split_active_arguments, split_active>,
        erased<pinfer_copy_arguments, copy>,
        erased<pinfer_layer_norm_arguments, layer_norm>,
        erased<pinfer_softcap_arguments, softcap>,
    },
    knows,
    read_all,
};

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
