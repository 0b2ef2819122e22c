/* com.remora LowRankAdd, an operator of ONNX Runtime's CPU engine:
 *
 *   y[t] = base[t] + factor * sum over the entries e of t's row:  weight_e (x[t] A_e) B_e
 *
 *   base    float32 [..., n]    n = sum of `widths`: projections that share x, side by side
 *   x       float32 [..., k]    the same tokens; every row has as many, one row's after another's
 *   table   int64 [rows, entries, places, 5], for each row, entry and place (a projection of a
 *           layer; this node's are first, first + 1, ...): where A [k, rank] and B [rank, width]
 *           lie in this process, rank (0: nothing is added), bytes of a number (2: float16, 4:
 *           float32), and the bits of the float32 weight
 *   factor  float32 [n], optional
 *
 * Addresses are trusted, everything else is checked. What is summed, and in which order, depends
 * on a token's own row and the shapes alone: not on threads, nor on the other rows. */

#include "rows.h"

#include <stdatomic.h>

#define LOW_RANK_ADD_VERSION 1

/* ---- inputs, checked ---- */

struct tensor {
    void *data;
    int64_t shape[MOST_AXES];
    size_t axes, lines; /* product of all axes but the last */
};

static Status *take(const struct api *api, const Opaque *value, struct tensor *tensor) {
    Opaque *info = NULL;
    Status *status =
        CALL_API(api, GetTensorTypeAndShape, (const Opaque *, Opaque **), value, &info);
    if (status) return status;
    status = CALL_API(api, GetDimensionsCount, (const Opaque *, size_t *), info, &tensor->axes);
    if (!status && (tensor->axes < 1 || tensor->axes > MOST_AXES))
        status = refuse(api, "LowRankAdd: inputs have 1 to 8 axes");
    if (!status)
        status = CALL_API(api, GetDimensions, (const Opaque *, int64_t *, size_t), info,
                          tensor->shape, tensor->axes);
    ((void (*)(Opaque *))api->at[ReleaseTensorTypeAndShapeInfo])(info);
    tensor->lines = 1;
    for (size_t i = 0; !status && i + 1 < tensor->axes; i++)
        tensor->lines *= (size_t)tensor->shape[i];
    if (!status)
        status = CALL_API(api, GetTensorMutableData, (const Opaque *, void **), value,
                          &tensor->data);
    return status;
}

static Status *input(const struct api *api, const Opaque *context, size_t index,
                     struct tensor *tensor) {
    const Opaque *value = NULL;
    Status *status = CALL_API(api, KernelContext_GetInput,
                              (const Opaque *, size_t, const Opaque **), context, index, &value);
    if (status) return status;
    if (value) return take(api, value, tensor);
    return index == 3 ? NULL : refuse(api, "LowRankAdd: an input is missing");
}

/* Every entry of this node's places; and how many columns of x A there are. */
static const char *check_entries(struct job *job) {
    const struct kernel *kernel = job->kernel;
    job->columns = 0;
    for (size_t part = 0; part < kernel->parts; part++) {
        size_t widest = 0;
        for (size_t row = 0; row < job->rows; row++) {
            size_t total = 0;
            for (size_t e = 0; e < job->entries; e++) {
                const int64_t *field = entry(job, row, e, part);
                if (field[2] == 0) continue;
                if (field[2] < 0 || field[2] > MOST_COLUMNS)
                    return "LowRankAdd: table has a rank that is not 0 to 262144";
                if (field[3] != 2 && field[3] != 4)
                    return "LowRankAdd: table has numbers of neither 2 nor 4 bytes";
                if (field[0] <= 0 || field[1] <= 0)
                    return "LowRankAdd: table has a rank without factors";
                total += (size_t)field[2];
                if (total > MOST_COLUMNS) return "LowRankAdd: table has too many ranks in a row";
            }
            if (total > widest) widest = total;
        }
        job->low_at[part] = job->columns;
        job->columns += widest;
        if (job->columns > MOST_COLUMNS)
            return "LowRankAdd: table has a row of more than 262144 ranks";
    }
    return NULL;
}

