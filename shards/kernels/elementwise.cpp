// What happens to each row by itself: norms, rotations and the way into the KV cache.
#include <algorithm>

#include "simd.h"
#include "spans.h"
#include "threads.h"

namespace {

// Run row(0) .. row(rows - 1), on all threads if there is enough to do for a thread to be worth waking.
template <class Row>
void for_rows(int64_t rows, int64_t row_floats, const Row& row) {
    Region region;
    int64_t rows_per_task = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, row_floats));
    region.run((rows + rows_per_task - 1) / rows_per_task, [&](int64_t task) {
        int64_t end = std::min((task + 1) * rows_per_task, rows);
        for (int64_t r = task * rows_per_task; r < end; r++) row(r);
    });
}

void rms_norm_row(const float* x, const float* weight, int64_t dim, float eps, float* y) {
    Floats sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes)
        for (int j = 0; j < 4; j++) {
            Floats v = load(x + i + j * kLanes);
            sums[j] = fma(v, v, sums[j]);
        }
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < dim; i++) sum += x[i] * x[i];
    float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
    for (i = 0; i < dim; i++) y[i] = x[i] * scale * weight[i];
}

// Rotate each pair (i, i + dim / 2) by the angle of its position, as Hugging Face's rotate_half does.
void rotate(const float* x, const float* cos, const float* sin, int64_t dim, float* y, int64_t y_stride) {
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        y[i * y_stride] = x[i] * cos[i] - x[i + half] * sin[i];
        y[(i + half) * y_stride] = x[i + half] * cos[i] + x[i] * sin[i];
    }
}

}  // namespace

extern "C" void tw_rms_norm(const float* x, const float* weight, int64_t rows, int64_t dim, float eps, float* y) {
    for_rows(rows, dim, [=](int64_t r) { rms_norm_row(x + r * dim, weight, dim, eps, y + r * dim); });
}

// qkv [tokens][(heads + 2 * kv_heads) * dim] -> q [tokens][heads * dim], keys [block][kv_head][dim][16],
// values [block][kv_head][16][dim]. Returns -1, or a chunk with a bad block (then nothing was written).
extern "C" int64_t tw_rope_and_cache(const float* qkv, const Spans* spans, const float* cos, const float* sin,
                                     float* keys, float* values, int64_t num_blocks, int64_t heads,
                                     int64_t kv_heads, int64_t dim, float* q) {
    int64_t bad = spans->bad_chunk(num_blocks, 0);
    if (bad >= 0) return bad;
    int64_t row_floats = (heads + 2 * kv_heads) * dim;
    const int32_t* starts = spans->token_start;
    for_rows(starts[spans->num_chunks], 2 * row_floats, [=](int64_t t) {
        int64_t chunk = std::upper_bound(starts, starts + spans->num_chunks + 1, t) - starts - 1;
        int64_t position = spans->position[chunk] + t - starts[chunk], slot = position % kBlockSize;
        int64_t block = spans->blocks(chunk)[position / kBlockSize];
        const float* row = qkv + t * row_floats;
        const float *cos_t = cos + position * (dim / 2), *sin_t = sin + position * (dim / 2);
        for (int64_t h = 0; h < heads; h++)
            rotate(row + h * dim, cos_t, sin_t, dim, q + (t * heads + h) * dim, 1);
        for (int64_t g = 0; g < kv_heads; g++) {
            const float *k = row + (heads + g) * dim, *v = k + kv_heads * dim;
            int64_t base = (block * kv_heads + g) * dim * kBlockSize;
            rotate(k, cos_t, sin_t, dim, keys + base + slot, kBlockSize);
            std::copy(v, v + dim, values + base + slot * dim);
        }
    });
    return -1;
}
