#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Call = void (*)(const void* task, int64_t index);

// Wait for ready() to hold: spin for spin_us at most. Returns what ready() said last.
template <class Ready>
bool spin(int64_t spin_us, const Ready& ready) {
    if (ready()) return true;
    if (spin_us <= 0) return false;
    auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us);
    do {
        for (int i = 0; i < 16; i++) {
            if (ready()) return true;
            spin_pause();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return ready();
}

class Pool {
  public:
    std::mutex region;
    float* scratch = nullptr;
    size_t scratch_floats = 0;

    int num_threads() const { return 1 + static_cast<int>(workers_.size()); }

    void resize(int num_threads, int64_t spin_us) {
        stopping_ = true;
        publish(0);
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        stopping_ = false;
        spin_us_ = spin_us;
        uint64_t seen = generation();
        for (int i = 1; i < num_threads; i++) workers_.emplace_back([this, seen] { work(seen); });
    }

    void run(int64_t num_tasks, Call call, const void* task) {
        if (num_tasks <= 1 || workers_.empty()) {
            for (int64_t i = num_tasks; i-- > 0;) call(task, i);
            return;
        }
        call_.store(call, std::memory_order_relaxed);
        task_.store(task, std::memory_order_relaxed);
        unfinished_.store(num_tasks, std::memory_order_relaxed);
        publish(static_cast<uint32_t>(num_tasks));
        take_tasks(generation());
        auto finished = [this] { return unfinished_.load() == 0; };
        if (spin(spin_us_, finished)) return;
        std::unique_lock lock(sleep_);
        caller_sleeps_ = true;
        finished_.wait(lock, finished);
        caller_sleeps_ = false;
    }

  private:
    uint64_t generation() const { return ticket_.load() >> 32; }

    void publish(uint32_t num_tasks) {
        ticket_.store((generation() + 1) << 32 | num_tasks);
        if (sleepers_.load() == 0) return;
        { std::lock_guard lock(sleep_); }  // a worker between its last look and its sleep would miss the call
        wake_.notify_all();
    }

    // A task is claimed by counting the ticket down, and only while it is of the generation that the
    // worker was woken for: one that comes late finds zero or another generation, and touches nothing.
    void take_tasks(uint64_t mine) {
        uint64_t seen = ticket_.load();
        while (seen >> 32 == mine && static_cast<uint32_t>(seen) > 0) {
            if (!ticket_.compare_exchange_weak(seen, seen - 1)) continue;
            // From here to the decrement the region cannot end, so call_ and task_ stay what they are.
            call_.load(std::memory_order_relaxed)(task_.load(std::memory_order_relaxed),
                                                  static_cast<uint32_t>(seen) - 1);
            if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
                { std::lock_guard lock(sleep_); }
                finished_.notify_all();
            }
            seen = ticket_.load();
        }
    }

    void work(uint64_t seen) {
        auto called = [&] { return generation() != seen; };
        while (true) {
            if (!spin(spin_us_, called)) {
                std::unique_lock lock(sleep_);
                sleepers_++;
                wake_.wait(lock, called);
                sleepers_--;
            }
            if (stopping_) return;
            seen = generation();
            take_tasks(seen);
        }
    }

    std::vector<std::thread> workers_;
    int64_t spin_us_ = 0;
    std::atomic<bool> stopping_{false};
    std::atomic<uint64_t> ticket_{0};  // high half: generation of the region; low half: tasks not yet claimed
    std::atomic<int64_t> unfinished_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> task_{nullptr};
    std::mutex sleep_;
    std::condition_variable wake_, finished_;
    std::atomic<int> sleepers_{0};
    std::atomic<bool> caller_sleeps_{false};
};

// Never destroyed: its threads may outlive main(). A forked child has none of them, so it starts anew.
Pool*& pool() {
    static Pool* the_pool = [] {
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
        return new Pool;
    }();
    return the_pool;
}

}  // namespace

Region::Region() { pool()->region.lock(); }
Region::~Region() { pool()->region.unlock(); }
int Region::num_threads() const { return pool()->num_threads(); }

float* Region::scratch(size_t num_floats) {
    Pool& p = *pool();
    if (num_floats > p.scratch_floats) {
        free(p.scratch);
        p.scratch_floats = (num_floats + 15) / 16 * 16;
        p.scratch = static_cast<float*>(aligned_alloc(64, p.scratch_floats * sizeof(float)));
        if (!p.scratch) {
            fprintf(stderr, "out of memory: no %zu bytes to pack rows\n", p.scratch_floats * sizeof(float));
            abort();
        }
    }
    return p.scratch;
}

void Region::run_erased(int64_t num_tasks, Erased call, const void* task) { pool()->run(num_tasks, call, task); }

extern "C" void tw_set_threads(int num_threads, int64_t spin_us) {
    Region region;
    pool()->resize(num_threads, spin_us);
}
