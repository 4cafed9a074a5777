/* A separable convolution as one operation of TensorFlow's: a depthwise one, one of 1 x 1, bias,
   addition and ReLU, band by band, so that what lies between stays in the cache.

   Kernels are added to TensorFlow through its C interface, whose functions are looked up where it
   is loaded: nothing of it is needed to compile this. models/kernels.py says when it is asked. */

#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef WIDTH /* _separable_avx512.c has another */
#define WIDTH 8 /* floats of a vector */
#endif
#if WIDTH == 16 && !defined LOWERED
#define INSTRUCTIONS "avx512f"
#define SUPPORTED __builtin_cpu_supports("avx512f")
#define NAME _separable_avx512
#else
#define INSTRUCTIONS "avx2,fma"
#define SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define NAME _separable
#endif

#define LARGEST_SIDE 7 /* of a depthwise kernel */
#define PIXELS 7       /* of its sums that are taken at once, with a line of taps in registers */
#define WIDEST 3       /* vectors of a panel, the columns of weights that are taken at once */
/* Pixels by a panel at once: their sums in registers, and where they are, if no more than 12. */
#define ROWS(vectors) (WIDTH == 16 && (vectors) > 1 ? 24 / (vectors) : 12 / (vectors))
#define BAND (256 << 10) /* bytes of a band, with what it is made of: a part of the second cache */

#define COMPILED __attribute__((target(INSTRUCTIONS)))
#define INLINED COMPILED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 32")

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Loose __attribute__((vector_size(WIDTH * 4), aligned(4))); /* in memory, anywhere */
typedef int Mask __attribute__((vector_size(WIDTH * 4)));

/* `side`: of the depthwise kernel, 0 where there is none. `held`: channels between the two
   convolutions, a multiple of WIDTH. `padded`: pixels of a padded line, of which `left` come first.
   Taps are [side * side, held]; weights [channels, columns] come panel by panel; a bias has zeros
   up to a whole vector. */
typedef struct {
    int side, stride, columns;
    unsigned char relu_before, relu;
    int height, width, channels, out_height, out_width, held, padded, left, top;
    const float *taps, *weights, *bias;
} Layer;

/* The larger of it and 0; of NaN 0. */
INLINED Vector positive(Vector it) { return (Vector)((Mask)it & (it > 0)); }

/* Lines from `top` to `bottom` of a picture to `to`, layer->padded pixels a line, layer->held
   channels a pixel; zeros where the picture has no line. What is beside the picture stays, and what
   is beyond its channels means nothing. No float is read from `end` on. */
COMPILED static void
pad(const Layer *layer, const float *picture, const float *end, int top, int bottom, float *to) {
    int channels = layer->channels, held = layer->held, relu = layer->relu_before;
    size_t line = (size_t)layer->padded * held;
    for (int y = top; y < bottom; y++, to += line) {
        float *pixel = to + (size_t)layer->left * held;
        if (y < 0 || y >= layer->height) {
            memset(pixel, 0, (size_t)layer->width * held * sizeof(float));
            continue;
        }
        const float *from = picture + (size_t)y * layer->width * channels;
        for (int x = 0; x < layer->width; x++, from += channels, pixel += held) {
            for (int c = 0; channels >= WIDTH && c < channels; c += WIDTH) {
                c = c + WIDTH > channels ? channels - WIDTH : c; /* some once more, the same */
                Vector it = *(const Loose *)(from + c);
                *(Loose *)(pixel + c) = relu ? positive(it) : it;
            }
            if (channels < WIDTH) {
                Vector it = {0};
                if (end - from >= WIDTH) it = *(const Loose *)from;
                else memcpy(&it, from, (end - from) * sizeof(float));
                *(Loose *)pixel = relu ? positive(it) : it;
            }
        }
    }
}

/* `lines` lines of the depthwise convolution of padded ones, each input read once for all that it
   is a tap of. */
