// Runs random programs on the C++ core in buffers of exactly the size that abi.h promises, for sanitizers to watch.
//
//   fuzz_core PROGRAMS [SEED]
//
// With FUZZ_GUARD_PAGES each buffer ends where a page that may not be touched begins, which catches what
// sanitizers do not see: masked and compressing loads and stores, and what -O3 makes of the code.
//
// Every instruction set runs the same programs on 1, 2 and 3 threads, and half of each on a worker beside
// the other half: the results must be the same bit for bit (any NaN equals any other) and hold nothing of what the output held before. Compiled with
// FUZZ_OWN_THREADS it starts std::threads, which ThreadSanitizer understands, and not OpenMP's, which it does not.
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include <unistd.h>

#include "fuzz_memory.h"
#include "kernels.h"

using namespace pinfer;

extern "C" {
int32_t pinfer_use(const char* name);
int32_t pinfer_knows_type(int32_t type);
uint64_t pinfer_read(const uint8_t* p, int64_t count, int32_t threads);
int32_t pinfer_run(const pinfer_step* steps, int64_t count, int32_t threads);
pinfer_worker* pinfer_worker_new(int32_t, const int32_t*, int32_t, int32_t, int64_t, double);
void pinfer_worker_free(pinfer_worker* worker);
}

namespace {

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
                                                  one_in(2) ? nullptr : m.floats(w.rows), m.output(tokens * w.rows),
                                                  scratch});
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
    a.shift = one_in(3) ? m.floats(neurons) : nullptr;
    a.gate_bias = one_in(3) ? m.floats(neurons) : nullptr, a.cutoff = one_in(3) ? 0.5f : 0.0f;
    a.activation = int32_t(below(6)), a.int8 = int32_t(below(2));
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
    if (one_in(4)) {
        m.step(PINFER_SOFTCAP, pinfer_softcap_arguments{m.floats(count), count, 0.7f, m.output(count)});
        return;
    }
    if (one_in(3)) {
        m.step(PINFER_ADD, pinfer_add_arguments{m.floats(count), m.floats(count), count, m.output(count)});
        return;
    }
    const float* up = one_in(2) ? m.floats(count) : nullptr;
    const int64_t neurons = count && count % 7 == 0 ? count / 7 : count;
    const float* shift = one_in(2) ? m.floats(neurons) : nullptr;
    m.step(PINFER_GLU, pinfer_glu_arguments{m.floats(count), up, shift, one_in(2) ? m.floats(neurons) : nullptr, count,
                                            neurons, int32_t(below(6)), up ? 0 : int32_t(below(2)),
                                            one_in(3) ? 0.5f : 0.0f, m.output(count)});
}

void add_sign_scores(Memory& m) {
    const int64_t tokens = from_to(1, 9), neurons = from_to(0, 90), columns = from_to(1, 300), words = (columns + 31) / 32;
    const uint32_t* signs = reinterpret_cast<const uint32_t*>(m.bytes(neurons * words * 4));
    uint32_t* packed = reinterpret_cast<uint32_t*>(m.output(tokens * words, false));
    m.step(PINFER_SIGN_SCORES, pinfer_sign_scores_arguments{m.floats(tokens * columns), signs, tokens, neurons, columns,
                                                            m.output(tokens * neurons), packed});
}

void add_norm(Memory& m) {
    const int64_t rows = from_to(0, 9), columns = from_to(1, 200);
    if (one_in(2)) {
        m.step(PINFER_LAYER_NORM,
               pinfer_layer_norm_arguments{m.floats(rows * columns), m.floats(columns), one_in(2) ? m.floats(columns) : nullptr,
                                           one_in(2) ? m.floats(rows * columns) : nullptr, rows, columns, 1e-5f,
                                           m.output(rows * columns)});
        return;
    }
    m.step(PINFER_RMS_NORM, pinfer_rms_norm_arguments{m.floats(rows * columns), m.floats(columns),
                                                      one_in(2) ? m.floats(rows * columns) : nullptr, rows, columns,
                                                      1e-5f, m.output(rows * columns)});
}

void add_rope(Memory& m) {
    const int64_t tokens = from_to(1, 9), heads = from_to(1, 4), dim = 2 * from_to(1, 20), start = below(6);
    const int64_t head_dim = dim + below(4), count = tokens * heads * head_dim, angles = (start + tokens) * dim / 2;
    m.step(PINFER_ROPE, pinfer_rope_arguments{m.floats(count), m.floats(angles), m.floats(angles),
                                              m.of<int64_t>({start}), tokens, heads, head_dim, dim, int32_t(below(2)),
                                              m.output(count)});
}

void add_attention(Memory& m) {
    const int64_t tokens = from_to(1, 16), kv_heads = from_to(1, 3), heads = kv_heads * from_to(1, 3);
    const int64_t d = from_to(1, 70), kv = tokens * kv_heads * d;
    const int64_t start = below(60), context = start + tokens + below(3);
    m.step(PINFER_ATTENTION,
           pinfer_attention_arguments{m.floats(tokens * heads * d), m.floats(kv), m.floats(kv),
                                      m.floats(kv_heads * context * d), m.floats(kv_heads * context * d),
                                      m.of<int64_t>({start}), tokens, heads, kv_heads, d, context,
                                      one_in(2) ? 0 : from_to(1, 20), 0.2f, one_in(2) ? 0.0f : 0.9f, m.output(tokens * heads * d),
                                      m.output(3 * (context + 64), false)});  // 64: room for a vector
}

