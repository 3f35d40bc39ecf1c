// What crosses the C ABI: plain structs that ctypes mirrors (binding.py), one for each kind of step.
//
// A step is one operation on buffers that the caller owns. Sizes that change from one run of a
// recorded program to the next (the position, the number of active neurons) are read through
// pointers when the step runs.
#pragma once

#include <cstdint>

extern "C" {

struct pinfer_matrix {
    const uint8_t* blocks;
    int64_t row_stride;  // bytes from one row to the next
    int64_t rows, columns;
    int32_t type;  // GGUF's number
};

enum pinfer_kind : int32_t {
    PINFER_DEQUANTIZE,
    PINFER_EMBED,
    PINFER_MATMUL,
    PINFER_SELECT_ACTIVE,
    PINFER_SPARSE_FFN,
    PINFER_INPUT_SPARSE,
    PINFER_RMS_NORM,
    PINFER_ADD,
    PINFER_GLU,
    PINFER_ROPE,
    PINFER_ATTENTION,
    PINFER_TALLY,
    PINFER_TOP_K,
    PINFER_SIGN_SCORES,
    PINFER_TALLY_KEPT,
    PINFER_SPLIT_ACTIVE,
    PINFER_COPY,
    PINFER_LAYER_NORM,
    PINFER_SOFTCAP,
    PINFER_KINDS,
    // What orders programs and times them (control.h), whatever the instruction set.
    PINFER_FORK = 64,
    PINFER_JOIN,
    PINFER_AWAIT,
    PINFER_RAISE,
    PINFER_CHECK_LIST,
    PINFER_MARK,
    PINFER_PACE,
};

// How a program or a job ended.
enum pinfer_status : int32_t {
    PINFER_DONE,
    PINFER_TIMED_OUT,  // another thread or the device did not answer in time; it may answer later
    PINFER_BAD_LIST,   // neurons that are not there
    PINFER_STOPPED,    // the worker's threads have ended, or belong to the process that this one was forked from
};

struct pinfer_step {
    int32_t kind;
    const void* arguments;  // the struct below that belongs to the kind
};

// out [rows, columns] = the weights
struct pinfer_dequantize_arguments {
    pinfer_matrix w;
    float* out;
};

// out [tokens, columns] = scale * rows of w named by ids
struct pinfer_embed_arguments {
    pinfer_matrix w;
    const int64_t* ids;
    int64_t tokens;
    float scale;
    float* out;
};

// y [tokens, rows] = x [tokens, columns] · wᵀ + bias
struct pinfer_matmul_arguments {
    pinfer_matrix w;
    const float* x;
    int64_t tokens;
    int32_t int8;  // round x to int8 in blocks
    const float* bias;  // [rows] or null
    float* y;
    uint8_t* scratch;  // pinfer_scratch_bytes(tokens, columns), 64-aligned
};

// indices: ascending n with scores[t, n] above threshold[n * stride], or NaN, for some t; count: how many
struct pinfer_select_arguments {
    const float* scores;
    int64_t tokens, neurons;
    const float* threshold;
    int64_t threshold_stride;
    int32_t* indices;
    int32_t* count;
};

// scores [tokens, neurons] = Σ over columns of sign(x) · sign(w): columns less twice those that differ
struct pinfer_sign_scores_arguments {
    const float* x;         // [tokens, columns]; zeros and NaN count as positive
    const uint32_t* signs;  // [neurons, words], words = ceil(columns / 32); bit j of word w is column 32 w + j's
    int64_t tokens, neurons, columns;
    float* scores;
    uint32_t* packed;  // [tokens, words]
};

// y [tokens, D] = Σ over listed neurons n of act(g_n) · (up_n · x) · down_n; dReLU clamps up_n · x at 0
struct pinfer_sparse_ffn_arguments {
    pinfer_matrix gate, up, down;  // up.blocks is null for an ungated FFN
    const float* x;
    int64_t tokens;
    const int32_t* indices;
    const int32_t* count;
    const uint8_t* mask;       // [tokens, N] or null
    const float* gate_values;  // [tokens, N] or null: gate_n · x, bias and all, where the predictor has made it
    const float* shift;        // [N] or null: taken off act(g_n)
    const float* gate_bias;    // [N] or null: added to gate_n · x where it is computed here
    float cutoff;              // of RELU: a gate up to it gives 0
    int32_t activation;
    int32_t int8;
    float* y;
    float* hidden;     // [N, tokens]
    uint8_t* scratch;  // twice pinfer_scratch_bytes(tokens, D), 64-aligned
};

// y [tokens, columns of w] = Σ over j with |x_j| > threshold of x_j · w_j
struct pinfer_input_sparse_arguments {
    pinfer_matrix w;  // input-major: row j holds what input j adds to every output
    const float* x;   // [tokens, rows of w]
    int64_t tokens;
    const float* threshold;  // [1]
    float* y;
    float* hidden;  // [rows of w, tokens]
};

// y [rows, columns] = x / rms(x) · weight, plus `residual` where it is not null
struct pinfer_rms_norm_arguments {
    const float *x, *weight, *residual;
    int64_t rows, columns;
    float eps;
    float* y;
};

// y [rows, columns] = (x - mean x) / deviation of x · weight, plus `bias` [columns] and `residual` where not null
struct pinfer_layer_norm_arguments {
    const float *x, *weight, *bias, *residual;
    int64_t rows, columns;
    float eps;
    float* y;
};

// y = cap · tanh(x / cap)
struct pinfer_softcap_arguments {
    const float* x;
    int64_t count;
    float cap;
    float* y;
};

struct pinfer_add_arguments {
    const float *a, *b;
    int64_t count;
    float* y;
};

// y = (act(gate + gate_bias) - shift) · up (dReLU: of up clamped at 0), without up where it is null; with `magnitude` its size
struct pinfer_glu_arguments {
    const float *gate, *up;
    const float *shift, *gate_bias;  // [neurons] or null
    int64_t count, neurons;  // count: tokens · neurons
    int32_t activation, magnitude;
    float cutoff;  // of RELU
    float* y;
};

// y [tokens, heads, head_dim] = x rotated by the angles of positions *start, *start + 1, …
struct pinfer_rope_arguments {
    const float* x;
    const float *cos, *sin;  // [positions, dim / 2]
    const int64_t* start;
    int64_t tokens, heads, head_dim, dim;
    int32_t interleaved;
    float* y;
};

// Store keys and values at positions *start …, then y [tokens, heads, head_dim] = attention over all stored.
struct pinfer_attention_arguments {
    const float *query, *key, *value;  // [tokens, heads or kv_heads, head_dim]
    float *keys, *values;              // [kv_heads, context, head_dim]
    const int64_t* start;
    int64_t tokens, heads, kv_heads, head_dim, context;
    int64_t window;  // positions seen, the own included; 0: all
    float scale;
    float softcap;  // scores become softcap · tanh(score / softcap); 0: they stay
    float* y;
    float* scores;  // [threads, context + 64]: vectors are written whole past a row's end
};

// totals[0] += active (token, neuron) pairs, totals[1] += tokens
struct pinfer_tally_arguments {
    const int32_t* count;
    const uint8_t* mask;  // [tokens, neurons] or null, which makes it tokens · count
    int64_t tokens, neurons;
    int64_t* totals;
};

// totals[0] += inputs of x [tokens, inputs] that are not at most the threshold in magnitude, totals[1] += tokens
struct pinfer_tally_kept_arguments {
    const float* x;
    int64_t tokens, inputs;
    const float* threshold;  // [1]
    int64_t* totals;
};

// The best k of scores [count], best first, ties in order; all values NaN where a score is not finite
struct pinfer_top_k_arguments {
    const float* scores;
    int64_t count, k;
    float* values;
    int64_t* indices;
};

// The listed neurons by parts: part p has neurons bounds[p] … bounds[p + 1] - 1, numbered from 0, listed from
// out[bounds[p]] on, counts[p] of them
struct pinfer_split_active_arguments {
    const int32_t *indices, *count;
    int64_t parts;
    const int64_t* bounds;  // [parts + 1], ascending from 0
    int32_t *out, *counts;  // [bounds[parts]], [parts]
};

struct pinfer_copy_arguments {
    const uint8_t* from;
    int64_t bytes;
    uint8_t* to;
};

// ---- what orders programs and times them -----------------------------------------------------------

struct pinfer_worker;  // threads of their own that run jobs, see worker.h

// A program for a worker. The last three are the core's; the rest stays as it is while the job runs.
struct pinfer_job {
    pinfer_worker* worker;
    const pinfer_step* steps;
    int64_t count;
    pinfer_job* next;  // another one that pinfer_run_job runs beside this one, or null
    int64_t ticket;    // of its last run; 0 before it is submitted
    int32_t status;    // of its last run
    int32_t refused;   // why pinfer_run_job could not submit it, or did not see its end; 0 where it could and did
};

// FORK submits the job, JOIN waits for its end and fails where it failed
struct pinfer_job_arguments {
    pinfer_job* job;
};

// AWAIT waits until *flag is at least *epoch (of numbers that wrap around); RAISE sets it to *epoch. Both see
// and show all memory before, also that of a device that shares the flag.
struct pinfer_flag_arguments {
    int32_t* flag;
    const int32_t* epoch;
    double timeout_s;  // of AWAIT
};

// Fails unless a list that came from elsewhere is ascending within the neurons that are there
struct pinfer_check_list_arguments {
    const int32_t *indices, *count;
    int64_t neurons;
};

// MARK notes the time and totals[0] (of a tally); PACE waits until `seconds` have passed since, and
// `seconds_per_active` for each that totals[0] has grown by. totals may be null.
struct pinfer_pace_arguments {
    int64_t* mark;  // [2]
    const int64_t* totals;
    double seconds, seconds_per_active;
};

}  // extern "C"