INLINED void taps(
    const Layer *layer, const float *padded, int lines, float *to, const int side, const int stride
) {
    int held = layer->held, columns = layer->out_width;
    size_t line = (size_t)layer->padded * held;
    for (int c = 0; c < layer->channels; c += WIDTH)
        for (int y = 0; y < lines; y++)
            for (int x = 0; x < columns; x += PIXELS) {
                x = x + PIXELS > columns ? columns - PIXELS : x; /* some once more, the same */
                const float *above = padded + y * stride * line + (size_t)x * stride * held + c;
                const float *tap = layer->taps + c;
                Vector sum[PIXELS];
                UNROLLED for (int p = 0; p < PIXELS; p++) sum[p] = (Vector){0};
                for (int i = 0; i < side; i++, above += line, tap += side * held) {
                    Vector by[LARGEST_SIDE];
                    const float *from = above;
                    UNROLLED for (int j = 0; j < side; j++)
                        by[j] = *(const Loose *)(tap + j * held);
                    UNROLLED for (int q = 0; q < (PIXELS - 1) * stride + side; q++, from += held) {
                        Vector one = *(const Vector *)from;
                        UNROLLED for (int j = q % stride; j < side; j += stride)
                            if (q >= j && (q - j) / stride < PIXELS)
                                sum[(q - j) / stride] += one * by[j];
                    }
                }
                float *out = to + ((size_t)y * columns + x) * held + c;
                UNROLLED for (int p = 0; p < PIXELS; p++, out += held) *(Vector *)out = sum[p];
            }
}

COMPILED static void
depthwise(const Layer *layer, const float *padded, int lines, float *to) {
    switch (layer->side * 10 + layer->stride) {
        case 22: taps(layer, padded, lines, to, 2, 2); break;
        case 31: taps(layer, padded, lines, to, 3, 1); break;
        case 32: taps(layer, padded, lines, to, 3, 2); break;
        case 51: taps(layer, padded, lines, to, 5, 1); break;
        case 52: taps(layer, padded, lines, to, 5, 2); break;
        case 71: taps(layer, padded, lines, to, 7, 1); break;
        case 72: taps(layer, padded, lines, to, 7, 2); break;
    }
}

/* Some columns of the product of `pixels` pixels, `apart` floats from one to the next, with
   `weights` [channels, columns]: `vectors` of them, from `first` on, `rows` pixels at once. */
INLINED void panel(
    const Layer *layer, const float *from, size_t apart, size_t pixels, const float *weights,
    int first, const float *addend, float *to, const int rows, const int vectors
) {
    int depth = layer->channels;
    size_t columns = layer->columns, end = pixels * columns;
    const float *bias = layer->bias + first; /* read late: no register is free before */
    for (size_t at = 0; at < pixels; at += rows) {
        size_t there = pixels - at < (size_t)rows ? pixels - at : (size_t)rows;
        const float *row[ROWS(1)], *weight = weights;
        UNROLLED for (int r = 0; r < rows; r++) /* the last one for those that are not there */
            row[r] = from + (at + ((size_t)r < there ? (size_t)r : there - 1)) * apart;
        Vector sum[ROWS(1)][WIDEST];
        UNROLLED for (int r = 0; r < rows; r++)
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = (Vector){0};
        for (int k = 0; k < depth; k++, weight += vectors * WIDTH) {
            Vector by[WIDEST];
            UNROLLED for (int v = 0; v < vectors; v++) by[v] = *(const Loose *)(weight + v * WIDTH);
            UNROLLED for (int r = 0; r < rows; r++)
                UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] += row[r][k] * by[v];
        }
        size_t place = at * columns + first;
        if (there == (size_t)rows && place + (rows - 1) * columns + vectors * WIDTH <= end) {
            UNROLLED for (int r = 0; r < rows; r++, place += columns)
                UNROLLED for (int v = 0; v < vectors; v++) {
                    Vector it = sum[r][v] + *(const Loose *)(bias + v * WIDTH);
                    if (addend) it += *(const Loose *)(addend + place + v * WIDTH);
                    *(Loose *)(to + place + v * WIDTH) = layer->relu ? positive(it) : it;
                }
            continue;
        }
        float last[ROWS(1)][WIDEST * WIDTH];
        UNROLLED for (int r = 0; r < rows; r++)
            UNROLLED for (int v = 0; v < vectors; v++)
                *(Loose *)(last[r] + v * WIDTH) = sum[r][v] + *(const Loose *)(bias + v * WIDTH);
        for (size_t r = 0; r < there; r++, place += columns)
            for (size_t c = 0; c < (size_t)(vectors * WIDTH) && first + c < columns; c++) {
                float it = last[r][c] + (addend ? addend[place + c] : 0);
                to[place + c] = layer->relu && !(it > 0) ? 0 : it;
            }
    }
}

