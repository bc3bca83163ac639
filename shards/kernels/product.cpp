// y = x W^T, where each y[m][n] is one chain of fused multiply-adds over k = 0 .. K-1, in this order.
//
// The chain is the same for every tile size, blocking, number of threads and row beside it: storing a partial
// sum and loading it again is exact. So a row's result depends on the row and the weight alone.
//
// A weight lies in panels of 32 columns, [panel][k][32], the last one padded with zeros. In bf16 columns n and
// n + 16 share a 32-bit word (n in the low half): one load, a shift and a mask make two vectors of fp32.
#include "product.h"

#include <algorithm>
#include <array>
#include <utility>

#include "simd.h"

namespace {

constexpr int kPanel = 32;              // columns
constexpr int kHalf = kPanel / 2;       // columns n and n + 16 are computed together
constexpr int kStrips = kHalf / kLanes;  // a strip is one vector of each half; a panel has this many
constexpr int kMaxRows = (kRegisters - 4) / 2 < 14 ? (kRegisters - 4) / 2 : 14;  // of a tile, in registers
constexpr int kDepth = 384;       // of a slice of a panel, which then stays in the first-level cache for all tiles
constexpr int kTilesPerTask = 9;  // their slices stay in the second-level cache for all panels of the task
constexpr int kAhead = 4096;      // bytes: the processor's own prefetching ends at each page, ours does not

struct Bf16 {};

template <class Weight>
constexpr int kRowBytes = sizeof(float) * kPanel;  // of one k of a panel
template <>
constexpr int kRowBytes<Bf16> = sizeof(uint16_t) * kPanel;

struct Pair {
    Floats low, high;  // columns n .. and n + 16 ..
};

inline Pair load_pair(const char* at, float) {
    return {load(reinterpret_cast<const float*>(at)), load(reinterpret_cast<const float*>(at) + kHalf)};
}

inline Pair load_pair(const char* at, Bf16) {
    Words words = load_words(at);
    return {(Floats)(words << 16), (Floats)(words & 0xffff0000u)};
}

// Add `depth` terms to a tile of Rows rows and Strips strips of y, which starts from zero if `fresh`.
template <class Weight, int Rows, int Strips>
__attribute__((noinline)) void tile(const float* __restrict x, const char* const* strips, int64_t depth, bool fresh,
                                    float* const* y, int64_t y_stride) {
    Floats low[Strips][Rows], high[Strips][Rows];
    for (int s = 0; s < Strips; s++)
        for (int r = 0; r < Rows; r++) {
            low[s][r] = fresh ? Floats{} : load(y[s] + r * y_stride);
            high[s][r] = fresh ? Floats{} : load(y[s] + r * y_stride + kHalf);
        }
    const char* at[Strips];
    for (int s = 0; s < Strips; s++) at[s] = strips[s];
    for (int64_t k = 0; k < depth; k++) {
        Pair w[Strips];
#pragma GCC unroll 8
        for (int s = 0; s < Strips; s++) {
            for (int line = 0; line < kRowBytes<Weight>; line += 64) __builtin_prefetch(at[s] + kAhead + line);
            w[s] = load_pair(at[s], Weight{});
            at[s] += kRowBytes<Weight>;
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; r++) {
            Floats x_r = all(x[r]);
#pragma GCC unroll 8
            for (int s = 0; s < Strips; s++) {
                low[s][r] = fma(x_r, w[s].low, low[s][r]);
                high[s][r] = fma(x_r, w[s].high, high[s][r]);
            }
        }
        x += Rows;
    }
    for (int s = 0; s < Strips; s++)
        for (int r = 0; r < Rows; r++) {
            store(y[s] + r * y_stride, low[s][r]);
            store(y[s] + r * y_stride + kHalf, high[s][r]);
        }
}

// Strips side by side hide the latency of the chains of a tile with few rows.
constexpr int strips_for(int rows) {
    int strips = 4;
    while (strips > 1 && 2 * rows * strips > kRegisters - 8) strips /= 2;
    return strips;
}

// One slice of a weight: `depth` terms of all its columns, from term `k` on.
struct Slice {
    const char* weight;
    int64_t columns, total_depth, k, depth;
    float* y;

