// A weight [columns][depth], as checkpoints have it, into the panels that product.cpp reads.
#include <algorithm>
#include <cstdint>

#include "threads.h"

namespace {

constexpr int kPanel = 32;
constexpr int kDepth = 64;  // of a patch: the lines it writes stay in the first-level cache until they are full

// Where column c of a panel lies among its 32: in bf16, n and n + 16 share a word.
constexpr int place(uint16_t, int c) { return c % (kPanel / 2) * 2 + c / (kPanel / 2); }
constexpr int place(uint32_t, int c) { return c; }

template <class Bits>
void pack(const Bits* weight, int64_t columns, int64_t depth, Bits* packed, bool alone) {
    auto pack_panel = [&](int64_t panel) {
        const Bits* from = weight + panel * kPanel * depth;
        Bits* to = packed + panel * kPanel * depth;
        int64_t present = std::min<int64_t>(kPanel, columns - panel * kPanel);
        for (int64_t begin = 0; begin < depth; begin += kDepth) {
            int64_t end = std::min<int64_t>(begin + kDepth, depth);
            for (int c = 0; c < kPanel; c++)
                for (int64_t k = begin; k < end; k++)
                    to[k * kPanel + place(Bits{}, c)] = c < present ? from[c * depth + k] : 0;
        }
    };
    int64_t panels = (columns + kPanel - 1) / kPanel;
    if (alone)
        for (int64_t panel = 0; panel < panels; panel++) pack_panel(panel);
    else
        Region().run(panels, pack_panel);
}

}  // namespace

// `packed` holds whole panels, the last one padded with zeros; elements have 2 or 4 bytes. If `alone`, this takes
// no turn in the region: a thread of low priority may take long, and those that serve must not wait for it.
extern "C" void tw_pack(const void* weight, int element_bytes, int64_t columns, int64_t depth, void* packed,
                        int alone) {
    if (element_bytes == 2)
        pack(static_cast<const uint16_t*>(weight), columns, depth, static_cast<uint16_t*>(packed), alone);
    else
        pack(static_cast<const uint32_t*>(weight), columns, depth, static_cast<uint32_t*>(packed), alone);
}