void add_tally(Memory& m) {
    const int64_t tokens = from_to(1, 5), neurons = from_to(0, 70);
    uint8_t* mask = one_in(2) ? nullptr : m.bytes(tokens * neurons);
    m.step(PINFER_TALLY, pinfer_tally_arguments{m.of<int32_t>({7}), mask, tokens, neurons, m.of<int64_t>({0, 0})});
}

void add_tally_kept(Memory& m) {
    const int64_t tokens = from_to(1, 5), inputs = from_to(0, 70);
    m.step(PINFER_TALLY_KEPT, pinfer_tally_kept_arguments{m.floats(tokens * inputs), tokens, inputs,
                                                          m.of<float>({0.7f}), m.of<int64_t>({0, 0})});
}

void add_top_k(Memory& m) {
    const int64_t count = one_in(2) ? from_to(1, 40) : from_to(200, 1500), k = from_to(1, std::min<int64_t>(count, 256));
    int64_t* indices = m.of(std::vector<int64_t>(size_t(k)));
    m.step(PINFER_TOP_K, pinfer_top_k_arguments{m.floats(count), count, k, m.output(k), indices});
}

void add_split_active(Memory& m) {
    std::vector<int64_t> bounds{0};
    for (int64_t parts = from_to(1, 4); parts > 0; --parts) bounds.push_back(bounds.back() + below(40));
    const int64_t parts = int64_t(bounds.size()) - 1, neurons = bounds.back();
    std::vector<int32_t> listed;
    for (int64_t n = 0; n < neurons; ++n)
        if (below(2)) listed.push_back(int32_t(n));
    auto* counts = reinterpret_cast<int32_t*>(m.output(parts));
    auto* out = reinterpret_cast<int32_t*>(m.output(neurons, false));
    m.step(PINFER_SPLIT_ACTIVE, pinfer_split_active_arguments{m.of(listed), m.of<int32_t>({int32_t(listed.size())}),
                                                              parts, m.of(bounds), out, counts});
}

void add_copy(Memory& m) {
    const int64_t count = one_in(5) ? from_to(262000, 263000) : from_to(0, 90);
    m.step(PINFER_COPY, pinfer_copy_arguments{reinterpret_cast<const uint8_t*>(m.floats(count)), 4 * count,
                                              reinterpret_cast<uint8_t*>(m.output(count))});
}

void (*const ADD[])(Memory&) = {
    add_dequantize,   add_embed, add_matmul, add_matmul,    add_select,      add_sparse_ffn, add_sparse_ffn,
    add_input_sparse, add_sign_scores, add_norm,  add_rope,   add_attention, add_elementwise, add_tally,
    add_tally_kept,   add_top_k, add_split_active, add_copy,
};

#if defined(FUZZ_OWN_THREADS)
const Kernels* table = nullptr;

bool use(const std::string& name) {
    table = name == "portable" ? &portable::TABLE : nullptr;
#if defined(__x86_64__)
    if (name == "avx2" && __builtin_cpu_supports("avx2")) table = &avx2::TABLE;
    if (name == "avx512" && __builtin_cpu_supports("avx512vnni")) table = &avx512::TABLE;
#endif
    return table && pinfer_use(name.c_str());
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

// The later half of the steps is a worker's job, beside the earlier half.
void run_forked(const Memory& m, pinfer_worker* worker) {
    const size_t half = m.steps.size() / 2;
    pinfer_job job{worker, m.steps.data() + half, int64_t(m.steps.size() - half), nullptr, 0, 0, 0};
    const pinfer_job_arguments arguments{&job};
    std::vector<pinfer_step> program(m.steps.begin(), m.steps.begin() + long(half));
    program.insert(program.begin(), {PINFER_FORK, &arguments});
    program.push_back({PINFER_JOIN, &arguments});
    if (pinfer_run(program.data(), int64_t(program.size()), 1)) die("a forked job failed");
}

template <class Run>
std::vector<uint32_t> results(const Memory& m, Run run) {
    for (const auto& output : m.outputs) std::fill_n(output.words, output.count, UNWRITTEN);
    run();
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
    std::setvbuf(stdout, nullptr, _IONBF, 0);
#if defined(FUZZ_GUARD_PAGES)
    std::signal(SIGSEGV, tell);
#endif
    std::signal(SIGABRT, tell);
    std::vector<pinfer_worker*> workers;
    for (int32_t threads : {1, 2, 3}) workers.push_back(pinfer_worker_new(threads, nullptr, 0, -1, 2000, 300.0));
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
            const auto alone = results(memory, [&] { run(memory, 1); });
            for (int threads : {2, 3})
                if (results(memory, [&] { run(memory, threads); }) != alone)
                    die("the number of threads changes the result");
            for (auto* worker : workers)
                if (results(memory, [&] { run_forked(memory, worker); }) != alone) die("a worker changes the result");
            steps += int64_t(memory.steps.size());
            check_reads();
        }
        std::printf("%s: %lld programs, %lld steps, nothing found\n", set.c_str(), (long long)programs,
                    (long long)steps);
    }
    for (auto* worker : workers) pinfer_worker_free(worker);
    return 0;
}
