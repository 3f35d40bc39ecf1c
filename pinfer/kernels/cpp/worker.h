// Workers: threads of their own that run jobs (programs) beside the thread that submits them.
//
// A worker's threads stay for its whole life. They spin for a while after each job, as the next layer's
// is mostly near, and then sleep. It has one job at a time; who submits another waits for the first. No
// wait is endless: what takes longer than the worker's time ends with a status.
#pragma once

#include <algorithm>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include <pthread.h>

#include "abi.h"
#include "team.h"

namespace pinfer {

// How often this process has come out of fork(), along which threads do not come.
inline std::atomic<int32_t> forks{0};
inline const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

// Runs steps as one thread of a team, until one fails (control.h).
void run_steps(Team& team, const pinfer_step* steps, int64_t count);

inline double seconds_since(Clock::time_point begun) {
    return std::chrono::duration<double>(Clock::now() - begun).count();
}

// The time that a wait may still take. What passes between two looks counts for no more than MOST_BETWEEN_LOOKS_S:
// while the whole process is stopped (Ctrl-Z), nobody could have answered.
struct Patience {
    static constexpr double LOOK_S = 0.1, MOST_BETWEEN_LOOKS_S = 2 * LOOK_S;  // a waiter looks at least so often
    double left_s;
    Clock::time_point looked = Clock::now();

    bool over() {
        const auto now = Clock::now();
        left_s -= std::min(std::chrono::duration<double>(now - looked).count(), MOST_BETWEEN_LOOKS_S);
        looked = now;
        return left_s <= 0;
    }
};

}  // namespace pinfer

struct pinfer_worker {
    // `settle(id)` puts thread id where it belongs, and says whether it could.
    pinfer_worker(int32_t threads, int64_t spin_us, double timeout_s, std::function<bool(int32_t)> settle)
        : size(threads), spin_us(spin_us), timeout_s(timeout_s) {
        try {
            for (int32_t id = 0; id < threads; ++id)
                team.emplace_back([this, id, settle] {
                    settled.fetch_add(settle(id));
                    started.fetch_add(1);
                    serve(id);
                });
        } catch (const std::exception&) {  // the system has no more threads
            end_threads();
            throw;
        }
        while (started.load() < threads) std::this_thread::yield();
    }

    int32_t submit(pinfer_job& job) {
        if (!here() || stopped.load()) return PINFER_STOPPED;
        if (!claim()) return PINFER_TIMED_OUT;
        current = &job;
        job.ticket = ++submitted;
        posted.set(int32_t(job.ticket));
        return PINFER_DONE;
    }

    // Waits until a job has run, if it was ever submitted; its status, or why it cannot be had.
    int32_t wait(const pinfer_job& job) {
        if (!job.ticket) return PINFER_DONE;
        if (!here()) return PINFER_STOPPED;
        pinfer::Patience patience{timeout_s};
        for (int64_t at = done.load(); at < job.ticket; at = done.load()) {
            if (patience.over()) return PINFER_TIMED_OUT;
            finished.wait_while(int32_t(at), spin_us, std::min(patience.left_s, pinfer::Patience::LOOK_S));
        }
        return job.status;
    }

    // Ends the threads once the job they run is done; false where that takes too long, or in another process.
    bool stop() {
        if (!here()) return false;
        if (stopped.load()) return true;
        shared.stop.store(1);
        if (!claim()) return false;
        end_threads();
        return true;
    }

    std::atomic<int32_t> settled{0};  // threads that are where they belong

private:
    bool here() const { return born == pinfer::forks.load(); }

    // Takes the worker for one job, or for its end.
    bool claim() {
        const auto take = [this] {
            int32_t idle = 0;
            return busy.compare_exchange_strong(idle, 1);
        };
        pinfer::Patience patience{timeout_s};
        while (!pinfer::spin_until(take, spin_us)) {
            if (patience.over()) return false;
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
        return true;
    }

    void end_threads() {
        stopped.store(1);
        posted.set(posted.value.load() + 1);
        for (auto& thread : team) thread.join();
    }

    void serve(int32_t id) {
        for (int32_t seen = 0;;) {
            while (!posted.wait_while(seen, spin_us, 1e9)) {
            }
            seen = posted.value.load();  // one more: the next job waits for this thread as well
            if (stopped.load()) return;
            pinfer::Team one{id, size, &shared};
            pinfer::run_steps(one, current->steps, current->count);
            one.barrier();
            if (id) continue;
            current->status = one.status;
            const int64_t ticket = current->ticket;
            busy.store(0);  // from here on `current` may be another
            done.store(ticket);
            finished.set(int32_t(ticket));
        }
    }

    const int32_t size;
    const int64_t spin_us;
    const double timeout_s;
    const int32_t born = pinfer::forks.load();
    std::atomic<int32_t> busy{0}, stopped{0}, started{0};
    int64_t submitted = 0;  // the last ticket; of whoever has claimed
    pinfer_job* current = nullptr;
    std::atomic<int64_t> done{0};
    pinfer::Signal posted, finished;  // the low halves of the last tickets
    pinfer::Shared shared;
    std::vector<std::thread> team;  // last: its threads use all of the above
};
