// y = down(silu(gate x) * up x) for rows of several networks at once: the experts of a layer.
//
// Per network: pack its rows, multiply them by gate and up, activate and pack what came out, multiply that by down.
// All of it is tasks of one call, so threads are woken once, not for each product of each network. They take tasks in
// their order, each of the four steps for all networks before the next: what a task needs is nearly always there.
#include <algorithm>
#include <atomic>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "product.h"
#include "silu.h"
#include "threads.h"

namespace {

// As Python hands it over. The panels of gate_up hold the gate's columns, and then up's.
struct Network {
    int64_t rows;
    const void *gate_up, *down;
    int64_t is_bf16;
};

// Wait for what another thread does at this moment; it may have been put aside, and need our core.
template <class Ready>
void await(const Ready& ready) {
    for (int i = 0; !ready(); i++) i < 256 ? spin_pause() : std::this_thread::yield();
}

// Rows on their way through a network: pack, multiply by gate and up, activate and pack, multiply by down.
class Passage {
  public:
    static int64_t scratch_floats(int64_t rows, int64_t hidden, int64_t inner) { return rows * (hidden + 3 * inner); }

    Passage(const float* x, const Network& network, int64_t hidden, int64_t inner, float* scratch, float* y,
            int num_threads)
        : x_(x), rows_(network.rows), hidden_(hidden), inner_(inner), packed_x_(scratch),
          gate_up_out_(packed_x_ + rows_ * hidden), packed_h_(gate_up_out_ + rows_ * 2 * inner),
          gate_up_(packed_x_, rows_, network.gate_up, network.is_bf16, 2 * inner, hidden, gate_up_out_, num_threads),
          down_(packed_h_, rows_, network.down, network.is_bf16, hidden, inner, y, num_threads),
          tiles_(rows_), packs_left_(tiles_.count), first_products_left_(gate_up_.num_tasks),
          activations_left_(tiles_.count) {}

    int64_t num_tiles() const { return tiles_.count; }
    int64_t num_first_products() const { return gate_up_.num_tasks; }
    int64_t num_second_products() const { return down_.num_tasks; }
    int64_t multiplications() const { return gate_up_.multiplications() + down_.multiplications(); }

    void pack(int64_t tile) {
        pack_tile(x_, hidden_, rows_, hidden_, tile, packed_x_);
        packs_left_.fetch_sub(1);
    }

    void first_product(int64_t task) {
        await([&] { return packs_left_.load() == 0; });
        gate_up_.run(task);
        first_products_left_.fetch_sub(1);
    }

    void activate(int64_t tile) {
        await([&] { return first_products_left_.load() == 0; });
        for (int64_t r = tiles_.first(tile); r < tiles_.first(tile + 1); r++) {
            float* gate = gate_up_out_ + r * 2 * inner_;
            silu_mul_row(gate, gate + inner_, inner_, gate);
        }
        pack_tile(gate_up_out_, 2 * inner_, rows_, inner_, tile, packed_h_);
        activations_left_.fetch_sub(1);
    }

    void second_product(int64_t task) {
        await([&] { return activations_left_.load() == 0; });
        down_.run(task);
    }

  private:
    const float* x_;
    int64_t rows_, hidden_, inner_;
    float *packed_x_, *gate_up_out_, *packed_h_;
    Product gate_up_, down_;
    Tiles tiles_;
    std::atomic<int64_t> packs_left_, first_products_left_, activations_left_;
};

struct Task {
    Passage* passage;
    void (Passage::*step)(int64_t);
    int64_t index;
};

// Run networks, each with at least one row, whose rows lie one after the other.
void run_block(Region& region, const std::vector<Network>& networks, const float* x, int64_t hidden, int64_t inner,
               float* y) {
    int64_t rows = 0, multiplications = 0;
    for (const Network& network : networks) rows += network.rows;
    float* scratch = region.scratch(Passage::scratch_floats(rows, hidden, inner));
    std::deque<Passage> passages;
    for (const Network& network : networks) {
        passages.emplace_back(x, network, hidden, inner, scratch, y, region.num_threads());
        multiplications += passages.back().multiplications();
        scratch += Passage::scratch_floats(network.rows, hidden, inner);
        x += network.rows * hidden;
        y += network.rows * hidden;
    }
    std::vector<Task> tasks;
    auto add = [&](Passage& passage, void (Passage::*step)(int64_t), int64_t count) {
        for (int64_t i = 0; i < count; i++) tasks.push_back({&passage, step, i});
    };
    for (Passage& passage : passages) add(passage, &Passage::pack, passage.num_tiles());
    for (Passage& passage : passages) add(passage, &Passage::first_product, passage.num_first_products());
    for (Passage& passage : passages) add(passage, &Passage::activate, passage.num_tiles());
    for (Passage& passage : passages) add(passage, &Passage::second_product, passage.num_second_products());
    std::reverse(tasks.begin(), tasks.end());  // threads take the last one first
    auto run = [&](int64_t i) { (tasks[i].passage->*tasks[i].step)(tasks[i].index); };
    region.run(tasks.size(), run, multiplications >= kSmall);
}

}  // namespace

// x and y [rows][hidden]: the first network's rows, then the next one's.
extern "C" void tw_gated_mlps(const float* x, int64_t count, const Network* networks, int64_t hidden, int64_t inner,
                              float* y) {
    Region region;
    std::vector<Network> block;
    int64_t rows = 0, done = 0;  // of the block; of all before it
    auto run = [&] {
        if (rows) run_block(region, block, x + done * hidden, hidden, inner, y + done * hidden);
        done += std::exchange(rows, 0);
        block.clear();
    };
    for (const Network* network = networks; network < networks + count; network++)
        for (int64_t left = network->rows; left > 0;) {
            block.push_back(*network);
            block.back().rows = std::min(left, kMaxBlockRows - rows);
            rows += block.back().rows;
            left -= block.back().rows;
            if (rows == kMaxBlockRows) run();
        }
    run();
}
