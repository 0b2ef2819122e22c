/* Products of one instruction set and LANES numbers at a time; included once for each pair.
 *
 *   down  low[t][c]  = sum over k of x[t][k] * a[k][c]          c < LANES
 *   up    sum[t][c] += sum over r of low[t][r] * b[r][c]        c < a few LANES
 *
 * One token and four take the same steps in the same order, so that a token's answer does not
 * depend on how many are computed beside it. Accumulators are named, not arrays: compilers keep
 * those in registers. */

#define GLUE_(a, b, c) a##_##b##_##c
#define GLUE(a, b, c) GLUE_(a, b, c)
#define NAME(stem) GLUE(stem, ISA, LANES)
#define VF NAME(floats)
#define VI NAME(ints)
#define VH NAME(halves)
#define LOAD NAME(load)

typedef float VF __attribute__((vector_size(4 * LANES)));
#ifdef __aarch64__
typedef __fp16 VH __attribute__((vector_size(2 * LANES)));
#else
typedef int32_t VI __attribute__((vector_size(4 * LANES)));
typedef int16_t VH __attribute__((vector_size(2 * LANES)));
#endif

/* LANES numbers from the `at`-th on, float16 (finite) or float32. */
static INLINE TARGET VF LOAD(const void *numbers, size_t at, const int half) {
    VF wide;
    if (half) {
        VH narrow;
        __builtin_memcpy(&narrow, (const char *)numbers + 2 * at, sizeof narrow);
#if HAS_F16C && LANES == 16
        wide = (VF)_mm512_cvtph_ps((__m256i)narrow);
#elif HAS_F16C && LANES == 8
        wide = (VF)_mm256_cvtph_ps((__m128i)narrow);
#elif defined(__aarch64__)
        wide = __builtin_convertvector(narrow, VF);
#else
        /* Exponents of float16 stand around 15, those of float32 around 127. */
        const VI bits = (__builtin_convertvector(narrow, VI) << 13) & SIGN_AND_REST;
        __builtin_memcpy(&wide, &bits, sizeof wide);
        wide *= HALF_TO_SINGLE;
#endif
    } else {
        __builtin_memcpy(&wide, (const char *)numbers + 4 * at, sizeof wide);
    }
    return wide;
}

static INLINE TARGET void NAME(down_one)(const float *x, const void *a, size_t stride, size_t k,
                                         float *low, const int half) {
    VF even = {0}, odd = {0};
    size_t i = 0;
    for (; i + 1 < k; i += 2) {
        if (LANES > 1) PREFETCH(a, (i + 24) * stride, half);
        even += x[i] * LOAD(a, i * stride, half);
        odd += x[i + 1] * LOAD(a, (i + 1) * stride, half);
    }
    if (i < k) even += x[i] * LOAD(a, i * stride, half);
    even += odd;
    __builtin_memcpy(low, &even, sizeof even);
}

static INLINE TARGET void NAME(down_four)(const float *x, size_t x_stride, const void *a,
                                          size_t stride, size_t k, float *low, size_t low_stride,
                                          const int half) {
    const float *x1 = x + x_stride, *x2 = x1 + x_stride, *x3 = x2 + x_stride;
    VF e0 = {0}, e1 = {0}, e2 = {0}, e3 = {0}, o0 = {0}, o1 = {0}, o2 = {0}, o3 = {0};
    size_t i = 0;
    for (; i + 1 < k; i += 2) {
        const VF even = LOAD(a, i * stride, half), odd = LOAD(a, (i + 1) * stride, half);
        e0 += x[i] * even, e1 += x1[i] * even, e2 += x2[i] * even, e3 += x3[i] * even;
        o0 += x[i + 1] * odd, o1 += x1[i + 1] * odd, o2 += x2[i + 1] * odd, o3 += x3[i + 1] * odd;
    }
    if (i < k) {
        const VF even = LOAD(a, i * stride, half);
        e0 += x[i] * even, e1 += x1[i] * even, e2 += x2[i] * even, e3 += x3[i] * even;
    }
    e0 += o0, e1 += o1, e2 += o2, e3 += o3;
    __builtin_memcpy(low, &e0, sizeof e0);
    __builtin_memcpy(low + low_stride, &e1, sizeof e1);
    __builtin_memcpy(low + 2 * low_stride, &e2, sizeof e2);
    __builtin_memcpy(low + 3 * low_stride, &e3, sizeof e3);
}

/* `vectors` 4 or 1 of them. */
static INLINE TARGET void NAME(up_one)(const float *low, const void *b, size_t at, size_t stride,
                                       size_t rank, float *sum, const int vectors, const int half) {
    VF s0, s1 = {0}, s2 = {0}, s3 = {0};
    __builtin_memcpy(&s0, sum, sizeof s0);
    if (vectors == 4) {
        __builtin_memcpy(&s1, sum + LANES, sizeof s1);
        __builtin_memcpy(&s2, sum + 2 * LANES, sizeof s2);
        __builtin_memcpy(&s3, sum + 3 * LANES, sizeof s3);
    }
    for (size_t r = 0; r < rank; r++, at += stride) {
        s0 += low[r] * LOAD(b, at, half);
        if (vectors == 4) { /* the row's part after next: rows are too many for the processor */
            PREFETCH(b, at + 12 * LANES, half);
            if (LANES == 16) PREFETCH(b, at + 14 * LANES, half);
            s1 += low[r] * LOAD(b, at + LANES, half);
            s2 += low[r] * LOAD(b, at + 2 * LANES, half);
            s3 += low[r] * LOAD(b, at + 3 * LANES, half);
        }
    }
    __builtin_memcpy(sum, &s0, sizeof s0);
    if (vectors == 4) {
        __builtin_memcpy(sum + LANES, &s1, sizeof s1);
        __builtin_memcpy(sum + 2 * LANES, &s2, sizeof s2);
        __builtin_memcpy(sum + 3 * LANES, &s3, sizeof s3);
    }
}

static INLINE TARGET void NAME(up_four)(const float *low, size_t low_stride, const void *b,
                                        size_t at, size_t stride, size_t rank, float *sum,
                                        size_t sum_stride, const int half) {
    const float *l1 = low + low_stride, *l2 = l1 + low_stride, *l3 = l2 + low_stride;
    float *d1 = sum + sum_stride, *d2 = d1 + sum_stride, *d3 = d2 + sum_stride;
    VF s0, s1, s2, s3;
    __builtin_memcpy(&s0, sum, sizeof s0);
    __builtin_memcpy(&s1, d1, sizeof s1);
    __builtin_memcpy(&s2, d2, sizeof s2);
    __builtin_memcpy(&s3, d3, sizeof s3);
    for (size_t r = 0; r < rank; r++, at += stride) {
        const VF row = LOAD(b, at, half);
        s0 += low[r] * row, s1 += l1[r] * row, s2 += l2[r] * row, s3 += l3[r] * row;
    }
    __builtin_memcpy(sum, &s0, sizeof s0);
    __builtin_memcpy(d1, &s1, sizeof s1);
    __builtin_memcpy(d2, &s2, sizeof s2);
    __builtin_memcpy(d3, &s3, sizeof s3);
}

#undef LOAD
#undef VH
#undef VI
#undef VF
#undef NAME
#undef GLUE
#undef GLUE_
#undef LANES
