/* What the operator adds, window by window: which tokens go together, x A, then low B. Included by
 * low_rank_add.c alone, whose comment says what the table is. */
#ifndef REMORA_ROWS_H
#define REMORA_ROWS_H

#include "products.h"
#include "runtime.h"

#include <stdlib.h>
#include <string.h>

enum {
    MOST_PARTS = 4,
    MOST_COLUMNS = 1 << 18, /* of x A for one token */
    MOST_AXES = 8,
    FIELDS = 5,
    BLOCK = 4,         /* tokens that are computed together */
    WINDOW = 64,       /* tokens between two meetings of the threads */
    SLAB = 512,        /* columns of y in one piece of work */
    LEAST_CHUNK = 256, /* of k */
    MOST_CHUNKS = 8,
    RANK_AT_ONCE = 64,
    FEW = 1 << 14, /* products for which threads are not worth waking */
};
static const size_t MOST_SCRATCH = (size_t)2 << 20; /* numbers, unless one block needs more */

struct kernel {
    const struct api *api;
    const struct products *products;
    size_t k, n, first, parts;
    size_t width[MOST_PARTS], begin[MOST_PARTS]; /* of each part in base and y */
};

struct block {
    size_t token, count, row;
};

struct job {
    const struct kernel *kernel;
    const float *base, *x, *factor;
    const int64_t *table;
    float *y, *low;
    size_t tokens, rows, entries, places;
    size_t chunk, chunks;
    size_t columns, low_at[MOST_PARTS]; /* of all parts and entries of a token, and each part's */
    struct block blocks[WINDOW];
    size_t count;
};

static Status *refuse(const struct api *api, const char *why) {
    return CALL_API(api, CreateStatus, (int, const char *), INVALID_ARGUMENT, why);
}

/* ---- the products of one window ---- */

static const int64_t *entry(const struct job *job, size_t row, size_t e, size_t part) {
    const size_t place = job->kernel->first + part;
    return job->table + ((row * job->entries + e) * job->places + place) * FIELDS;
}

static const void *at(int64_t address, size_t numbers, int64_t bytes) {
    return (const char *)(uintptr_t)address + numbers * (size_t)bytes;
}

static float *low_of(const struct job *job, size_t block, size_t chunk, size_t part) {
    const size_t lines = (block * job->chunks + chunk) * BLOCK;
    return job->low + lines * job->columns + job->low_at[part];
}

/* x A over one chunk of k, for one block and part. */
static void down_piece(void *data, size_t index) {
    const struct job *job = data;
    const struct kernel *kernel = job->kernel;
    const size_t chunk = index % job->chunks, part = index / job->chunks % kernel->parts;
    const size_t b = index / job->chunks / kernel->parts, k = chunk * job->chunk;
    const struct block *block = &job->blocks[b];
    float *low = low_of(job, b, chunk, part);
    for (size_t e = 0; e < job->entries; e++) {
        const int64_t *field = entry(job, block->row, e, part);
        const size_t rank = (size_t)field[2];
        if (rank == 0) continue;
        const struct down piece = {
            .x = job->x + block->token * kernel->k + k,
            .x_stride = kernel->k,
            .a = at(field[0], k * rank, field[3]),
            .half = field[3] == 2,
            .k = kernel->k - k < job->chunk ? kernel->k - k : job->chunk,
            .rank = rank,
            .tokens = block->count,
            .low = low,
            .low_stride = job->columns,
        };
        kernel->products->down(&piece);
        low += rank;
    }
}

/* The chunks' sums of `count` columns from `column` on, times the entry's weight. */
static void gather_low(const struct job *job, size_t b, size_t part, size_t column, size_t count,
                       float weight, float *low) {
    for (size_t t = 0; t < job->blocks[b].count; t++)
        for (size_t c = 0; c < count; c++) {
            float sum = 0;
            for (size_t chunk = 0; chunk < job->chunks; chunk++)
                sum += low_of(job, b, chunk, part)[t * job->columns + column + c];
            low[t * RANK_AT_ONCE + c] = weight * sum;
        }
}

/* y = base + factor * sum, for `count` columns. */
static void finish(float *y, const float *base, const float *factor, const float *sum,
                   size_t count) {
    if (factor)
        for (size_t c = 0; c < count; c++) y[c] = base[c] + factor[c] * sum[c];
    else
        for (size_t c = 0; c < count; c++) y[c] = base[c] + sum[c];
}

