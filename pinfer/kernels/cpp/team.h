// The threads that run a program together: barriers that spin and then sleep, and shared counters.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__linux__)
#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pinfer {

using Clock = std::chrono::steady_clock;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#if defined(__linux__)
// Sleeps while `word` is `value`, at most about a tenth of a second.
inline void sleep_on(const std::atomic<int32_t>& word, int32_t value) {
    const timespec limit{0, 100'000'000};
    syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, &limit, nullptr, 0);
}
inline void wake_all(const std::atomic<int32_t>& word) {
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
#else
inline void sleep_on(const std::atomic<int32_t>&, int32_t) { std::this_thread::yield(); }
inline void wake_all(const std::atomic<int32_t>&) {}
#endif

// Threads that have cores of their own arrive within a piece of work of each other. One that waits
// longer may be waiting for a thread without a core.
constexpr int64_t SPIN_US = 60;

// Whether ready() came true within so many microseconds. What spins for long lets other threads have its core.
template <class Ready>
bool spin_until(Ready ready, int64_t microseconds) {
    const auto begun = Clock::now();
    for (auto waited = begun - begun;; waited = Clock::now() - begun) {
        for (int i = 0; i < 16; ++i) {
            if (ready()) return true;
            relax();
        }
        if (waited >= std::chrono::microseconds(microseconds)) return false;
        if (waited >= std::chrono::microseconds(SPIN_US)) std::this_thread::yield();
    }
}

// A number that threads wait for: they spin for a while and then sleep.
struct Signal {
    alignas(64) std::atomic<int32_t> value{0};
    alignas(64) std::atomic<int32_t> sleepers{0};

    void set(int32_t to) {
        value.store(to);
        if (sleepers.load()) wake_all(value);
    }

    // Whether it was no longer `from` before the time was over.
    bool wait_while(int32_t from, int64_t spin_us, double timeout_s) {
        if (spin_until([&] { return value.load(std::memory_order_acquire) != from; }, spin_us)) return true;
        const auto begun = Clock::now();
        sleepers.fetch_add(1);
        bool changed = value.load() != from;
        while (!changed && std::chrono::duration<double>(Clock::now() - begun).count() < timeout_s) {
            sleep_on(value, from);
            changed = value.load() != from;
        }
        sleepers.fetch_sub(1);
        return changed;
    }
};

struct Shared {
    alignas(64) std::atomic<int32_t> arrived{0};
    Signal phase;
    alignas(64) std::atomic<int64_t> next{0};
    std::atomic<int32_t> stop{0};  // waits within steps are to end
    int32_t status = 0;            // of the program; written by thread 0 between two barriers
};

// One thread's view. Work is handed out in pieces from a shared counter, so a thread whose core is
// taken away delays the others by one piece and not by its share of the whole.
struct Team {
    int id, size;
    Shared* shared;
    int32_t status = 0;  // not 0 where a step failed: the rest is not run

    // Everything before is visible to every thread after; the counter starts again at 0. Who waits long sleeps.
    void barrier() {
        if (size == 1) {
            shared->next.store(0, std::memory_order_relaxed);
            return;
        }
        const int32_t phase = shared->phase.value.load(std::memory_order_relaxed);
        if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            shared->arrived.store(0, std::memory_order_relaxed);
            shared->next.store(0, std::memory_order_relaxed);
            shared->phase.set(int32_t(uint32_t(phase) + 1));
        } else {
            while (!shared->phase.wait_while(phase, SPIN_US, 1e9)) {
            }
        }
    }

    // Thread 0 does something whose status is everyone's.
    template <class Body>
    void lead(Body body) {
        if (id == 0) shared->status = body();
        barrier();
        status = shared->status;
        barrier();
    }

    // The start of the next `count` items, which this thread now owns.
    int64_t take(int64_t count) {
        if (size == 1) {
            const int64_t at = shared->next.load(std::memory_order_relaxed);
            shared->next.store(at + count, std::memory_order_relaxed);
            return at;
        }
        return shared->next.fetch_add(count, std::memory_order_relaxed);
    }

    // body(first, last) over pieces of [0, total); ends without a barrier.
    template <class Body>
    void share(int64_t total, int64_t piece, Body body) {
        for (int64_t first = take(piece); first < total; first = take(piece))
            body(first, first + piece < total ? first + piece : total);
    }
};

}  // namespace pinfer
