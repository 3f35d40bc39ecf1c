// The tables of kernels, one for each instruction set, and what they share.
#pragma once

#include "abi.h"
#include "team.h"

// Bytes of scratch for tokens rounded to int8, whatever the type and the instruction set; a multiple of 64.
inline int64_t pinfer_scratch_bytes(int64_t tokens, int64_t columns) {
    const int64_t padded = (tokens + 7) / 8 * 8;  // whole tiles of tokens, see gemm.h
    return padded * (3 * columns + 1024) / 64 * 64 + 64;
}

namespace pinfer {

struct Kernels {
    void (*run[PINFER_KINDS])(Team&, const void* arguments);
    bool (*knows)(int32_t type);  // whether a GGUF type number is known
    uint64_t (*read_all)(const uint8_t* p, int64_t count);  // a sum of all words, to measure bandwidth
};

namespace portable {
extern const Kernels TABLE;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels TABLE;
}
namespace avx512 {
extern const Kernels TABLE;
}
#endif

}  // namespace pinfer
