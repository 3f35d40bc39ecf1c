// Steps that order programs and time them: one thread of the team acts, the others wait for what came of it.
#pragma once

#include "kernels.h"
#include "worker.h"

namespace pinfer {

constexpr int64_t SPIN_FOR_FLAG_US = 2000, NAP_US = 50;

inline int32_t await(const pinfer_flag_arguments& a, const Shared& shared) {
    const auto raised = [&] { return int32_t(uint32_t(__atomic_load_n(a.flag, __ATOMIC_ACQUIRE)) - uint32_t(*a.epoch)) >= 0; };
    Patience patience{a.timeout_s};
    if (spin_until(raised, SPIN_FOR_FLAG_US)) return PINFER_DONE;
    while (!raised()) {
        if (patience.over() || shared.stop.load()) return PINFER_TIMED_OUT;
        std::this_thread::sleep_for(std::chrono::microseconds(NAP_US));
    }
    return PINFER_DONE;
}

inline int32_t check_list(const pinfer_check_list_arguments& a) {
    if (*a.count < 0 || *a.count > a.neurons) return PINFER_BAD_LIST;
    for (int32_t i = 0, before = -1; i < *a.count; before = a.indices[i++])
        if (a.indices[i] <= before || a.indices[i] >= a.neurons) return PINFER_BAD_LIST;
    return PINFER_DONE;
}

inline int32_t mark(const pinfer_pace_arguments& a) {
    a.mark[0] = Clock::now().time_since_epoch().count();
    a.mark[1] = a.totals ? a.totals[0] : 0;
    return PINFER_DONE;
}

inline int32_t pace(const pinfer_pace_arguments& a, const Shared& shared) {
    const double active = a.totals ? double(a.totals[0] - a.mark[1]) : 0;
    const Clock::time_point begun{Clock::duration(a.mark[0])};
    const double until = a.seconds + a.seconds_per_active * active;
    for (double left = until; left > 0 && !shared.stop.load(); left = until - seconds_since(begun)) {
        // Naps end up to a millisecond late on a virtual machine.
        if (left > 5e-3) std::this_thread::sleep_for(std::chrono::duration<double>(left < 0.1 ? left - 3e-3 : 0.1));
        relax();
    }
    return PINFER_DONE;
}

inline int32_t control(const pinfer_step& step, const Shared& shared) {
    const auto& job = *static_cast<const pinfer_job_arguments*>(step.arguments);
    const auto& flag = *static_cast<const pinfer_flag_arguments*>(step.arguments);
    const auto& timing = *static_cast<const pinfer_pace_arguments*>(step.arguments);
    switch (step.kind) {
        case PINFER_FORK: return job.job->worker->submit(*job.job);
        case PINFER_JOIN: return job.job->worker->wait(*job.job);
        case PINFER_AWAIT: return await(flag, shared);
        case PINFER_RAISE: __atomic_store_n(flag.flag, *flag.epoch, __ATOMIC_RELEASE); return PINFER_DONE;
        case PINFER_CHECK_LIST: return check_list(*static_cast<const pinfer_check_list_arguments*>(step.arguments));
        case PINFER_MARK: return mark(timing);
        default: return pace(timing, shared);
    }
}

inline void run_steps_of(const Kernels& kernels, Team& team, const pinfer_step* steps, int64_t count) {
    for (int64_t i = 0; i < count && !team.status; ++i) {
        if (steps[i].kind < PINFER_KINDS)
            kernels.run[steps[i].kind](team, steps[i].arguments);
        else
            team.lead([&] { return control(steps[i], *team.shared); });
    }
}

// After a program that failed: what it started must not go on using its memory.
inline void wait_for_forks(const pinfer_step* steps, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (steps[i].kind == PINFER_FORK) {
            const pinfer_job& job = *static_cast<const pinfer_job_arguments*>(steps[i].arguments)->job;
            job.worker->wait(job);
        }
}

}  // namespace pinfer
