// Arithmetic on sixteen lanes. GCC's and Clang's vectors compile on any processor; one product has instructions of its
// own. Nothing here depends on how many rows stand beside a row: that is what makes answers the same in any batch.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

constexpr int LANES = 16;
constexpr int GROUP = 64;   // inputs that share a weight's scale
constexpr int TILE = 8;     // rows of one pass over the weights: what the registers hold
constexpr int BLOCK = 16;   // tokens of a block of the cache: keys lie token by token in the lanes

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

typedef uint16_t bf16;

static inline int up(int value, int step) { return (value + step - 1) / step * step; }
static inline int least(int a, int b) { return a < b ? a : b; }

template <class V, class T> static inline V load_as(const T* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline f32x16 all(float x) { return f32x16{} + x; }
static inline f32x16 load(const float* from) { return load_as<f32x16>(from); }
static inline f32x16 load(const bf16* from) {
    return (f32x16)(__builtin_convertvector(load_as<u16x16>(from), u32x16) << 16);
}
static inline f32x16 load(const int8_t* from) {
#if defined(__AVX512F__) // GCC takes the lanes one by one
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)load_as<i8x16>(from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_as<i8x16>(from), i32x16), f32x16);
#endif
}
static inline void store(float* to, f32x16 v) { memcpy(to, &v, sizeof v); }
static inline void store(bf16* to, f32x16 v) {
    u32x16 bits = (u32x16)v;
    u16x16 half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16x16);
    memcpy(to, &half, sizeof half);
}
static inline void store(int8_t* to, i32x16 v) {
    i8x16 bytes = __builtin_convertvector(v, i8x16);
    memcpy(to, &bytes, sizeof bytes);
}
static inline void put(float* to, float x) { *to = x; }
static inline void put(bf16* to, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *to = (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Sixteen lanes to one, by halves.
template <class V, class F> static inline auto fold(V v, F join) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) v[i] = join(v[i], v[i + width]);
    return v[0];
}
static inline f32x16 larger(f32x16 a, f32x16 b) { return a > b ? a : b; }
static inline i32x16 larger(i32x16 a, i32x16 b) { return a > b ? a : b; }
#if defined(__AVX512F__)
static inline float sum(f32x16 v) { return _mm512_reduce_add_ps((__m512)v); }
static inline int32_t sum(i32x16 v) { return _mm512_reduce_add_epi32((__m512i)v); }
static inline float largest(f32x16 v) { return _mm512_reduce_max_ps((__m512)v); }
static inline int32_t largest(i32x16 v) { return _mm512_reduce_max_epi32((__m512i)v); }
#else
static inline float sum(f32x16 v) { return fold(v, [](float a, float b) { return a + b; }); }
static inline int32_t sum(i32x16 v) { return fold(v, [](int32_t a, int32_t b) { return a + b; }); }
static inline float largest(f32x16 v) { return fold(v, [](float a, float b) { return a > b ? a : b; }); }
static inline int32_t largest(i32x16 v) { return fold(v, [](int32_t a, int32_t b) { return a > b ? a : b; }); }
#endif
static inline i32x16 nearest(f32x16 v) {  // for |v| below 2^22; adding this number leaves the integer in the low bits
    const f32x16 magic = all(12582912.0f);
    return (i32x16)(v + magic) - (i32x16)magic;
}

// e^x to two units in the last place; Cephes' polynomial. Below -87 it is zero.
static inline f32x16 exponential(f32x16 x) {
    x = larger(all(-100.0f), x < 88.0f ? x : all(88.0f));
    i32x16 n = nearest(x * 1.44269504f);
    f32x16 whole = __builtin_convertvector(n, f32x16);
    f32x16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    f32x16 p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    i32x16 kept = n > -127;
    return (f32x16)(((n + 127) << 23) & kept) * p;
}

// acc + the sums of four products in each lane: unsigned weights by signed activations.
static inline i32x16 dot(i32x16 acc, i32x16 weights, const int8_t* activations) {
    int32_t four;
    memcpy(&four, activations, 4);
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
#else
    for (int shift = 0; shift < 32; shift += 8) acc += ((weights >> shift) & 0xff) * (int32_t)(int8_t)(four >> shift);
    return acc;
#endif
}

// acc + the sums of four products in each lane: unsigned activations by signed weights.
static inline i32x16 dot_unsigned(i32x16 acc, i32x16 activations, i32x16 weights) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)activations, (__m512i)weights);
#else
    for (int shift = 0; shift < 32; shift += 8)
        acc += ((activations >> shift) & 0xff) * ((weights << (24 - shift)) >> 24);
    return acc;
#endif
}
