// What a core can compute at most: products in registers alone, with the instructions the kernels use.
#include "kernels.h"

#include <math.h>
#include <time.h>

namespace {

constexpr int CHAINS = 16; // sums on their way at once: more than any processor needs to stay busy
constexpr int TURNS = 2000;

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Operations a second of `step`, which adds `products` products to a sum; each is two operations.
template <class V, class F> double rate(V seed, int products, double seconds, F step) {
    double best = 0;
    for (double start = now(), ends = start + seconds; start < ends;) {
        V sums[CHAINS];
        for (int i = 0; i < CHAINS; i++) sums[i] = seed * (decltype(+seed[0]))(i + 1); // equal ones would be computed once
        double began = now();
        for (int turn = 0; turn < TURNS; turn++)
            for (int i = 0; i < CHAINS; i++) sums[i] = step(sums[i]);
        start = now();
        V total = sums[0];
        for (int i = 1; i < CHAINS; i++) total += sums[i];
        volatile auto kept = total[0]; // or the compiler would leave the work out
        (void)kept;
        double found = 2.0 * products * CHAINS * TURNS / (start - began);
        best = found > best ? found : best;
    }
    return best;
}

} // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t llmo_peak_size(int) { return 0; }

// `seed` and `other` are numbers that the compiler must not know.
double llmo_peak_fp32(double seconds, float seed, float other) {
    f32x16 a = all(seed), b = all(other);
    return rate(a, LANES, seconds, [=](f32x16 sum) { return sum * b + a; });
}

// 0 where the processor has no instruction for it.
double llmo_peak_bf16(double seconds, float seed, float other) {
#if defined(__AVX512BF16__)
    __m512bh a = _mm512_cvtne2ps_pbh((__m512)all(seed), (__m512)all(seed));
    __m512bh b = _mm512_cvtne2ps_pbh((__m512)all(other), (__m512)all(other));
    return rate(all(seed), 2 * LANES, seconds, [=](f32x16 sum) { return (f32x16)_mm512_dpbf16_ps((__m512)sum, a, b); });
#else
    (void)seconds, (void)seed, (void)other;
    return 0;
#endif
}

double llmo_peak_int8(double seconds, float seed, float other) {
#if defined(__AVX512VNNI__)
    i32x16 a = i32x16{} + (int32_t)seed, b = i32x16{} + (int32_t)other;
    return rate(a, 4 * LANES, seconds, [=](i32x16 sum) { return dot_unsigned(sum, a, b); });
#else
    (void)seconds, (void)seed, (void)other;
    return 0;
#endif
}
}
