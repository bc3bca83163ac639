// The activation of a gated network.
#pragma once

#include <algorithm>

#include "simd.h"

inline Floats silu_mul_lanes(Floats gate, Floats up) {
    Floats e = exp_nonpositive(gate < 0.0f ? gate : -gate);
    Floats sigmoid = (gate < 0.0f ? e : all(1.0f)) / (e + all(1.0f));
    return gate * sigmoid * up;
}

// y = silu(gate) * up; y may be where gate is.
inline void silu_mul_row(const float* gate, const float* up, int64_t dim, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) store(y + i, silu_mul_lanes(load(gate + i), load(up + i)));
    if (i == dim) return;
    float tail[2][kLanes] = {};
    std::copy(gate + i, gate + dim, tail[0]);
    std::copy(up + i, up + dim, tail[1]);
    store(tail[0], silu_mul_lanes(load(tail[0]), load(tail[1])));
    std::copy(tail[0], tail[0] + dim - i, y + i);
}
