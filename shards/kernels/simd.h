// One vector type for every machine: 16, 8 or 4 floats wide, whatever the compiler was told to build for.
//
// Built with -ffp-contract=off, so a multiply-add is fused exactly where fma() stands and nowhere else.
// Every kernel's arithmetic is therefore the same in each of its template instances.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
#include <arm_neon.h>
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    for (int i = 0; i < kLanes; i++) c[i] = std::fma(a[i], b[i], c[i]);
    return c;
#endif
}

inline Floats all(float value) { return value - Floats{}; }

inline Floats load(const float* from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Words load_words(const void* from) {
    Words v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

inline float max_of(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}

inline float sum_of(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x for x <= 0, within 1 ulp; 0 where the result would be subnormal, and at -infinity.
// Polynomial of Cephes' expf: https://www.netlib.org/cephes/
inline Floats exp_nonpositive(Floats x) {
    const Floats round = all(12582912.0f);  // 1.5 * 2^23: adding it leaves an integer in the low bits
    Floats shifted = fma(x, all(1.44269504088896341f), round);
    Floats n = shifted - round;
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = fma(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + all(1.0f);
    Words exponent = ((Words)shifted + 127) << 23;
    return x < all(-87.3f) ? all(0.0f) : p * (Floats)exponent;
}
