// Threads that help one leader through many short steps. An OpenMP region for every panel would wait, at each
// of its ends, for every thread to be scheduled: on a busy machine that made two threads several times slower
// than one (docs/experiments/solver-choices.md). Here there is one region a sweep; the leader (the calling
// thread) goes through the panels and shares out tasks, the others take what they get to, and a thread that
// is not running delays nobody.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace coachhook {

class Crew {
 public:
  // Runs `lead` on this thread with the others at hand. What it throws is thrown here.
  template <typename Lead>
  void run(const Lead& lead) {
    const int64_t workers = at::get_num_threads();
    if (workers < 2 || at::in_parallel_region()) {
      lead();
      return;
    }
    stop_ = false;
    manned_ = true;
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        if (worker == 0) {
          const Release release{*this};
          lead();
        } else {
          help();
        }
      }
    });
  }

  // task(0) .. task(count - 1), in any order, on any of the threads; returns when all are done. Leader only.
  template <typename Task>
  void share(int64_t count, const Task& task) {
    if (!manned_ || count < 2 || count >= kCountLimit) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    argument_.store(&task, std::memory_order_relaxed);
    call_.store([](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); },
                std::memory_order_relaxed);
    finished_.store(0, std::memory_order_relaxed);
    ticket_.store(((++generation_) << 40) | (static_cast<uint64_t>(count) << 20), std::memory_order_release);
    while (take_one()) {
    }
    for (int spins = 0; finished_.load(std::memory_order_acquire) != count; ++spins) pause(spins);
  }

 private:
  static constexpr int64_t kCountLimit = 1 << 20;

  struct Release {
    Crew& crew;
    ~Release() {
      crew.manned_ = false;
      crew.stop_.store(true, std::memory_order_release);
    }
  };

  // The ticket holds the generation, the count and the next task in one word: who swaps it owns that task of
  // that generation, whose argument stays valid until the leader has counted it as finished.
  bool take_one() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const uint64_t next = ticket & (kCountLimit - 1), count = (ticket >> 20) & (kCountLimit - 1);
      if (next >= count) return false;
      const void* argument = argument_.load(std::memory_order_relaxed);
      const Call call = call_.load(std::memory_order_relaxed);
      if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
        call(argument, static_cast<int64_t>(next));
        finished_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  void help() {
    for (int spins = 0; !stop_.load(std::memory_order_acquire); ++spins) {
      if (take_one()) {
        spins = 0;
      } else {
        pause(spins);
      }
    }
  }

  static void pause(int spins) {
    if (spins > 256) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  using Call = void (*)(const void*, int64_t);
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> finished_{0};
  std::atomic<const void*> argument_{nullptr};
  std::atomic<Call> call_{nullptr};
  std::atomic<bool> stop_{false};
  bool manned_ = false;  // the leader's own
  uint64_t generation_ = 0;
};

}  // namespace coachhook
