/* The operator alone, under a runtime of a few lines: every instruction set of this processor is
 * held against sums in double, on memory that ends where the data does. Made for sanitizers. */

#include "low_rank_add.c"

#include <stdio.h>

struct value {
    void *data;
    int64_t shape[4];
    size_t axes;
};

struct context {
    struct value *inputs[4];
    struct value y;
};

static const char *said;

static Status *fake_status(int code, const char *message) {
    (void)code;
    said = message;
    return (Status *)(uintptr_t)1;
}
static Status *fake_count(const Opaque *context, size_t *count) {
    *count = ((const struct context *)context)->inputs[3] ? 4 : 3;
    return NULL;
}
static Status *fake_input(const Opaque *context, size_t index, const Opaque **value) {
    *value = ((const struct context *)context)->inputs[index];
    return NULL;
}
static Status *fake_output(Opaque *context, size_t index, const int64_t *shape, size_t axes,
                           Opaque **value) {
    (void)index, (void)shape, (void)axes;
    *value = &((struct context *)context)->y;
    return NULL;
}
static Status *fake_type(const Opaque *value, Opaque **info) {
    *info = (Opaque *)(uintptr_t)value;
    return NULL;
}
static Status *fake_axes(const Opaque *value, size_t *axes) {
    *axes = ((const struct value *)value)->axes;
    return NULL;
}
static Status *fake_shape(const Opaque *value, int64_t *shape, size_t axes) {
    memcpy(shape, ((const struct value *)value)->shape, axes * sizeof *shape);
    return NULL;
}
static Status *fake_data(const Opaque *value, void **data) {
    *data = ((const struct value *)value)->data;
    return NULL;
}
static void fake_release(Opaque *info) { (void)info; }
static Status *fake_parallel(const Opaque *context, void (*piece)(void *, size_t), size_t total,
                             size_t batch, void *data) {
    (void)context, (void)batch;
    for (size_t i = total; i-- > 0;) piece(data, i); /* in no particular order */
    return NULL;
}

static struct api runtime;

static void set_up(void) {
    runtime.at[CreateStatus] = (Function)fake_status;
    runtime.at[KernelContext_GetInputCount] = (Function)fake_count;
    runtime.at[KernelContext_GetInput] = (Function)fake_input;
    runtime.at[KernelContext_GetOutput] = (Function)fake_output;
    runtime.at[GetTensorTypeAndShape] = (Function)fake_type;
    runtime.at[GetDimensionsCount] = (Function)fake_axes;
    runtime.at[GetDimensions] = (Function)fake_shape;
    runtime.at[GetTensorMutableData] = (Function)fake_data;
    runtime.at[ReleaseTensorTypeAndShapeInfo] = (Function)fake_release;
    runtime.at[KernelContext_ParallelFor] = (Function)fake_parallel;
}

static uint32_t seed = 1;

static int draw(int from, int to) {
    seed = seed * 1664525u + 1013904223u;
    return from + (int)((seed >> 8) % (uint32_t)(to - from + 1));
}