    template <class Weight>
    const char* strip(int64_t s) const {
        return weight + (s / kStrips * total_depth + k) * kRowBytes<Weight> + s % kStrips * sizeof(Floats);
    }
    static int64_t column(int64_t s) { return s / kStrips * kPanel + s % kStrips * kLanes; }
};

// Compute rows `row` .. of strips [begin, end), all of which lie within the columns of y.
template <class Weight, int Rows, int Strips>
void whole_strips(const Slice& slice, const float* x, int64_t row, int64_t begin, int64_t end) {
    int64_t s = begin;
    auto run = [&](auto count) {
        constexpr int n = decltype(count)::value;
        const char* strips[n];
        float* y[n];
        for (int i = 0; i < n; i++) {
            strips[i] = slice.strip<Weight>(s + i);
            y[i] = slice.y + row * slice.columns + slice.column(s + i);
        }
        tile<Weight, Rows, n>(x, strips, slice.depth, slice.k == 0, y, slice.columns);
        s += n;
    };
    while (s + Strips <= end) run(std::integral_constant<int, Strips>{});
    while (s < end) run(std::integral_constant<int, 1>{});
}

// Compute a strip of the last panel, whose padding has no place in y.
template <class Weight, int Rows>
void ragged_strip(const Slice& slice, const float* x, int64_t row, int64_t s) {
    float part[Rows][kPanel];
    float* at = slice.y + row * slice.columns + slice.column(s);
    auto width = [&](int64_t first) { return std::clamp<int64_t>(slice.columns - first, 0, kLanes) * sizeof(float); };
    int64_t low = width(slice.column(s)), high = width(slice.column(s) + kHalf);
    for (int r = 0; r < Rows && slice.k; r++) {
        memcpy(part[r], at + r * slice.columns, low);
        memcpy(part[r] + kHalf, at + r * slice.columns + kHalf, high);
    }
    const char* strip = slice.strip<Weight>(s);
    float* y = part[0];
    tile<Weight, Rows, 1>(x, &strip, slice.depth, slice.k == 0, &y, kPanel);
    for (int r = 0; r < Rows; r++) {
        memcpy(at + r * slice.columns, part[r], low);
        memcpy(at + r * slice.columns + kHalf, part[r] + kHalf, high);
    }
}

template <class Weight, int Rows>
void strips_of_tile(const Slice& slice, const float* x, int64_t row, int64_t begin, int64_t end) {
    int64_t whole = std::clamp(slice.columns / kPanel * kStrips, begin, end);
    whole_strips<Weight, Rows, strips_for(Rows)>(slice, x, row, begin, whole);
    for (int64_t s = whole; s < end; s++) ragged_strip<Weight, Rows>(slice, x, row, s);
}

using StripsOfTile = void (*)(const Slice&, const float*, int64_t, int64_t, int64_t);

template <class Weight, size_t... Rows>
constexpr std::array<StripsOfTile, sizeof...(Rows)> by_rows(std::index_sequence<Rows...>) {
    return {strips_of_tile<Weight, Rows + 1>...};
}
template <class Weight>
constexpr auto kByRows = by_rows<Weight>(std::make_index_sequence<kMaxRows>{});

template <class Weight>
void run_task(const Product& p, int64_t index) {
    Tiles tiles(p.rows);
    int64_t strips = p.strips(), strip_groups = p.num_tasks / p.tile_groups;
    int64_t first_tile = tiles.count * (index / strip_groups) / p.tile_groups;
    int64_t end_tile = tiles.count * (index / strip_groups + 1) / p.tile_groups;
    int64_t begin = index % strip_groups * p.strips_per_task, end = std::min(begin + p.strips_per_task, strips);
    int64_t slice_depth = end_tile - first_tile == 1 ? p.depth : kDepth;
    for (int64_t k = 0; k < p.depth; k += slice_depth) {
        Slice slice{p.weight, p.columns, p.depth, k, std::min(slice_depth, p.depth - k), p.y};
        int64_t step = end_tile - first_tile == 1 ? p.strips_per_task : 1;
        for (int64_t s = begin; s < end; s += step)
            for (int64_t t = first_tile; t < end_tile; t++) {
                int64_t height = tiles.height(t);
                const float* x_t = p.packed + tiles.first(t) * p.depth + k * height;
                kByRows<Weight>[height - 1](slice, x_t, tiles.first(t), s, std::min(s + step, end));
            }
    }
}

}  // namespace

Tiles::Tiles(int64_t rows) : rows(rows), count((rows + kMaxRows - 1) / kMaxRows) {}

void pack_tile(const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t t, float* packed) {
    Tiles tiles(rows);
    int64_t height = tiles.height(t);
    const float* from = x + tiles.first(t) * stride;
    float* to = packed + tiles.first(t) * depth;
    for (int64_t k = 0; k < depth; k++)
        for (int64_t r = 0; r < height; r++) to[k * height + r] = from[r * stride + k];
}

Product::Product(const float* packed, int64_t rows, const void* weight, bool is_bf16, int64_t columns, int64_t depth,
                 float* y, int num_threads)
    : packed(packed), rows(rows), weight(static_cast<const char*>(weight)), is_bf16(is_bf16), columns(columns),
      depth(depth), y(y) {
    tile_groups = (Tiles(rows).count + kTilesPerTask - 1) / kTilesPerTask;
    strips_per_task = 8 * kStrips;
    while (strips_per_task > kStrips && strips() / strips_per_task * tile_groups < 4 * num_threads)
        strips_per_task /= 2;
    num_tasks = tile_groups * ((strips() + strips_per_task - 1) / strips_per_task);
}

int64_t Product::strips() const { return (columns + kPanel - 1) / kPanel * kStrips; }

void Product::run(int64_t task) const { (is_bf16 ? run_task<Bf16> : run_task<float>)(*this, task); }
