// Random weights and floats in buffers of exactly the size asked for, so that a byte too far is caught.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#else
#define POISON(p, n) (void)(n)
#endif

#if defined(FUZZ_GUARD_PAGES)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "abi.h"

inline std::mt19937_64 rng;
inline int64_t below(int64_t n) { return int64_t(rng() % uint64_t(n)); }
inline int64_t from_to(int64_t low, int64_t high) { return low + below(high - low + 1); }
inline bool one_in(int64_t n) { return below(n) == 0; }

struct WeightType {
    const char* name;
    int id, size, bytes;
    std::vector<int> halves;  // where a block keeps its fp16 scale and minimum
};
inline const std::vector<WeightType> TYPES = {
    {"F32", 0, 1, 4, {}},          {"F16", 1, 1, 2, {}},          {"BF16", 30, 1, 2, {}},
    {"Q8_0", 8, 32, 34, {0}},      {"Q4_0", 2, 32, 18, {0}},      {"Q4_1", 3, 32, 20, {0, 2}},
    {"Q5_0", 6, 32, 22, {0}},      {"Q5_1", 7, 32, 24, {0, 2}},   {"Q2_K", 10, 256, 84, {80, 82}},
    {"Q3_K", 11, 256, 110, {108}}, {"Q4_K", 12, 256, 144, {0, 2}}, {"Q5_K", 13, 256, 176, {0, 2}},
    {"Q6_K", 14, 256, 210, {208}}, {"IQ4_NL", 20, 32, 18, {0}},   {"IQ4_XS", 23, 256, 136, {0}},
};

constexpr uint32_t UNWRITTEN = 0x7fa1b2c3;  // a NaN that no kernel makes

struct Output {
    uint32_t* words;
    int64_t count;
    bool complete;  // whether a run must write all of it
};

#if defined(FUZZ_GUARD_PAGES)
struct Block {
    uint8_t* whole;
    size_t mapped;
    uint8_t* start;

    Block(size_t count, size_t) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), inner = (count + page - 1) / page * page;
        mapped = inner + page;
        void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) std::abort();
        whole = static_cast<uint8_t*>(p);
        mprotect(whole + inner, page, PROT_NONE);
        start = whole + inner - count;
    }
    void free() const { munmap(whole, mapped); }
};
#else
struct Block {
    uint8_t* start;

    Block(size_t count, size_t alignment) {
        start = static_cast<uint8_t*>(alignment == 1 ? std::malloc(count) : std::aligned_alloc(alignment, count));
    }
    void free() const { std::free(start); }
};
#endif

// The memory of one program: each buffer is an allocation of its own, so that a byte too far is caught.
class Memory {
public:
    ~Memory() {
        for (const Block& block : blocks) block.free();
    }
    Memory() = default;
    Memory(const Memory&) = delete;

    uint8_t* bytes(int64_t count, int64_t offset = 0) {
        blocks.emplace_back(size_t(offset + count), 1);
        uint8_t* p = blocks.back().start;
        for (int64_t i = 0; i < offset + count; ++i) p[i] = uint8_t(rng());
        return p + offset;
    }
    uint8_t* scratch(int64_t count) {
        blocks.emplace_back(size_t(count), 64);
        return blocks.back().start;
    }
    // Floats of moderate size, now and then one that is not; at any address that floats may have.
    float* floats(int64_t count) {
        float* p = reinterpret_cast<float*>(bytes(4 * count, 4 * below(5)));
        const float odd[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, 1e-42f, 3e38f};
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) p[i] = one_in(2000) ? odd[below(7)] : normal(rng);
        return p;
    }
    float* output(int64_t count, bool complete = true) {
        float* p = floats(count);
        outputs.push_back({reinterpret_cast<uint32_t*>(p), count, complete});
        return p;
    }
    template <class T>
    T* of(std::vector<T> values) {
        T* p = reinterpret_cast<T*>(bytes(int64_t(sizeof(T) * values.size())));
        std::copy(values.begin(), values.end(), p);
        return p;
    }
    template <class T>
    void step(pinfer_kind kind, T arguments) {
        steps.push_back({kind, of<T>({arguments})});
    }

    // Rows at any address, apart by more than their length; what lies between may not be touched.
    pinfer_matrix matrix(const WeightType& type, int64_t rows, int64_t columns) {
        const int64_t length = columns / type.size * type.bytes, gap = one_in(2) ? 0 : from_to(1, 70);
        uint8_t* p = bytes(rows ? (rows - 1) * (length + gap) + length : 0, below(64));
        for (int64_t r = 0; r < rows; ++r) {
            uint8_t* row = p + r * (length + gap);
            for (int64_t i = 0; i < length; i += type.bytes) fill(type, row + i);
            if (r + 1 < rows) POISON(row + length, size_t(gap));
        }
        return {p, length + gap, rows, columns, type.id};
    }

    std::vector<pinfer_step> steps;
    std::vector<Output> outputs;

private:
    // Random bytes, with scales of 2^-15 to 1 most of the time.
    void fill(const WeightType& type, uint8_t* block) {
        if (one_in(500)) return;
        for (int at : type.halves) block[at + 1] = uint8_t(below(60));
        if (type.size == 1) block[type.bytes - 1] = uint8_t(below(60));
    }
    std::vector<Block> blocks;
};