/* How many vectors the next panel has where `left` are left: best three, and one only by itself. */
static int widest(int left) { return left == 2 || left == 4 ? 2 : left < WIDEST ? left : WIDEST; }

/* The whole product, panel by panel. The last begins early where the columns are no multiple of a
   vector: some are written twice, the same. Of a single panel that is wider than the columns each
   pixel's end is written by the next. */
COMPILED static void product(
    const Layer *layer, const float *from, size_t apart, size_t pixels, const float *addend,
    float *to
) {
    const float *weights = layer->weights;
    int left = (layer->columns + WIDTH - 1) / WIDTH, first = 0;
    while (left) {
        int vectors = widest(left);
        left -= vectors;
        if (!left) first = layer->columns > vectors * WIDTH ? layer->columns - vectors * WIDTH : 0;
        if (vectors == 3)
            panel(layer, from, apart, pixels, weights, first, addend, to, ROWS(3), 3);
        else if (vectors == 2)
            panel(layer, from, apart, pixels, weights, first, addend, to, ROWS(2), 2);
        else
            panel(layer, from, apart, pixels, weights, first, addend, to, ROWS(1), 1);
        weights += (size_t)layer->channels * vectors * WIDTH;
        first += vectors * WIDTH;
    }
}

/* A thread's memory between the two convolutions: kept, since the next layer wants it too. */
typedef struct {
    size_t size;
    float *floats;
} Scratch;

static pthread_key_t scratch_key;

static void forget(void *held) {
    free(((Scratch *)held)->floats);
    free(held);
}

static float *scratch(size_t floats) {
    Scratch *held = pthread_getspecific(scratch_key);
    if (!held) {
        held = calloc(1, sizeof *held);
        if (!held || pthread_setspecific(scratch_key, held)) return free(held), NULL;
    }
    if (held->size < floats) {
        free(held->floats);
        held->size = 0;
        held->floats = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!held->floats) return NULL;
        memset(held->floats, 0, floats * sizeof(float));
        held->size = floats;
    }
    return held->floats;
}

/* The layer without a depthwise part on `batch` pictures. */
static void
pointwise(const Layer *layer, size_t batch, const float *from, const float *addend, float *to) {
    size_t pixels = batch * layer->height * layer->width, depth = layer->channels;
    size_t some = BAND / sizeof(float) / depth / ROWS(1) * ROWS(1);
    if (!some) some = ROWS(1);
    for (; pixels; pixels -= some) {
        if (some > pixels) some = pixels;
        product(layer, from, depth, some, addend, to);
        from += some * depth;
        to += some * layer->columns;
        if (addend) addend += some * layer->columns;
    }
}

/* The layer on `batch` pictures, by bands: whole pictures, or some lines of one. False where there
   is no memory. */