/* Adds low B to `count` columns, from `begin` on, of one block and part. */
static void up_columns(const struct job *job, size_t b, size_t part, size_t begin, size_t count) {
    const struct kernel *kernel = job->kernel;
    const struct block *block = &job->blocks[b];
    float sum[BLOCK * SLAB] = {0}, low[BLOCK * RANK_AT_ONCE];
    size_t column = 0;
    for (size_t e = 0; e < job->entries; e++) {
        const int64_t *field = entry(job, block->row, e, part);
        const size_t rank = (size_t)field[2], width = kernel->width[part];
        const uint32_t bits = (uint32_t)field[4];
        float weight;
        memcpy(&weight, &bits, sizeof weight);
        for (size_t r = 0; r < rank; r += RANK_AT_ONCE) {
            const size_t some = rank - r < RANK_AT_ONCE ? rank - r : RANK_AT_ONCE;
            gather_low(job, b, part, column + r, some, weight, low);
            const struct up piece = {
                .low = low,
                .low_stride = RANK_AT_ONCE,
                .b = at(field[1], r * width + begin, field[3]),
                .half = field[3] == 2,
                .b_stride = width,
                .rank = some,
                .columns = count,
                .tokens = block->count,
                .sum = sum,
                .sum_stride = SLAB,
            };
            kernel->products->up(&piece);
        }
        column += rank;
    }
    const size_t own = kernel->begin[part] + begin;
    for (size_t t = 0; t < block->count; t++) {
        const size_t where = (block->token + t) * kernel->n + own;
        finish(job->y + where, job->base + where, job->factor ? job->factor + own : NULL,
               sum + t * SLAB, count);
    }
}

static size_t slabs(size_t width) { return (width + SLAB - 1) / SLAB; }

static size_t all_slabs(const struct kernel *kernel) {
    size_t total = 0;
    for (size_t p = 0; p < kernel->parts; p++) total += slabs(kernel->width[p]);
    return total;
}

static void up_piece(void *data, size_t index) {
    const struct job *job = data;
    const size_t total = all_slabs(job->kernel), b = index / total;
    size_t slab = index % total, part = 0;
    while (slab >= slabs(job->kernel->width[part])) slab -= slabs(job->kernel->width[part++]);
    const size_t begin = slab * SLAB, left = job->kernel->width[part] - begin;
    up_columns(job, b, part, begin, left < SLAB ? left : SLAB);
}

/* ---- which tokens go together ---- */

static int adapted(const struct job *job, size_t row) {
    for (size_t e = 0; e < job->entries; e++)
        for (size_t p = 0; p < job->kernel->parts; p++)
            if (entry(job, row, e, p)[2]) return 1;
    return 0;
}

static int alike(const struct job *job, size_t row, size_t other) {
    const size_t bytes = job->kernel->parts * FIELDS * sizeof(int64_t);
    for (size_t e = 0; e < job->entries; e++)
        if (memcmp(entry(job, row, e, 0), entry(job, other, e, 0), bytes)) return 0;
    return 1;
}

/* Copies what has no adapter and puts the rest, up to `most` tokens, into blocks; the token after
 * the last one seen. */
static size_t fill_window(struct job *job, size_t token, size_t most) {
    const size_t each = job->tokens / job->rows, n = job->kernel->n;
    size_t taken = 0;
    job->count = 0;
    while (token < job->tokens && taken < most) {
        const size_t row = token / each, end = (row + 1) * each;
        if (!adapted(job, row)) {
            if (job->y != job->base)
                memcpy(job->y + token * n, job->base + token * n, (end - token) * n * sizeof(float));
            token = end;
            continue;
        }
        struct block *last = job->count ? &job->blocks[job->count - 1] : NULL;
        if (last && last->count < BLOCK && last->token + last->count == token &&
            (last->row == row || alike(job, last->row, row)))
            last->count++;
        else
            job->blocks[job->count++] = (struct block){token, 1, row};
        token++, taken++;
    }
    return token;
}

static Status *spread(const struct job *job, Opaque *context, void (*piece)(void *, size_t),
                      size_t total, size_t products) {
    if (products > FEW && total > 1)
        return CALL_API(job->kernel->api, KernelContext_ParallelFor,
                        (const Opaque *, void (*)(void *, size_t), size_t, size_t, void *), context,
                        piece, total, 0, (void *)job);
    for (size_t i = 0; i < total; i++) piece((void *)job, i);
    return NULL;
}

static Status *add_all(struct job *job, Opaque *context) {
    const struct kernel *kernel = job->kernel;
    const size_t per_block = BLOCK * job->chunks * job->columns;
    size_t most = WINDOW; /* tokens; each may be a block of its own */
    while (most > BLOCK && most * per_block > MOST_SCRATCH) most /= 2;
    if (per_block && !(job->low = malloc(most * per_block * sizeof(float))))
        return CALL_API(kernel->api, CreateStatus, (int, const char *), FAIL,
                        "LowRankAdd: no memory for x A");
    Status *status = NULL;
    for (size_t token = 0; token < job->tokens && !status;) {
        token = fill_window(job, token, most);
        const size_t each = job->count * job->columns;
        status = spread(job, context, down_piece, job->count * kernel->parts * job->chunks,
                        each * kernel->k);
        if (!status)
            status = spread(job, context, up_piece, job->count * all_slabs(kernel),
                            each / kernel->parts * kernel->n);
    }
    free(job->low);
    return status;
}

#endif
