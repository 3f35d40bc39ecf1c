// Runs random programs on the C++ core in buffers of exactly the size that abi.h promises, for sanitizers to watch.
//
//   fuzz_core PROGRAMS [SEED]
// With FUZZ_GUARD_PAGES each buffer ends where a page that may not be touched begins, which catches what
// sanitizers do not see: masked and compressing loads and stores, and what -O3 makes of the code.
//
// Every instruction set runs the same programs on 1, 2 and 3 threads: the results must be the same bit
// for bit (any NaN equals any other) and hold nothing of what the output held before. Compiled with
// FUZZ_OWN_THREADS it starts std::threads, which ThreadSanitizer understands, and not OpenMP's, which it does not.
#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(p, n) ASAN_POISON_MEMORY_REGION(p, n)
#else
#define POISON(p, n) (void)(n)
#endif

#if defined(FUZZ_GUARD_PAGES)
#include <sys/mman.h>
#endif

#include <unistd.h>

#include "kernels.h"

using namespace pinfer;

extern "C" {
int32_t pinfer_use(const char* name);
int32_t pinfer_knows_type(int32_t type);
uint64_t pinfer_read(const uint8_t* p, int64_t count, int32_t threads);
void pinfer_run(const pinfer_step* steps, int64_t count, int32_t threads);
}

