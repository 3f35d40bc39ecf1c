// The threads that run a program together: barriers that spin and then sleep, and shared counters.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <thread>
#endif

namespace pinfer {

struct Shared {
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<int32_t> phase{0};
    alignas(64) std::atomic<int32_t> sleepers{0};
    alignas(64) std::atomic<int64_t> next{0};
};

// One thread's view. Work is handed out in pieces from a shared counter, so a thread whose core is
// taken away delays the others by one piece and not by its share of the whole.
struct Team {
    int id, size;
    Shared* shared;

    // Threads that have cores of their own arrive within a piece of work of each other. One that waits
    // longer is waiting for a thread without a core, and had better give up its own: sleep.
    static constexpr int SPIN_US = 60;

    // Everything before is visible to every thread after; the counter starts again at 0.
    void barrier() {
        if (size == 1) {
            shared->next.store(0, std::memory_order_relaxed);
            return;
        }
        const int32_t phase = shared->phase.load(std::memory_order_relaxed);
        if (shared->arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            shared->arrived.store(0, std::memory_order_relaxed);
            shared->next.store(0, std::memory_order_relaxed);
            shared->phase.store(phase + 1);
            if (shared->sleepers.load()) wake();
        } else if (!spin(phase)) {
            shared->sleepers.fetch_add(1);
            while (shared->phase.load() == phase) sleep(phase);
            shared->sleepers.fetch_sub(1);
        }
    }

    // Whether the phase ended while spinning.
    bool spin(int32_t phase) const {
        const auto begun = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - begun < std::chrono::microseconds(SPIN_US))
            for (int i = 0; i < 16; ++i) {
                if (shared->phase.load(std::memory_order_acquire) != phase) return true;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        return false;
    }

#if defined(__linux__)
    void sleep(int32_t phase) const { syscall(SYS_futex, &shared->phase, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0); }
    void wake() const { syscall(SYS_futex, &shared->phase, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
    void sleep(int32_t) const { std::this_thread::yield(); }
    void wake() const {}
#endif

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