static bool
separable(const Layer *layer, size_t batch, const float *from, const float *addend, float *to) {
    size_t lines = layer->out_height, line = (size_t)layer->out_width * layer->held;
    size_t before = (size_t)layer->left * layer->held, inside = (size_t)layer->width * layer->held;
    size_t whole = (size_t)layer->padded * layer->held, more = whole * layer->stride;
    size_t around = whole * (layer->side - layer->stride), most = BAND / sizeof(float), band = 1;
    if (around + lines * (more + line) <= most) {
        band = lines * ((most - around - lines * more) / (lines * line));
    } else if (around + more + line <= most) {
        band = (most - around) / (more + line);
    }
    size_t padding = around + (band < lines ? band : lines) * more;
    float *padded = scratch(padding + band * line);
    if (!padded) return false;
    float *between = padded + padding;
    for (float *beside = padded; beside < between; beside += whole) {
        memset(beside, 0, before * sizeof(float));
        memset(beside + before + inside, 0, (whole - before - inside) * sizeof(float));
    }
    size_t picture = (size_t)layer->height * layer->width * layer->channels;
    const float *last = from + batch * picture;
    for (size_t first = 0, end = 0; first < batch * lines; first = end) {
        end = first + band < batch * lines ? first + band : batch * lines;
        float *into = between;
        for (size_t at = first, next; at < end; at = next) {
            next = (at / lines + 1) * lines < end ? (at / lines + 1) * lines : end;
            int some = (int)(next - at), top = (int)(at % lines) * layer->stride - layer->top;
            int bottom = top + (some - 1) * layer->stride + layer->side;
            pad(layer, from + at / lines * picture, last, top, bottom, padded);
            depthwise(layer, padded, some, into);
            into += some * line;
        }
        size_t pixels = (end - first) * layer->out_width, floats = pixels * layer->columns;
        product(layer, between, layer->held, pixels, addend, to);
        to += floats;
        if (addend) addend += floats;
    }
    return true;
}

/* What is used of TensorFlow's C interface (tensorflow/c/kernels.h, ops.h, tf_tensor.h,
   tf_status.h), and its numbers for a type and for what went wrong. */
enum { FLOAT = 1, INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8 };
#define INTERFACE(X) \
    X(void *, NewStatus, (void)) \
    X(void, DeleteStatus, (void *)) \
    X(int, GetCode, (const void *)) \
    X(const char *, Message, (const void *)) \
    X(void, SetStatus, (void *, int, const char *)) \
    X(void *, NewOpDefinitionBuilder, (const char *)) \
    X(void, OpDefinitionBuilderAddAttr, (void *, const char *)) \
    X(void, OpDefinitionBuilderAddInput, (void *, const char *)) \
    X(void, OpDefinitionBuilderAddOutput, (void *, const char *)) \
    X(void, OpDefinitionBuilderSetShapeInferenceFunction, (void *, void (*)(void *, void *))) \
    X(void, RegisterOpDefinition, (void *, void *)) \
    X(void, ShapeInferenceContextSetUnknownShape, (void *, void *)) \
    X(void *, NewKernelBuilder, \
      (const char *, const char *, void *(*)(void *), void (*)(void *, void *), void (*)(void *))) \
    X(void, RegisterKernelBuilder, (const char *, void *, void *)) \
    X(void, OpKernelConstruction_GetAttrInt32, (void *, const char *, int32_t *, void *)) \
    X(void, OpKernelConstruction_GetAttrBool, (void *, const char *, unsigned char *, void *)) \
    X(void, OpKernelConstruction_Failure, (void *, void *)) \
    X(void, OpKernelContext_Failure, (void *, void *)) \
    X(int, NumInputs, (void *)) \
    X(void, GetInput, (void *, int, void **, void *)) \
    X(void *, AllocateOutput, (void *, int, int, const int64_t *, int, size_t, void *)) \
    X(void *, TensorData, (const void *)) \
    X(int, NumDims, (const void *)) \
    X(int64_t, Dim, (const void *, int)) \
    X(void, DeleteTensor, (void *))

#define MEMBER(result, name, arguments) result(*name) arguments;
static struct {
    INTERFACE(MEMBER)
} tf;

#define TEXT(macro) TEXT_OF(macro)
#define TEXT_OF(it) #it
#define OPERATION "ImageSeparableConv2DBy" TEXT(WIDTH)
#define LAYOUT 2 /* of taps and panels: another number than models/separable.py's is another's */

static void *create(void *context) {
    Layer *layer = calloc(1, sizeof *layer);
    void *status = tf.NewStatus();
    if (!layer) tf.SetStatus(status, RESOURCE_EXHAUSTED, "no memory for " OPERATION);
    if (!tf.GetCode(status))
        tf.OpKernelConstruction_GetAttrInt32(context, "side", &layer->side, status);
    if (!tf.GetCode(status))
        tf.OpKernelConstruction_GetAttrInt32(context, "stride", &layer->stride, status);
    if (!tf.GetCode(status))
        tf.OpKernelConstruction_GetAttrInt32(context, "columns", &layer->columns, status);
    if (!tf.GetCode(status))
        tf.OpKernelConstruction_GetAttrBool(context, "relu_before", &layer->relu_before, status);
    if (!tf.GetCode(status))
        tf.OpKernelConstruction_GetAttrBool(context, "relu", &layer->relu, status);
    if (tf.GetCode(status)) tf.OpKernelConstruction_Failure(context, status);
    tf.DeleteStatus(status);
    return layer;
}

