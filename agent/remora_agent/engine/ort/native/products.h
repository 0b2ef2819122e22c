/* x A and low B for a few tokens of one adapter, with the best instructions of this processor.
 *
 * Written in vectors of GCC and Clang, which both turn into instructions of whatever processor it
 * is compiled for; on x86 once for each set and chosen when the library is loaded. */
#ifndef REMORA_PRODUCTS_H
#define REMORA_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define SIGN_AND_REST (-0x70000001) /* all bits but 28 to 30 */
#define HALF_TO_SINGLE 0x1p112f
#define PREFETCH(numbers, at, half)                                                                \
    __builtin_prefetch((const char *)(numbers) + ((half) ? 2 : 4) * (at))

/* low[t][c] = sum over k of x[t][k] a[k][c]; c < rank, of which a's rows are wide. */
struct down {
    const float *x;
    size_t x_stride;
    const void *a;
    int half; /* numbers of a: float16, else float32 */
    size_t k, rank, tokens;
    float *low;
    size_t low_stride;
};

/* sum[t][c] += sum over r of low[t][r] b[r][c]; c < columns. */
struct up {
    const float *low;
    size_t low_stride;
    const void *b;
    int half;
    size_t b_stride, rank, columns, tokens;
    float *sum;
    size_t sum_stride;
};

struct products {
    const char *name;
    void (*down)(const struct down *);
    void (*up)(const struct up *);
};

#define ISA base
#define TARGET
#define WIDEST 4
#define HAS_F16C 0
#include "isa.h"

#ifdef __x86_64__
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define WIDEST 8
#define HAS_F16C 1
#include "isa.h"

#define ISA avx512
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl")))
#define WIDEST 16
#define HAS_F16C 1
#include "isa.h"
#endif

/* From the plainest to the best; of those, how many this processor has. */
static const struct products PRODUCTS[] = {
    {"base", down_base_run, up_base_run},
#ifdef __x86_64__
    {"avx2", down_avx2_run, up_avx2_run},
    {"avx512", down_avx512_run, up_avx512_run},
#endif
};

static inline size_t products_here(void) {
#ifdef __x86_64__
    unsigned a, b, c, d; /* compilers know the name f16c only since some years */
    __builtin_cpu_init();
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_F16C)) return 1;
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl"))
        return 2;
    return 3;
#else
    return 1;
#endif
}

#endif
