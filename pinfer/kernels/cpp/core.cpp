// The C ABI: picks the widest instruction set the processor has, runs programs on a team of threads and
// on workers beside it, and places those threads and their memory.
#include <algorithm>
#include <cstring>

#include <omp.h>
#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "control.h"

namespace {

using namespace pinfer;

// The widest set that this build (PINFER_HAS_…) and the processor both have, or the named one; else null.
const Kernels* table_for(const char* name) {
    [[maybe_unused]] const auto wanted = [name](const char* set) { return !name || !std::strcmp(name, set); };
#if defined(PINFER_HAS_AVX2) || defined(PINFER_HAS_AVX512)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(PINFER_HAS_AVX512)
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx512 && wanted("avx512")) return &avx512::TABLE;
#endif
#if defined(PINFER_HAS_AVX2)
    if (avx2 && wanted("avx2")) return &avx2::TABLE;
#endif
#if defined(PINFER_HAS_PORTABLE)
    if (wanted("portable")) return &portable::TABLE;
#endif
    return nullptr;
}

const Kernels* chosen = table_for(nullptr);

// ---- where threads run ---------------------------------------------------------------------------

constexpr int MOST = 4096;  // processors, and threads of a team

struct {
    int32_t count = 0;  // 0: threads run where the system puts them
    int32_t cpus[MOST];
} pins;  // the processor of each thread of a team

int32_t pin_of(int id) { return id < pins.count ? pins.cpus[id] : -1; }

#if defined(__linux__)

struct Mask {
    uint64_t words[MOST / 64];
};
thread_local struct {
    int32_t cpu = -1;  // where this thread is pinned
    Mask before;       // where it might run until then
} own;

// Pins this thread to a processor, or lets go of it with -1. False where the system refuses.
bool move_to(int32_t cpu) {
    if (cpu == own.cpu) return true;
    if (own.cpu < 0) {
        own.before = {};
        if (syscall(SYS_sched_getaffinity, 0, sizeof(Mask), &own.before) < 0) return false;
    }
    Mask mask = own.before;
    if (cpu >= 0) {
        mask = {};
        mask.words[cpu / 64] = uint64_t(1) << (cpu % 64);
    }
    if (syscall(SYS_sched_setaffinity, 0, sizeof(Mask), &mask)) return false;
    own.cpu = cpu;
    return true;
}

bool set_memory_policy(int32_t mode, const uint64_t* nodes, int64_t bits) {
    // The kernel reads one bit less than it is told of.
    return syscall(SYS_set_mempolicy, mode, mode == MPOL_DEFAULT ? nullptr : nodes, mode == MPOL_DEFAULT ? 0 : bits + 1) == 0;
}

#else

bool move_to(int32_t cpu) { return cpu < 0; }
bool set_memory_policy(int32_t, const uint64_t*, int64_t) { return false; }

#endif

constexpr int64_t NODES = 1024;  // the most nodes Linux can be built for
constexpr int32_t PREFERRED = 1;  // as set_mempolicy numbers it

}  // namespace

void pinfer::run_steps(Team& team, const pinfer_step* steps, int64_t count) { run_steps_of(*chosen, team, steps, count); }