/* What `compute` adds of sizes; false where a tensor is not as the layer has it. */
static bool measured(Layer *layer, void *const tensor[5], int count) {
    int side = layer->side, stride = layer->stride, odd = side == 3 || side == 5 || side == 7;
    if (!(stride == 1 && (!side || odd)) && !(stride == 2 && (side == 2 || odd))) return false;
    if (tf.NumDims(tensor[0]) != 4 || tf.NumDims(tensor[1]) != 2 || tf.NumDims(tensor[2]) != 1 ||
        tf.NumDims(tensor[3]) != 1)
        return false;
    int64_t most = INT32_MAX / 16;
    if (layer->columns > most) return false;
    int64_t wide = (layer->columns + WIDTH - 1) / WIDTH * WIDTH;
    for (int i = 0; i < 4; i++)
        if (tf.Dim(tensor[0], i) > most || (i && tf.Dim(tensor[0], i) < 1)) return false;
    layer->height = (int)tf.Dim(tensor[0], 1);
    layer->width = (int)tf.Dim(tensor[0], 2);
    layer->channels = (int)tf.Dim(tensor[0], 3);
    layer->held = (layer->channels + WIDTH - 1) / WIDTH * WIDTH;
    layer->out_height = (layer->height + stride - 1) / stride;
    layer->out_width = (layer->width + stride - 1) / stride;
    int above = (layer->out_height - 1) * stride + side - layer->height;
    int beside = (layer->out_width - 1) * stride + side - layer->width;
    layer->top = above > 0 ? above / 2 : 0;
    layer->left = beside > 0 ? beside / 2 : 0;
    layer->padded = layer->width + (beside > 0 ? beside : 0);
    if (tf.Dim(tensor[1], 0) != side * side || tf.Dim(tensor[1], 1) != layer->held ||
        tf.Dim(tensor[2], 0) != (int64_t)layer->channels * wide ||
        tf.Dim(tensor[3], 0) != wide ||
        (side && layer->out_width < PIXELS))
        return false;
    if (count < 5) return true;
    const int64_t result[] = {
        tf.Dim(tensor[0], 0), layer->out_height, layer->out_width, layer->columns};
    bool same = tf.NumDims(tensor[4]) == 4;
    for (int i = 0; same && i < 4; i++) same = tf.Dim(tensor[4], i) == result[i];
    return same;
}

static void compute(void *kernel, void *context) {
    Layer layer = *(const Layer *)kernel; /* threads may share the kernel */
    void *tensor[5] = {0}, *output = NULL, *status = tf.NewStatus();
    int count = tf.NumInputs(context);
    if (count > 5) tf.SetStatus(status, INVALID_ARGUMENT, OPERATION ": more than one addend");
    for (int i = 0; i < count && !tf.GetCode(status); i++)
        tf.GetInput(context, i, &tensor[i], status);
    if (!tf.GetCode(status) && !measured(&layer, tensor, count))
        tf.SetStatus(status, INVALID_ARGUMENT, OPERATION ": shapes that do not fit together");
    if (!tf.GetCode(status)) {
        int64_t batch = tf.Dim(tensor[0], 0);
        int64_t shape[] = {batch, layer.out_height, layer.out_width, layer.columns};
        size_t bytes = (size_t)shape[0] * shape[1] * shape[2] * shape[3] * sizeof(float);
        output = tf.AllocateOutput(context, 0, FLOAT, shape, 4, bytes, status);
        if (!tf.GetCode(status) && batch) {
            layer.taps = tf.TensorData(tensor[1]);
            layer.weights = tf.TensorData(tensor[2]);
            layer.bias = tf.TensorData(tensor[3]);
            const float *addend = count > 4 ? tf.TensorData(tensor[4]) : NULL;
            const float *from = tf.TensorData(tensor[0]);
            float *to = tf.TensorData(output);
            if (!layer.side) pointwise(&layer, batch, from, addend, to);
            else if (!separable(&layer, batch, from, addend, to))
                tf.SetStatus(status, RESOURCE_EXHAUSTED, "no memory for " OPERATION);
        }
    }
    if (tf.GetCode(status)) tf.OpKernelContext_Failure(context, status);
    if (output) tf.DeleteTensor(output);
    for (int i = 0; i < 5; i++)
        if (tensor[i]) tf.DeleteTensor(tensor[i]);
    tf.DeleteStatus(status);
}