static const char *check(const struct kernel *kernel, const struct tensor *base,
                         const struct tensor *x, const struct tensor *table,
                         const struct tensor *factor, struct job *job) {
    if (base->shape[base->axes - 1] != (int64_t)kernel->n)
        return "LowRankAdd: base's last axis is not the sum of widths";
    if (x->shape[x->axes - 1] != (int64_t)kernel->k) return "LowRankAdd: x's last axis is not k";
    if (x->lines != base->lines) return "LowRankAdd: x and base have different tokens";
    if (table->axes != 4 || table->shape[3] != FIELDS || table->shape[0] < 1)
        return "LowRankAdd: table is not [rows, entries, places, 5]";
    if (table->shape[2] < (int64_t)(kernel->first + kernel->parts))
        return "LowRankAdd: table has too few places";
    if (base->lines % (size_t)table->shape[0])
        return "LowRankAdd: table's rows do not divide the tokens";
    if (factor->data && (factor->axes != 1 || factor->shape[0] != (int64_t)kernel->n))
        return "LowRankAdd: factor is not [n]";
    job->kernel = kernel;
    job->base = base->data, job->x = x->data;
    job->table = table->data, job->factor = factor->data;
    job->tokens = base->lines, job->rows = (size_t)table->shape[0];
    job->entries = (size_t)table->shape[1], job->places = (size_t)table->shape[2];
    const size_t even = (kernel->k + 2 * MOST_CHUNKS - 1) / (2 * MOST_CHUNKS) * 2;
    job->chunk = even > LEAST_CHUNK ? even : LEAST_CHUNK;
    job->chunks = (kernel->k + job->chunk - 1) / job->chunk;
    return check_entries(job);
}

static Status *compute(void *data, Opaque *context) {
    const struct kernel *kernel = data;
    const struct api *api = kernel->api;
    struct tensor inputs[4] = {{0}};
    size_t given = 0;
    Status *status = CALL_API(api, KernelContext_GetInputCount, (const Opaque *, size_t *),
                              context, &given);
    for (size_t i = 0; i < 4 && i < given && !status; i++)
        status = input(api, context, i, &inputs[i]);
    if (status) return status;
    struct job job;
    memset(&job, 0, offsetof(struct job, blocks));
    const char *wrong = check(kernel, &inputs[0], &inputs[1], &inputs[2], &inputs[3], &job);
    if (wrong) return refuse(api, wrong);
    Opaque *value = NULL;
    struct tensor y = {0};
    status = CALL_API(api, KernelContext_GetOutput,
                      (Opaque *, size_t, const int64_t *, size_t, Opaque **), context, 0,
                      inputs[0].shape, inputs[0].axes, &value);
    if (!status)
        status = CALL_API(api, GetTensorMutableData, (const Opaque *, void **), value, &y.data);
    if (status) return status;
    job.y = y.data;
    return job.tokens ? add_all(&job, context) : NULL;
}

/* ---- the operator, described ---- */

static Status *attribute(const struct api *api, const Opaque *info, const char *name,
                         size_t *found) {
    int64_t value = 0;
    Status *status = CALL_API(api, KernelInfoGetAttribute_int64,
                              (const Opaque *, const char *, int64_t *), info, name, &value);
    if (!status && (value < 0 || value > 1 << 30))
        status = refuse(api, "LowRankAdd: an attribute is out of range");
    *found = (size_t)value;
    return status;
}

static Status *create(const struct custom_op *op, const struct api *api, const Opaque *info,
                      void **made) {
    (void)op;
    int64_t widths[MOST_PARTS];
    struct kernel kernel = {.api = api, .products = &PRODUCTS[products_here() - 1]};
    kernel.parts = MOST_PARTS;
    Status *status = attribute(api, info, "k", &kernel.k);
    if (!status) status = attribute(api, info, "first", &kernel.first);
    if (!status)
        status = CALL_API(api, KernelInfoGetAttributeArray_int64,
                          (const Opaque *, const char *, int64_t *, size_t *), info, "widths",
                          widths, &kernel.parts);
    if (status) return status;
    if (!kernel.k || !kernel.parts) return refuse(api, "LowRankAdd: k or widths are empty");
    for (size_t p = 0; p < kernel.parts; p++) {
        if (widths[p] < 1 || widths[p] > 1 << 30)
            return refuse(api, "LowRankAdd: a width is out of range");
        kernel.begin[p] = kernel.n, kernel.width[p] = (size_t)widths[p];
        kernel.n += kernel.width[p];
    }
    struct kernel *kept = malloc(sizeof *kept);
    if (!kept) return refuse(api, "LowRankAdd: no memory");
    *kept = kernel;
    *made = kept;
    return NULL;
}