namespace {

std::mt19937_64 rng;
int64_t below(int64_t n) { return int64_t(rng() % uint64_t(n)); }
int64_t from_to(int64_t low, int64_t high) { return low + below(high - low + 1); }
bool one_in(int64_t n) { return below(n) == 0; }

struct WeightType {
    const char* name;
    int id, size, bytes;
    std::vector<int> halves;  // where a block keeps its fp16 scale and minimum
};
const std::vector<WeightType> TYPES = {
    {"F32", 0, 1, 4, {}},          {"F16", 1, 1, 2, {}},          {"BF16", 30, 1, 2, {}},
    {"Q8_0", 8, 32, 34, {0}},      {"Q4_0", 2, 32, 18, {0}},      {"Q4_1", 3, 32, 20, {0, 2}},
    {"Q5_0", 6, 32, 22, {0}},      {"Q5_1", 7, 32, 24, {0, 2}},   {"Q2_K", 10, 256, 84, {80, 82}},
    {"Q3_K", 11, 256, 110, {108}}, {"Q4_K", 12, 256, 144, {0, 2}}, {"Q5_K", 13, 256, 176, {0, 2}},
    {"Q6_K", 14, 256, 210, {208}},
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

const WeightType& any_type() { return TYPES[size_t(below(int64_t(TYPES.size())))]; }
int64_t columns_for(int64_t block) { return block == 1 ? from_to(1, 300) : block * from_to(1, block == 32 ? 40 : 5); }
int64_t few_or_many() { return one_in(3) ? 1 : one_in(20) ? from_to(250, 270) : from_to(2, 40); }

void add_dequantize(Memory& m) {
    const auto& type = any_type();
    const pinfer_matrix w = m.matrix(type, from_to(0, 12), columns_for(type.size));
    m.step(PINFER_DEQUANTIZE, pinfer_dequantize_arguments{w, m.output(w.rows * w.columns)});
}

void add_embed(Memory& m) {
    const auto& type = any_type();
    const pinfer_matrix w = m.matrix(type, from_to(1, 12), columns_for(type.size));
    std::vector<int64_t> ids(size_t(from_to(1, 9)));
    for (auto& id : ids) id = below(w.rows);
    const int64_t tokens = int64_t(ids.size());
    m.step(PINFER_EMBED, pinfer_embed_arguments{w, m.of(ids), tokens, 1.5f, m.output(tokens * w.columns)});
}

void add_matmul(Memory& m) {
    const auto& type = any_type();
    const int64_t tokens = few_or_many();
    const pinfer_matrix w = m.matrix(type, from_to(1, 50), columns_for(type.size));
    const int32_t int8 = type.size > 1 && !one_in(4);
    uint8_t* scratch = int8 ? m.scratch(pinfer_scratch_bytes(tokens, w.columns)) : nullptr;
    m.step(PINFER_MATMUL, pinfer_matmul_arguments{w, m.floats(tokens * w.columns), tokens, int8,
                                                  m.output(tokens * w.rows), scratch});
}

void add_select(Memory& m) {
    const int64_t tokens = from_to(1, 16), neurons = from_to(0, 100), stride = below(2);
    int32_t* indices = m.of(std::vector<int32_t>(size_t(neurons)));
    int32_t* count = m.of(std::vector<int32_t>(1));
    m.step(PINFER_SELECT_ACTIVE, pinfer_select_arguments{m.floats(tokens * neurons), tokens, neurons,
                                                         m.floats(stride ? neurons : 1), stride, indices, count});
    m.outputs.push_back({reinterpret_cast<uint32_t*>(count), 1, true});
}

void add_sparse_ffn(Memory& m) {
    const auto &gate = any_type(), &up = one_in(3) ? any_type() : gate, &down = one_in(3) ? any_type() : gate;
    const int64_t tokens = from_to(1, 16), neurons = from_to(1, 100);
    const int64_t columns = one_in(8) ? 256 * from_to(8, 10) : columns_for(std::max({gate.size, up.size, down.size}));
    std::vector<int32_t> listed;
    const int64_t share = below(4);  // of 3: none, some, all
    for (int64_t n = 0; n < neurons; ++n)
        if (below(3) < share) listed.push_back(int32_t(n));
    if (one_in(6)) listed.assign(1, int32_t(below(neurons)));
    uint8_t* mask = one_in(2) ? nullptr : m.bytes(tokens * neurons);
    for (int64_t i = 0; mask && i < tokens * neurons; ++i) mask[i] &= 1;
    pinfer_sparse_ffn_arguments a{};
    a.gate = m.matrix(gate, neurons, columns);
    if (!one_in(5)) a.up = m.matrix(up, neurons, columns);
    a.down = m.matrix(down, neurons, columns);
    a.x = m.floats(tokens * columns), a.tokens = tokens;
    a.indices = m.of(listed), a.count = m.of<int32_t>({int32_t(listed.size())});
    a.mask = mask, a.gate_values = one_in(3) ? m.floats(tokens * neurons) : nullptr;
    a.activation = int32_t(below(4)), a.int8 = int32_t(below(2));
    a.y = m.output(tokens * columns), a.hidden = m.output(neurons * tokens, false);
    a.scratch = a.int8 ? m.scratch(2 * pinfer_scratch_bytes(tokens, columns)) : nullptr;
    m.step(PINFER_SPARSE_FFN, a);
}

void add_input_sparse(Memory& m) {
    const auto& type = any_type();
    const int64_t tokens = from_to(1, 16), columns = one_in(4) ? 256 * from_to(8, 10) : columns_for(type.size);
    const pinfer_matrix w = m.matrix(type, from_to(1, 60), columns);
    const float threshold = one_in(4) ? 9.0f : one_in(3) ? -1.0f : 0.7f;
    m.step(PINFER_INPUT_SPARSE,
           pinfer_input_sparse_arguments{w, m.floats(tokens * w.rows), tokens, m.of<float>({threshold}),
                                         m.output(tokens * w.columns), m.output(tokens * w.rows, false)});
}

void add_elementwise(Memory& m) {
    const int64_t count = one_in(3) ? from_to(8000, 17000) : from_to(0, 70);
    if (one_in(2)) {
        m.step(PINFER_ADD, pinfer_add_arguments{m.floats(count), m.floats(count), count, m.output(count)});
        return;
    }
    const float* up = one_in(2) ? m.floats(count) : nullptr;
    m.step(PINFER_GLU, pinfer_glu_arguments{m.floats(count), up, count, int32_t(below(4)), up ? 0 : int32_t(below(2)),
                                            m.output(count)});
}

void add_norm(Memory& m) {
    const int64_t rows = from_to(0, 9), columns = from_to(1, 200);
    m.step(PINFER_RMS_NORM, pinfer_rms_norm_arguments{m.floats(rows * columns), m.floats(columns),
                                                      one_in(2) ? m.floats(rows * columns) : nullptr, rows, columns,
                                                      1e-5f, m.output(rows * columns)});
}

void add_rope(Memory& m) {
    const int64_t tokens = from_to(1, 9), heads = from_to(1, 4), dim = 2 * from_to(1, 20), start = below(6);
    const int64_t head_dim = dim + below(4), count = tokens * heads * head_dim, angles = (start + tokens) * dim / 2;
    m.step(PINFER_ROPE, pinfer_rope_arguments{m.floats(count), m.floats(angles), m.floats(angles), m.of<int64_t>({start}),
                                              tokens, heads, head_dim, dim, int32_t(below(2)), m.output(count)});
}

void add_attention(Memory& m) {
    const int64_t tokens = from_to(1, 16), kv_heads = from_to(1, 3), heads = kv_heads * from_to(1, 3), d = from_to(1, 70);
    const int64_t start = below(60), context = start + tokens + below(3), kv = tokens * kv_heads * d;
    m.step(PINFER_ATTENTION,
           pinfer_attention_arguments{m.floats(tokens * heads * d), m.floats(kv), m.floats(kv),
                                      m.floats(kv_heads * context * d), m.floats(kv_heads * context * d),
                                      m.of<int64_t>({start}), tokens, heads, kv_heads, d, context,
                                      one_in(2) ? 0 : from_to(1, 20), 0.2f, m.output(tokens * heads * d),
                                      m.output(3 * (context + 64), false)});  // 64: room for a vector
}

void add_tally(Memory& m) {
    const int64_t tokens = from_to(1, 5), neurons = from_to(0, 70);
    uint8_t* mask = one_in(2) ? nullptr : m.bytes(tokens * neurons);
    m.step(PINFER_TALLY, pinfer_tally_arguments{m.of<int32_t>({7}), mask, tokens, neurons, m.of<int64_t>({0, 0})});
}

void (*const ADD[])(Memory&) = {add_dequantize, add_embed,       add_matmul, add_matmul, add_select,    add_sparse_ffn,
                                add_sparse_ffn, add_input_sparse, add_norm,   add_rope,   add_attention, add_elementwise,
                                add_tally};

#if defined(FUZZ_OWN_THREADS)
const Kernels* table = nullptr;

bool use(const std::string& name) {
    table = name == "portable" ? &portable::TABLE : nullptr;
#if defined(__x86_64__)
    if (name == "avx2" && __builtin_cpu_supports("avx2")) table = &avx2::TABLE;
    if (name == "avx512" && __builtin_cpu_supports("avx512vnni")) table = &avx512::TABLE;
#endif
    return table;
}

void run(const Memory& m, int threads) {
    Shared shared;
    std::vector<std::thread> others;
    const auto work = [&](int id) {
        Team team{id, threads, &shared};
        for (const auto& step : m.steps) table->run[step.kind](team, step.arguments);
    };
    for (int id = 1; id < threads; ++id) others.emplace_back(work, id);
    work(0);
    for (auto& other : others) other.join();
}

void check_reads() {}
#else
bool use(const std::string& name) { return pinfer_use(name.c_str()); }
void run(const Memory& m, int threads) { pinfer_run(m.steps.data(), int64_t(m.steps.size()), threads); }

void check_reads() {
    Memory m;
    const int64_t count = from_to(0, 40000);
    pinfer_read(m.bytes(count, below(64)), count, int32_t(from_to(1, 3)));
    for (int32_t id = -2; id < 300; ++id) pinfer_knows_type(id);
}
#endif

[[noreturn]] void die(const char* why) {
    std::fprintf(stderr, "%s\n", why);
    std::abort();
}

std::vector<uint32_t> results(const Memory& m, int threads) {
    for (const auto& output : m.outputs) std::fill_n(output.words, output.count, UNWRITTEN);
    run(m, threads);
    std::vector<uint32_t> all;
    for (const auto& output : m.outputs)
        for (int64_t i = 0; output.complete && i < output.count; ++i) {
            const uint32_t word = output.words[i];
            if (word == UNWRITTEN) die("an output is left unwritten");
            all.push_back((word & 0x7fffffffu) > 0x7f800000u ? UNWRITTEN : word);
        }
    return all;
}

char now[200];  // which program runs, for whoever has to find out why it died

void tell(int signal) {
    (void)!write(2, now, std::strlen(now));
    std::signal(signal, SIG_DFL);
    raise(signal);
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t programs = argc > 1 ? std::atoll(argv[1]) : 100;
    const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
#if defined(FUZZ_GUARD_PAGES)
    std::signal(SIGSEGV, tell);
#endif
    std::signal(SIGABRT, tell);
    for (const std::string set : {"portable", "avx2", "avx512"}) {
        if (!use(set)) {
            std::printf("%s: this processor or build lacks it\n", set.c_str());
            continue;
        }
        int64_t steps = 0;
        for (int64_t program = 0; program < programs; ++program) {
            rng.seed(seed * 1000003 + uint64_t(program));
            std::snprintf(now, sizeof now, "%s: died in program %lld of seed %llu\n", set.c_str(), (long long)program,
                          (unsigned long long)seed);
            Memory memory;
            for (int64_t i = from_to(1, 4); i > 0; --i) ADD[below(std::size(ADD))](memory);
            const auto alone = results(memory, 1);
            for (int threads : {2, 3})
                if (results(memory, threads) != alone) die("the number of threads changes the result");
            steps += int64_t(memory.steps.size());
            check_reads();
        }
        std::printf("%s: %lld programs, %lld steps, nothing found\n", set.c_str(), (long long)programs, (long long)steps);
    }
    return 0;
}