extern "C" {

// Forces an instruction set by name, or null for the widest; false if this processor or build lacks it.
int32_t pinfer_use(const char* name) {
    const Kernels* table = table_for(name);
    if (table) chosen = table;
    return table != nullptr;
}

// Null where this build has no set that the processor has; nothing may run then.
const char* pinfer_instruction_set() {
#if defined(PINFER_HAS_AVX512)
    if (chosen == &avx512::TABLE) return "avx512";
#endif
#if defined(PINFER_HAS_AVX2)
    if (chosen == &avx2::TABLE) return "avx2";
#endif
    return chosen ? "portable" : nullptr;
}

int32_t pinfer_knows_type(int32_t type) { return chosen->knows(type); }

int64_t pinfer_scratch(int64_t tokens, int64_t columns) { return pinfer_scratch_bytes(tokens, columns); }

// Runs the steps in order, each by all threads together. What a program that fails has forked has ended, too,
// or its worker has not answered in time.
int32_t pinfer_run(const pinfer_step* steps, int64_t count, int32_t threads) {
    Shared shared;
    const auto work = [&](int id, int size) {
        move_to(pin_of(id));
        Team team{id, size, &shared};
        run_steps(team, steps, count);
    };
    if (threads <= 1) {
        work(0, 1);
    } else {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
    }
    move_to(-1);  // the caller's thread is not ours to keep: what it starts later would inherit the pin
    if (shared.status) wait_for_forks(steps, count);
    return shared.status;
}

// A worker of so many threads, thread i on processor cpus[i] where `cpu_count` is above it, taking memory from a
// node unless that is -1. Its threads spin so long before they sleep; waits for it take at most `timeout_s`.
// Null where the system has no more threads.
pinfer_worker* pinfer_worker_new(
    int32_t threads, const int32_t* cpus, int32_t cpu_count, int32_t node, int64_t spin_us, double timeout_s
) {
    const std::vector<int32_t> places(cpus, cpus + cpu_count);
    const auto settle = [=](int32_t id) {
        uint64_t mask[NODES / 64] = {};
        if (node >= 0 && node < NODES) mask[node / 64] = uint64_t(1) << (node % 64);
        const bool pinned = id >= cpu_count || (places[size_t(id)] < MOST && move_to(places[size_t(id)]));
        return pinned && (node < 0 || set_memory_policy(PREFERRED, mask, NODES));
    };
    try {
        return new pinfer_worker(threads, spin_us, timeout_s, settle);
    } catch (const std::exception&) {
        return nullptr;
    }
}

// How many of its threads are where they belong.
int32_t pinfer_worker_settled(const pinfer_worker* worker) { return worker->settled.load(); }

// Ends a worker's threads; later jobs are refused. 0 where it is still busy after its time, or another process's.
int32_t pinfer_worker_stop(pinfer_worker* worker) { return worker->stop(); }

// Stops it and lets go of its memory, unless its threads may still use that.
void pinfer_worker_free(pinfer_worker* worker) {
    if (worker->stop()) delete worker;
}

// Gives a job to its worker, and waits for its end.
int32_t pinfer_submit(pinfer_job* job) { return job->worker->submit(*job); }
int32_t pinfer_wait(const pinfer_job* job) { return job->worker->wait(*job); }

// Runs a job and the ones chained to it beside each other, and notes in each how that went. A CUDA host function.
void pinfer_run_job(void* first) {
    for (auto* job = static_cast<pinfer_job*>(first); job; job = job->next) job->refused = pinfer_submit(job);
    for (auto* job = static_cast<pinfer_job*>(first); job; job = job->next)
        if (!job->refused) job->refused = pinfer_wait(job);
}

// Pins thread i of every later team to processor cpus[i], for as long as it runs one; count 0 lets them go.
// Returns how many the system would pin. Not while a program runs.
int32_t pinfer_pin(const int32_t* cpus, int32_t count) {
    const int32_t threads = std::max({pins.count, count, 1});
    pins.count = std::min<int32_t>(count, MOST);
    for (int32_t i = 0; i < pins.count; ++i) pins.cpus[i] = cpus[i] < MOST ? cpus[i] : -1;
    int32_t pinned = 0;
#pragma omp parallel num_threads(threads) reduction(+ : pinned)
    {
        const int32_t cpu = pin_of(omp_get_thread_num());
        pinned += move_to(cpu) && cpu >= 0;
    }
    move_to(-1);
    return pinned;
}

// Where memory comes from that the caller and the threads of a team touch first, from now on: `mode` as
// set_mempolicy numbers it (0 default, 1 preferred, 3 interleaved), over `count` nodes. Returns how many
// of `threads` threads the system did it for.
int32_t pinfer_memory(int32_t mode, const int32_t* nodes, int32_t count, int32_t threads) {
    uint64_t mask[NODES / 64] = {};
    for (int32_t i = 0; i < count; ++i)
        if (nodes[i] >= 0 && nodes[i] < NODES) mask[nodes[i] / 64] |= uint64_t(1) << (nodes[i] % 64);
    int32_t done = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done)
    done += set_memory_policy(mode, mask, NODES);
    return done;
}

// The node that the page at an address comes from, or -1 where the system does not say.
int32_t pinfer_node_of(const void* address) {
#if defined(__linux__)
    int32_t node = -1;
    if (!syscall(SYS_get_mempolicy, &node, nullptr, 0, address, MPOL_F_NODE | MPOL_F_ADDR)) return node;
#endif
    (void)address;
    return -1;
}

// Reads count bytes with all threads; the sum keeps the reads from being dropped.
uint64_t pinfer_read(const uint8_t* p, int64_t count, int32_t threads) {
    uint64_t total = 0;
    const int64_t share = count / threads / 4096 * 4096;
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static)
    for (int32_t t = 0; t < threads; ++t) total += chosen->read_all(p + t * share, share);
    return total;
}

}  // extern "C"