static const char *name(const struct custom_op *op) {
    (void)op;
    return "LowRankAdd";
}

static const char *on_processor(const struct custom_op *op) {
    (void)op;
    return NULL;
}

static size_t inputs(const struct custom_op *op) {
    (void)op;
    return 4;
}

static size_t outputs(const struct custom_op *op) {
    (void)op;
    return 1;
}

static int input_type(const struct custom_op *op, size_t index) {
    (void)op;
    return index == 2 ? ELEMENT_INT64 : ELEMENT_FLOAT;
}

static int output_type(const struct custom_op *op, size_t index) {
    (void)op, (void)index;
    return ELEMENT_FLOAT;
}

static int input_needed(const struct custom_op *op, size_t index) {
    (void)op;
    return index == 3 ? OPTIONAL : REQUIRED;
}

static int zero_of(const struct custom_op *op, size_t index) {
    (void)op, (void)index;
    return 0; /* always given; in the processor's memory */
}

static int first_version(const struct custom_op *op) {
    (void)op;
    return 1;
}

static int last_version(const struct custom_op *op) {
    (void)op;
    return 1;
}

static int one(const struct custom_op *op) {
    (void)op;
    return 1; /* of variadic ones, of which there are none */
}

/* y may take base's memory. */
static size_t in_place(int **input_index, int **output_index) {
    *input_index = calloc(1, sizeof(int)), *output_index = calloc(1, sizeof(int));
    return *input_index && *output_index ? 1 : 0;
}

static void release(int *first, int *second) {
    free(first);
    free(second);
}

static size_t no_alias(int **input_index, int **output_index) {
    *input_index = *output_index = NULL;
    return 0;
}

static const struct custom_op OPERATOR = {
    .version = API_VERSION,
    .name = name,
    .execution_provider = on_processor,
    .input_type = input_type,
    .input_count = inputs,
    .output_type = output_type,
    .output_count = outputs,
    .destroy = free,
    .input_characteristic = input_needed,
    .output_characteristic = zero_of,
    .input_memory = zero_of,
    .variadic_input_least = one,
    .variadic_input_alike = one,
    .variadic_output_least = one,
    .variadic_output_alike = one,
    .create_kernel_v2 = create,
    .compute_v2 = compute,
    .first_version = first_version,
    .last_version = last_version,
    .in_place = in_place,
    .release_in_place = release,
    .aliases = no_alias,
    .release_aliases = release,
};

#define EXPORT __attribute__((visibility("default")))

EXPORT int remora_low_rank_add_version(void) { return LOW_RANK_ADD_VERSION; }

EXPORT const char *remora_low_rank_add_products(void) {
    return PRODUCTS[products_here() - 1].name;
}

/* What the runtime looks for when it is given the library. One domain serves all sessions. */
EXPORT Status *RegisterCustomOps(Opaque *options, const struct api_base *runtime) {
    static _Atomic(Opaque *) shared;
    const struct api *api = runtime->get_api(API_VERSION);
    if (!api) { /* older than 1.18: version 1 can say so */
        const struct api *first = runtime->get_api(1);
        return first ? refuse(first, "LowRankAdd: needs ONNX Runtime 1.18 or newer") : NULL;
    }
    Opaque *domain = atomic_load(&shared);
    if (!domain) {
        Status *status =
            CALL_API(api, CreateCustomOpDomain, (const char *, Opaque **), "com.remora", &domain);
        if (!status)
            status = CALL_API(api, CustomOpDomain_Add, (Opaque *, const struct custom_op *),
                              domain, &OPERATOR);
        if (status) return status;
        atomic_store(&shared, domain);
    }
    return CALL_API(api, AddCustomOpDomain, (Opaque *, Opaque *), options, domain);
}