/* float16 of a whole number of at most 11 bits. */
static uint16_t half_of(int number) {
    const float wide = (float)number;
    uint32_t bits;
    memcpy(&bits, &wide, sizeof bits);
    if (!number) return 0;
    return (uint16_t)((bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 | (bits >> 13 & 0x3ff));
}

static float *numbers(size_t count) {
    float *made = malloc(count * sizeof *made);
    for (size_t i = 0; i < count; i++) made[i] = (float)draw(-8, 8);
    return made;
}

/* Factors as whole numbers, so that all sums are exact; `wide` keeps them as float32. */
static void *factors(size_t count, int half, float **wide) {
    *wide = numbers(count);
    void *made = malloc(count * (half ? 2 : 4));
    for (size_t i = 0; i < count; i++)
        if (half)
            ((uint16_t *)made)[i] = half_of((int)(*wide)[i]);
        else
            ((float *)made)[i] = (*wide)[i];
    return made;
}

enum { ROWS = 5, ENTRIES = 2, KEPT = ROWS * ENTRIES * MOST_PARTS * 4 };

static int once(const struct products *products) {
    struct kernel kernel = {.api = &runtime, .products = products, .first = 1};
    kernel.k = (size_t)draw(1, 600), kernel.parts = (size_t)draw(1, 3);
    for (size_t p = 0; p < kernel.parts; p++) {
        kernel.begin[p] = kernel.n, kernel.width[p] = (size_t)draw(1, 300);
        kernel.n += kernel.width[p];
    }
    const size_t each = (size_t)(draw(0, 3) ? 1 : draw(1, 40)), tokens = ROWS * each;
    const size_t places = kernel.parts + 1 + (size_t)draw(0, 1);
    float *base = numbers(tokens * kernel.n), *x = numbers(tokens * kernel.k);
    float *factor = draw(0, 1) ? numbers(kernel.n) : NULL;
    double *wanted = malloc(tokens * kernel.n * sizeof *wanted);
    for (size_t i = 0; i < tokens * kernel.n; i++) wanted[i] = base[i];
    int64_t *table = calloc(ROWS * ENTRIES * places * FIELDS, sizeof *table);
    void *kept[KEPT];
    size_t count = 0;
    for (size_t row = 0; row < ROWS; row++)
        for (size_t e = 0; e < ENTRIES && draw(0, 3); e++)
            for (size_t p = 0; p < kernel.parts; p++) {
                const size_t rank = (size_t)(draw(0, 4) ? draw(1, 70) : 0);
                const int half = draw(0, 1);
                const float weight = (float)draw(-2, 2) * 0.5f;
                int64_t *field = table + ((row * ENTRIES + e) * places + 1 + p) * FIELDS;
                float *a, *b;
                if (!rank) continue;
                void *own_a = factors(kernel.k * rank, half, &a);
                void *own_b = factors(rank * kernel.width[p], half, &b);
                uint32_t bits;
                memcpy(&bits, &weight, sizeof bits);
                field[0] = (int64_t)(uintptr_t)own_a, field[1] = (int64_t)(uintptr_t)own_b;
                field[2] = (int64_t)rank, field[3] = half ? 2 : 4, field[4] = bits;
                kept[count++] = own_a, kept[count++] = own_b, kept[count++] = a, kept[count++] = b;
                for (size_t t = row * each; t < (row + 1) * each; t++)
                    for (size_t r = 0; r < rank; r++) {
                        double low = 0;
                        for (size_t k = 0; k < kernel.k; k++)
                            low += (double)x[t * kernel.k + k] * a[k * rank + r];
                        for (size_t c = 0; c < kernel.width[p]; c++) {
                            const size_t own = kernel.begin[p] + c;
                            wanted[t * kernel.n + own] += (factor ? factor[own] : 1.0) * weight *
                                                          low * b[r * kernel.width[p] + c];
                        }
                    }
            }
    struct value values[4] = {
        {base, {(int64_t)tokens, (int64_t)kernel.n}, 2},
        {x, {(int64_t)tokens, (int64_t)kernel.k}, 2},
        {table, {ROWS, ENTRIES, (int64_t)places, FIELDS}, 4},
        {factor, {(int64_t)kernel.n}, 1},
    };
    const int same = draw(0, 1);
    float *y = same ? base : malloc(tokens * kernel.n * sizeof *y);
    struct context context = {
        {&values[0], &values[1], &values[2], factor ? &values[3] : NULL}, {y, {0}, 2}};
    int wrong = compute(&kernel, &context) != NULL;
    for (size_t i = 0; i < tokens * kernel.n && !wrong; i++) {
        const double off = y[i] - wanted[i], size = wanted[i] < 0 ? -wanted[i] : wanted[i];
        wrong = !((off < 0 ? -off : off) <= 1e-5 * (size + 1e5));
    }
    while (count) free(kept[--count]);
    if (!same) free(y);
    free(base), free(x), free(factor), free(wanted), free(table);
    return wrong;
}

int main(void) {
    set_up();
    for (size_t set = 0; set < products_here(); set++)
        for (int i = 0; i < 60; i++)
            if (once(&PRODUCTS[set])) {
                fprintf(stderr, "%s differs in trial %d (%s)\n", PRODUCTS[set].name, i,
                        said ? said : "computed");
                return 1;
            }
    printf("%zu instruction sets agree\n", products_here());
    return 0;
}
