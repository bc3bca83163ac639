// A product of rows and a weight, in tasks that any threads may run in any order.
#pragma once

#include <cstdint>

constexpr int64_t kMaxBlockRows = 1008;  // of one product: bounds the memory for packed rows; whole tiles of them

// What waking a thread costs is more than a product of fewer multiplications.
constexpr int64_t kSmall = 65536;

// Rows are packed for a product: in tiles of nearly equal height, [k][rows of the tile], as many numbers as before.
struct Tiles {
    int64_t rows, count;
    explicit Tiles(int64_t rows);
    int64_t first(int64_t t) const { return rows * t / count; }
    int64_t height(int64_t t) const { return first(t + 1) - first(t); }
};

// Pack tile t of `rows` rows of `depth` numbers; they begin `stride` numbers apart.
void pack_tile(const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t t, float* packed);

// y [rows][columns] = x W^T in fp32; x packed as above, W in panels of bf16 or fp32 (product.cpp).
struct Product {
    const float* packed;
    int64_t rows;
    const char* weight;
    bool is_bf16;
    int64_t columns, depth;
    float* y;
    int64_t num_tasks, tile_groups, strips_per_task;

    // With enough tasks for so many threads, and at least one row.
    Product(const float* packed, int64_t rows, const void* weight, bool is_bf16, int64_t columns, int64_t depth,
            float* y, int num_threads);

    int64_t multiplications() const { return rows * columns * depth; }
    int64_t strips() const;
    void run(int64_t task) const;
};
