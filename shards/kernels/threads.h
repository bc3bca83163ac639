// A small pool of persistent threads. The caller takes part, and never waits for a thread that sleeps.
#pragma once

#include <cstddef>
#include <cstdint>

// Tell the core that this thread spins.
inline void spin_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The right to run kernels: held for one call of the C API, so that calls of two threads take turns.
class Region {
  public:
    Region();
    ~Region();
    Region(const Region&) = delete;

    int num_threads() const;

    // Memory that lives until the next call of scratch() in any region; aligned to 64 bytes.
    float* scratch(size_t num_floats);

    // Run task(0) .. task(num_tasks - 1), each once, on any thread, the last one first; on this thread alone if they
    // are not worth waking another. Returns when all are done.
    template <class Task>
    void run(int64_t num_tasks, const Task& task, bool is_worth_waking = true) {
        if (!is_worth_waking) {
            while (num_tasks-- > 0) task(num_tasks);
            return;
        }
        run_erased(num_tasks, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
    }

  private:
    using Erased = void (*)(const void* task, int64_t index);
    void run_erased(int64_t num_tasks, Erased call, const void* task);
};
