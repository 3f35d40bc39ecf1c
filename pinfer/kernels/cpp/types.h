// One row for each weight type: the kernels that know its blocks.
#pragma once

#include "dots.h"
#include "gemm.h"
#include "rows.h"

namespace pinfer {
namespace PINFER_NAMESPACE {

constexpr int R = 4;  // rows that share a load of the activations

struct Type {
    int size, bytes;  // weights and bytes of a block
    void (*unpack)(const uint8_t* blocks, int64_t count, float* out);
    // `ahead`: the rows of the next call, to be read into the cache meanwhile.
    void (*dot_float)(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns, const float* x, float* out);
    void (*add_rows)(const uint8_t* const* rows, const uint8_t* const* ahead, const float* h, int64_t count, float* y);
    void (*add_rows_to_many)(const uint8_t* const* rows, const float* h, int64_t tokens, int64_t count, float* y,
                             int64_t y_stride);
    // Arithmetic in int8, which the float types have not: null there.
    int chunk;  // weights in one packed chunk
    int64_t (*pack_bytes)(int64_t columns);
    void (*pack)(const float* x, int64_t columns, int64_t first, int64_t last, uint8_t* out);
    void (*dot_packed)(const uint8_t* const* rows, const uint8_t* const* ahead, int64_t columns, const uint8_t* packed,
                       const uint8_t* end, float* out);
    void (*gemm)(Team& team, const pinfer_matmul_arguments& arguments);
};

template <class Blocks>
constexpr Type float_type() {
    return {1, Blocks::BLOCK_BYTES, unpack<Blocks>, dot_float<Blocks, R>, add_four_rows<Blocks>,
            add_four_rows_to_many<Blocks>, 1, nullptr, nullptr, nullptr, nullptr};
}

template <class Blocks>
constexpr int chunk_of() {
    if constexpr (IS_K<Blocks>) return 256;
    else return 32 * Scaled<Blocks>::BLOCKS;
}

template <class Blocks>
constexpr Type quant_type() {
    return {Blocks::SIZE, Blocks::BLOCK_BYTES, unpack<Blocks>, dot_float<Blocks, R>, add_four_rows<Blocks>,
            add_four_rows_to_many<Blocks>, chunk_of<Blocks>(), pack_bytes<Blocks>, pack<Blocks>, dot_packed<Blocks, R>,
            gemm<Blocks>};
}

// By GGUF's type number; size 0 marks a type this core does not know.
inline const Type& type_of(int ggml_id) {
    static constexpr Type TYPES[] = {
        float_type<Float32>(), float_type<Float16>(), quant_type<Q4_0>(), quant_type<Q4_1>(), {},
        {}, quant_type<Q5_0>(), quant_type<Q5_1>(), quant_type<Q8_0>(), {},
        quant_type<Q2_K>(), quant_type<Q3_K>(), quant_type<Q4_K>(), quant_type<Q5_K>(), quant_type<Q6_K>(),
    };
    static constexpr Type BF16 = float_type<BFloat16>(), UNKNOWN = {};
    static constexpr Type NL = quant_type<IQ4_NL>(), XS = quant_type<IQ4_XS>();
    if (ggml_id == 30) return BF16;
    if (ggml_id == 20) return NL;
    if (ggml_id == 23) return XS;
    return ggml_id >= 0 && ggml_id <= 14 ? TYPES[ggml_id] : UNKNOWN;
}

}  // namespace PINFER_NAMESPACE
}  // namespace pinfer