static void infer(void *context, void *status) {
    tf.ShapeInferenceContextSetUnknownShape(context, status);
}

static PyObject *add_to(PyObject *module, PyObject *arguments) {
    const char *library;
    static bool added;
    if (!PyArg_ParseTuple(arguments, "s", &library)) return NULL;
    if (added) Py_RETURN_NONE;
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return PyErr_Format(PyExc_ImportError, "%s is not loaded", library);
#define FOUND(result, name, arguments) \
    if (!(tf.name = (result(*) arguments)dlsym(handle, "TF_" #name))) \
        return PyErr_Format(PyExc_ImportError, "TensorFlow has no TF_" #name);
    INTERFACE(FOUND)
    if (pthread_key_create(&scratch_key, forget))
        return PyErr_Format(PyExc_ImportError, "the process has no key left for a thread's memory");
    void *status = tf.NewStatus(), *operation = tf.NewOpDefinitionBuilder(OPERATION);
    tf.OpDefinitionBuilderAddInput(operation, "pictures: float");
    tf.OpDefinitionBuilderAddInput(operation, "taps: float");
    tf.OpDefinitionBuilderAddInput(operation, "weights: float");
    tf.OpDefinitionBuilderAddInput(operation, "bias: float");
    tf.OpDefinitionBuilderAddInput(operation, "addends: addend_count * float");
    tf.OpDefinitionBuilderAddOutput(operation, "result: float");
    tf.OpDefinitionBuilderAddAttr(operation, "addend_count: int >= 0");
    tf.OpDefinitionBuilderAddAttr(operation, "side: int");
    tf.OpDefinitionBuilderAddAttr(operation, "stride: int >= 1");
    tf.OpDefinitionBuilderAddAttr(operation, "columns: int >= 1");
    tf.OpDefinitionBuilderAddAttr(operation, "relu_before: bool");
    tf.OpDefinitionBuilderAddAttr(operation, "relu: bool");
    tf.OpDefinitionBuilderSetShapeInferenceFunction(operation, infer);
    tf.RegisterOpDefinition(operation, status);
    if (!tf.GetCode(status)) {
        void *kernel = tf.NewKernelBuilder(OPERATION, "CPU", create, compute, free);
        tf.RegisterKernelBuilder(OPERATION, kernel, status);
    }
    if (tf.GetCode(status)) PyErr_SetString(PyExc_ImportError, tf.Message(status));
    else added = true;
    tf.DeleteStatus(status);
    if (!added) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"add_to", add_to, METH_VARARGS, "add_to(path of a loaded libtensorflow_framework)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, TEXT(NAME), "Separable convolutions with vectors of " TEXT(WIDTH) ".", -1,
    functions, NULL, NULL, NULL, NULL,
};

#define JOINED(one, other) JOINED_OF(one, other)
#define JOINED_OF(one, other) one##other
PyMODINIT_FUNC JOINED(PyInit_, NAME)(void) {
    __builtin_cpu_init();
    if (!SUPPORTED) {
        PyErr_SetString(PyExc_ImportError, "this CPU has no " INSTRUCTIONS);
        return NULL;
    }
    PyObject *made = PyModule_Create(&module);
    if (made && (PyModule_AddIntConstant(made, "WIDTH", WIDTH) ||
                 PyModule_AddIntConstant(made, "LAYOUT", LAYOUT)))
        Py_CLEAR(made);
    return made;
}
