// The chunks of a step, and the cache blocks of each: `Spans` in cpu.py, which fills this struct.
#pragma once

#include <cstdint>

constexpr int kBlockSize = 16;  // tokens of a cache block: BLOCK_SIZE in shards/kv_cache.py

struct Spans {
    int64_t num_chunks, table_width;
    const int32_t* token_start;  // [num_chunks + 1]
    const int32_t* position;     // [num_chunks], of each chunk's first token
    const int32_t* block_table;  // [num_chunks][table_width]

    int64_t num_tokens(int64_t chunk) const { return token_start[chunk + 1] - token_start[chunk]; }
    int64_t end(int64_t chunk) const { return position[chunk] + num_tokens(chunk); }
    const int32_t* blocks(int64_t chunk) const { return block_table + chunk * table_width; }

    // Find a chunk that needs a block which is not there, for its own tokens and `before` ones in front; or -1.
    int64_t bad_chunk(int64_t num_blocks, int64_t before) const {
        for (int64_t c = 0; c < num_chunks; c++) {
            if (num_tokens(c) <= 0) continue;
            int64_t first = position[c] > before ? (position[c] - before) / kBlockSize : 0;
            int64_t last = (end(c) - 1) / kBlockSize;
            if (last >= table_width) return c;
            for (int64_t i = first; i <= last; i++)
                if (blocks(c)[i] < 0 || blocks(c)[i] >= num_blocks) return c;
        }
        return -1;
    }
};
