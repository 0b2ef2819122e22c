/* What is used of ONNX Runtime's C API, version 18: its functions by their place in the table,
 * which only ever grows at its end, and the description of an operator, likewise. */
#ifndef REMORA_RUNTIME_H
#define REMORA_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define API_VERSION 18

typedef struct Status Status; /* NULL: all is well */
typedef void Opaque;
typedef void (*Function)(void);

struct api {
    Function at[276];
};

struct api_base {
    const struct api *(*get_api)(uint32_t version);
    const char *(*version_string)(void);
};

/* The places, by the names of the public header. */
enum {
    CreateStatus = 0,
    CreateCustomOpDomain = 26,
    CustomOpDomain_Add = 27,
    AddCustomOpDomain = 28,
    GetTensorMutableData = 51,
    GetDimensionsCount = 61,
    GetDimensions = 62,
    GetTensorTypeAndShape = 65,
    KernelInfoGetAttribute_int64 = 86,
    KernelContext_GetInputCount = 88,
    KernelContext_GetInput = 90,
    KernelContext_GetOutput = 91,
    ReleaseTensorTypeAndShapeInfo = 99,
    KernelInfoGetAttributeArray_int64 = 163,
    KernelContext_ParallelFor = 274,
};

enum { FAIL = 1, INVALID_ARGUMENT = 2 };
enum { ELEMENT_FLOAT = 1, ELEMENT_INT64 = 7 };
enum { REQUIRED = 0, OPTIONAL = 1 };

/* The order of its members is the runtime's. */
struct custom_op {
    uint32_t version;
    void *(*create_kernel)(const struct custom_op *, const struct api *, const Opaque *info);
    const char *(*name)(const struct custom_op *);
    const char *(*execution_provider)(const struct custom_op *);
    int (*input_type)(const struct custom_op *, size_t);
    size_t (*input_count)(const struct custom_op *);
    int (*output_type)(const struct custom_op *, size_t);
    size_t (*output_count)(const struct custom_op *);
    void (*compute)(void *kernel, Opaque *context);
    void (*destroy)(void *kernel);
    int (*input_characteristic)(const struct custom_op *, size_t);
    int (*output_characteristic)(const struct custom_op *, size_t);
    int (*input_memory)(const struct custom_op *, size_t);
    int (*variadic_input_least)(const struct custom_op *);
    int (*variadic_input_alike)(const struct custom_op *);
    int (*variadic_output_least)(const struct custom_op *);
    int (*variadic_output_alike)(const struct custom_op *);
    Status *(*create_kernel_v2)(const struct custom_op *, const struct api *, const Opaque *info,
                                void **kernel);
    Status *(*compute_v2)(void *kernel, Opaque *context);
    Status *(*infer_shape)(const struct custom_op *, Opaque *);
    int (*first_version)(const struct custom_op *);
    int (*last_version)(const struct custom_op *);
    size_t (*in_place)(int **input, int **output);
    void (*release_in_place)(int *input, int *output);
    size_t (*aliases)(int **input, int **output);
    void (*release_aliases)(int *input, int *output);
};

/* Calls the function `which` of the table; its parameters' types, then the values. */
#define CALL_API(api, which, types, ...) ((Status * (*) types)(api)->at[which])(__VA_ARGS__)

#endif
