// Causal attention over the paged cache, one online softmax per query row.
//
// A row folds its keys 64 positions at a time, counted from position 0 of its sequence. Inside a fold
// the score of a key is one chain over the head's dimensions, and an output one chain over the fold's keys.
// None of it depends on which rows share the tile, where the chunk began or which blocks hold the keys.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "simd.h"
#include "spans.h"
#include "threads.h"

namespace {

constexpr int kFold = 64;  // positions folded at once
constexpr int kFoldBlocks = kFold / kBlockSize;
constexpr int kTileRows = kRegisters == 32 ? 6 : 4;
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
constexpr int kTaskRows = 16 * kTileRows;  // share the keys and values of a fold while they are in cache
constexpr int kMaxDim = 512;

struct Problem {
    const float* q;  // [tokens][heads][dim]
    float* out;
    Spans spans;
    const float *keys, *values;  // [block][kv_head][dim][16], [block][kv_head][16][dim]
    int64_t heads, kv_heads, dim;
    float scale;
    int64_t window;

    int64_t group() const { return heads / kv_heads; }  // query heads that share a KV head
};

// A run of rows of one chunk and one KV head. Row r is head r % group of token r / group.
struct Task {
    int32_t chunk, kv_head;
    int64_t first_row, num_rows;
};

// The positions of a fold that a row sees: [begin, end), counted from the fold's start.
struct Range {
    int64_t begin, end;
    bool is_empty() const { return begin >= end; }
};

template <int Rows, int Vectors>
inline void score_tile(const float* q, int64_t dim, const float* const* keys, float* scores) {
    Floats sums[Rows][Vectors] = {};
    for (int64_t d = 0; d < dim; d++) {
        Floats k[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) k[v] = load(keys[v] + d * kBlockSize);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            Floats q_r = all(q[r * dim + d]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sums[r][v] = fma(q_r, k[v], sums[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vectors; v++) store(scores + r * kFold + v * kLanes, sums[r][v]);
}

// Score the fold's vectors [begin, end) of keys for some rows.
template <int Rows>
void score_rows(const float* q, int64_t dim, const float* const* key_blocks, int begin, int end, float* scores) {
    auto run = [&](auto count, int first) {
        constexpr int n = decltype(count)::value;
        const float* keys[n];
        for (int v = 0; v < n; v++) {
            int slot = (first + v) * kLanes;
            keys[v] = key_blocks[slot / kBlockSize] + slot % kBlockSize;
        }
        score_tile<Rows, n>(q, dim, keys, scores + first * kLanes);
    };
    for (; begin + kTileVectors <= end; begin += kTileVectors) run(std::integral_constant<int, kTileVectors>{}, begin);
    for (; begin < end; begin++) run(std::integral_constant<int, 1>{}, begin);
}

template <int Rows, int Vectors>
inline void add_tile(const float* weights, const float* const* value_blocks, int64_t dim, Range range, int64_t d,
                     float* sums) {
    Floats sum[Rows][Vectors];
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vectors; v++) sum[r][v] = load(sums + r * dim + d + v * kLanes);
    for (int64_t key = range.begin; key < range.end; key++) {
        const float* at = value_blocks[key / kBlockSize] + key % kBlockSize * dim + d;
        Floats values[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) values[v] = load(at + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
            Floats weight = all(weights[r * kFold + key]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; v++) sum[r][v] = fma(weight, values[v], sum[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < Vectors; v++) store(sums + r * dim + d + v * kLanes, sum[r][v]);
}

// Add the weighted values of the fold's keys in `range` to the sums of some rows.
template <int Rows>
void add_rows(const float* weights, const float* const* value_blocks, int64_t dim, Range range, float* sums) {
    if (range.is_empty()) return;
    int64_t d = 0;
    for (; d + kTileVectors * kLanes <= dim; d += kTileVectors * kLanes)
        add_tile<Rows, kTileVectors>(weights, value_blocks, dim, range, d, sums);
    for (; d < dim; d += kLanes) add_tile<Rows, 1>(weights, value_blocks, dim, range, d, sums);
}

// The state of a row's softmax between folds.
struct Softmax {
    float max = -std::numeric_limits<float>::infinity();
    Floats total = {};

    // Turn scores into weights, and scale what was summed under a smaller maximum.
    void fold(float* scores, Range range, float scale, float* sums, int64_t dim) {
        const Floats nothing = all(-std::numeric_limits<float>::infinity());
        int begin = range.begin / kLanes, end = (range.end + kLanes - 1) / kLanes;
        Words lane;
        for (int i = 0; i < kLanes; i++) lane[i] = i;
        Floats top = nothing;
        for (int v = begin; v < end; v++) {
            Words key = lane + static_cast<uint32_t>(v * kLanes);
            Floats score = load(scores + v * kLanes) * all(scale);
            score = key >= static_cast<uint32_t>(range.begin) ? score : nothing;
            score = key < static_cast<uint32_t>(range.end) ? score : nothing;
            store(scores + v * kLanes, score);
            top = ::max(top, score);
        }
        float new_max = std::max(max, max_of(top));
        Floats shrink = exp_nonpositive(all(max) - all(new_max));
        max = new_max;
        total = total * shrink;
        for (int v = begin; v < end; v++) {
            Floats weight = exp_nonpositive(load(scores + v * kLanes) - all(new_max));
            store(scores + v * kLanes, weight);
            total = total + weight;
        }
        if (shrink[0] == 1.0f) return;
        for (int64_t d = 0; d < dim; d += kLanes) store(sums + d, load(sums + d) * shrink);
    }
};

// Fold 64 positions into some rows.
template <int Rows>
void fold_rows(const Problem& p, const float* q, const float* const* key_blocks, const float* const* value_blocks,
               const Range* ranges, Softmax* softmax, float* sums) {
    alignas(64) float weights[Rows * kFold];
    Range seen{kFold, 0}, shared{0, kFold};  // by any row; by all
    for (int r = 0; r < Rows; r++) {
        if (!ranges[r].is_empty()) seen = {std::min(seen.begin, ranges[r].begin), std::max(seen.end, ranges[r].end)};
        shared = {std::max(shared.begin, ranges[r].begin), std::min(shared.end, ranges[r].end)};
    }
    if (seen.is_empty()) return;
    score_rows<Rows>(q, p.dim, key_blocks, seen.begin / kLanes, (seen.end + kLanes - 1) / kLanes, weights);
    for (int r = 0; r < Rows; r++)
        if (!ranges[r].is_empty()) softmax[r].fold(weights + r * kFold, ranges[r], p.scale, sums + r * p.dim, p.dim);

    // A row adds exactly the keys it sees, in order. Behind them the cache may hold anything, also NaN.
    auto add_alone = [&](int r, Range range) {
        add_rows<1>(weights + r * kFold, value_blocks, p.dim, range, sums + r * p.dim);
    };
    bool together = !shared.is_empty();
    for (int r = 0; r < Rows; r++) add_alone(r, {ranges[r].begin, together ? shared.begin : ranges[r].end});
    if (!together) return;
    add_rows<Rows>(weights, value_blocks, p.dim, shared, sums);
    for (int r = 0; r < Rows; r++) add_alone(r, {shared.end, ranges[r].end});
}

using FoldRows = decltype(&fold_rows<1>);

template <size_t... Rows>
constexpr std::array<FoldRows, sizeof...(Rows)> by_rows(std::index_sequence<Rows...>) {
    return {fold_rows<Rows + 1>...};
}
constexpr auto kByRows = by_rows(std::make_index_sequence<kTileRows>{});

void run_task(const Problem& p, const Task& task) {
    alignas(64) float q[kTaskRows * kMaxDim], sums[kTaskRows * kMaxDim];
    Softmax softmax[kTaskRows];
    int64_t position[kTaskRows], offset[kTaskRows];  // of each row: in its sequence, in q and out
    for (int64_t r = 0; r < task.num_rows; r++) {
        int64_t token = (task.first_row + r) / p.group(), head = (task.first_row + r) % p.group();
        position[r] = p.spans.position[task.chunk] + token;
        offset[r] = ((p.spans.token_start[task.chunk] + token) * p.heads + task.kv_head * p.group() + head) * p.dim;
        std::copy(p.q + offset[r], p.q + offset[r] + p.dim, q + r * p.dim);
    }
    std::fill(sums, sums + task.num_rows * p.dim, 0.0f);

    int64_t last = position[task.num_rows - 1], first = std::max<int64_t>(0, position[0] - p.window + 1);
    const int32_t* blocks = p.spans.blocks(task.chunk);
    for (int64_t start = first / kFold * kFold; start <= last; start += kFold) {
        const float *key_blocks[kFoldBlocks] = {}, *value_blocks[kFoldBlocks] = {};
        for (int i = 0; i < kFoldBlocks; i++) {
            int64_t block = start / kBlockSize + i;
            if (block < first / kBlockSize || block > last / kBlockSize) continue;  // perhaps not a block's number
            int64_t at = (blocks[block] * p.kv_heads + task.kv_head) * p.dim * kBlockSize;
            key_blocks[i] = p.keys + at;
            value_blocks[i] = p.values + at;
        }
        for (int64_t r = 0; r < task.num_rows; r += kTileRows) {
            Range ranges[kTileRows];
            int64_t rows = std::min<int64_t>(kTileRows, task.num_rows - r);
            for (int64_t i = 0; i < rows; i++)
                ranges[i] = {std::clamp<int64_t>(position[r + i] - p.window + 1 - start, 0, kFold),
                             std::clamp<int64_t>(position[r + i] + 1 - start, 0, kFold)};
            kByRows[rows - 1](p, q + r * p.dim, key_blocks, value_blocks, ranges, softmax + r, sums + r * p.dim);
        }
    }
    for (int64_t r = 0; r < task.num_rows; r++) {
        Floats total = all(sum_of(softmax[r].total));
        for (int64_t d = 0; d < p.dim; d += kLanes) store(p.out + offset[r] + d, load(sums + r * p.dim + d) / total);
    }
}

}  // namespace

// Layouts as in Problem. `window` counts the tokens that a token sees, itself included.
// Returns -1, or a chunk with a bad block (then nothing was written).
extern "C" int64_t tw_attention(const float* q, const Spans* spans, const float* keys, const float* values,
                                int64_t num_blocks, int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                                int64_t window, float* out) {
    int64_t bad = spans->bad_chunk(num_blocks, window - 1);
    if (bad >= 0) return bad;
    Problem problem{q, out, *spans, keys, values, heads, kv_heads, dim, scale, window};
    std::vector<Task> tasks;
    for (int32_t chunk = 0; chunk < spans->num_chunks; chunk++) {
        int64_t rows = spans->num_tokens(chunk) * problem.group();
        for (int64_t row = 0; row < rows; row += kTaskRows)
            for (int32_t g = 0; g < kv_heads; g++)
                tasks.push_back({chunk, g, row, std::min<int64_t>(kTaskRows, rows - row)});
    }
    Region region;
    region.run(tasks.size(), [&](int64_t i) { run_task(problem, tasks[i]); });
    return -1;
}
