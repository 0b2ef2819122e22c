/* The products of one instruction set, of any number of columns: wide vectors first, then narrow
 * ones, then single numbers. Included once for each set, with ISA, TARGET and WIDEST. */

#if WIDEST >= 16
#define LANES 16
#include "lanes.h"
#endif
#if WIDEST >= 8
#define LANES 8
#include "lanes.h"
#endif
#define LANES 4
#include "lanes.h"
#define LANES 1
#include "lanes.h"

#define CALL_(stem, isa, lanes) stem##_##isa##_##lanes
#define CALL(stem, isa, lanes) CALL_(stem, isa, lanes)

#define DOWN(lanes)                                                                              \
    for (; columns - c >= lanes; c += lanes) {                                                   \
        const void *from = (const char *)p->a + (half ? 2 : 4) * c;                              \
        if (p->tokens == 4)                                                                      \
            CALL(down_four, ISA, lanes)(p->x, p->x_stride, from, columns, p->k, low + c,         \
                                        p->low_stride, half);                                    \
        else                                                                                     \
            for (size_t t = 0; t < p->tokens; t++)                                               \
                CALL(down_one, ISA, lanes)(p->x + t * p->x_stride, from, columns, p->k,          \
                                           low + t * p->low_stride + c, half);                   \
    }

static INLINE TARGET void CALL(down, ISA, all)(const struct down *p, const int half) {
    const size_t columns = p->rank;
    float *low = p->low;
    size_t c = 0;
#if WIDEST >= 16
    DOWN(16)
#endif
#if WIDEST >= 8
    DOWN(8)
#endif
    DOWN(4)
    DOWN(1)
}

#define UP(lanes, vectors)                                                                       \
    for (; p->columns - c >= (lanes) * (vectors); c += (lanes) * (vectors)) {                    \
        if (p->tokens == 4)                                                                      \
            for (size_t v = 0; v < (vectors); v++)                                               \
                CALL(up_four, ISA, lanes)(p->low, p->low_stride, p->b, c + v * (lanes),          \
                                          p->b_stride, p->rank, sum + c + v * (lanes),           \
                                          p->sum_stride, half);                                  \
        else                                                                                     \
            for (size_t t = 0; t < p->tokens; t++)                                               \
                CALL(up_one, ISA, lanes)(p->low + t * p->low_stride, p->b, c, p->b_stride,       \
                                         p->rank, sum + t * p->sum_stride + c, vectors, half);   \
    }

static INLINE TARGET void CALL(up, ISA, all)(const struct up *p, const int half) {
    float *sum = p->sum;
    size_t c = 0;
#if WIDEST >= 16
    UP(16, 4)
    UP(16, 1)
#endif
#if WIDEST >= 8
    UP(8, 4)
    UP(8, 1)
#endif
    UP(4, 4)
    UP(4, 1)
    UP(1, 1)
}

static TARGET void CALL(down, ISA, run)(const struct down *p) {
    if (p->half)
        CALL(down, ISA, all)(p, 1);
    else
        CALL(down, ISA, all)(p, 0);
}

static TARGET void CALL(up, ISA, run)(const struct up *p) {
    if (p->half)
        CALL(up, ISA, all)(p, 1);
    else
        CALL(up, ISA, all)(p, 0);
}

#undef UP
#undef DOWN
#undef CALL
#undef CALL_
#undef WIDEST
#undef HAS_F16C
#undef TARGET
#undef ISA
