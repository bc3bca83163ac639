// One product of all rows with one weight.
#include <algorithm>

#include "product.h"
#include "threads.h"

// x [rows][depth] and y [rows][columns] in fp32, weight in panels of bf16 or fp32.
extern "C" void tw_linear(const float* x, int64_t rows, const void* weight, int is_bf16, int64_t columns,
                          int64_t depth, float* y) {
    Region region;
    for (int64_t row = 0; row < rows; row += kMaxBlockRows) {
        int64_t count = std::min(kMaxBlockRows, rows - row);
        const float* packed = x + row * depth;  // one row is packed as it lies
        if (count > 1) {
            float* to = region.scratch(count * depth);
            auto pack = [&](int64_t t) { pack_tile(x + row * depth, depth, count, depth, t, to); };
            region.run(Tiles(count).count, pack, count * depth >= kSmall / 4);
            packed = to;
        }
        Product product(packed, count, weight, is_bf16, columns, depth, y + row * columns, region.num_threads());
        region.run(product.num_tasks, [&](int64_t i) { product.run(i); }, product.multiplications() >= kSmall);
    }
}
