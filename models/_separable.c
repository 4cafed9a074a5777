/* A separable convolution as one operation of TensorFlow's: a depthwise one, one of 1 x 1, bias,
   addition and ReLU, band by band, so that what lies between stays in the cache. Its channels may
   lie in several pictures, which need not be concatenated.

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
#define PIXELS 7       /* of its sums that are taken at once, of a line */
#define LINES (WIDTH == 16 ? 2 : 1) /* of sums, with a line of taps for each in registers */
#define WIDEST 3       /* vectors of a panel, the columns of weights that are taken at once */
/* Pixels by a panel at once: their sums in registers, and where they are, if no more than 12. */
#define ROWS(vectors) (WIDTH == 16 && (vectors) > 1 ? 24 / (vectors) : 12 / (vectors))
#define MOST_PICTURES 16 /* whose channels are a layer's */
#define BAND (256 << 10) /* bytes of a band, with what it is made of: a part of the second cache */

#define COMPILED __attribute__((target(INSTRUCTIONS)))
#define INLINED COMPILED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 32")

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Loose __attribute__((vector_size(WIDTH * 4), aligned(4))); /* in memory, anywhere */
typedef int Mask __attribute__((vector_size(WIDTH * 4)));

/* `pictures`: how many there are side by side, channels behind channels. `side`: of the depthwise
   kernel, 0 where there is none: of every `stride`th pixel then, from that at `offset` on. `held`:
   channels between the two convolutions, a multiple of WIDTH. `padded`: pixels of a padded line, of
   which `left` come first. Taps are [side * side, held]; weights [channels, columns] come panel by
   panel; a bias has zeros up to a whole vector. */
typedef struct {
    int pictures, side, stride, offset, columns;
    unsigned char relu_before, relu;
    int height, width, channels, out_height, out_width, held, padded, left, top;
    const float *taps, *weights, *bias;
} Layer;

/* The larger of it and 0; of NaN 0. */
INLINED Vector positive(Vector it) { return (Vector)((Mask)it & (it > 0)); }

/* Some channels of pixels, of which one is `apart` floats from the next. */
typedef struct {
    const float *from;
    size_t apart;
    int channels;
} Part;

/* `channels` of them. Of a few as many as fill a vector are written, but none read from `end` on. */
INLINED void
copy(const float *from, const float *end, int channels, float *to, const bool relu) {
    Vector it = {0};
    if (channels < WIDTH) {
        if (end - from >= WIDTH) it = *(const Loose *)from;
        else memcpy(&it, from, (end - from) * sizeof(float));
        *(Loose *)to = relu ? positive(it) : it;
        return;
    }
    for (int c = 0; c + WIDTH <= channels; c += WIDTH) {
        it = *(const Loose *)(from + c);
        *(Loose *)(to + c) = relu ? positive(it) : it;
    }
    if (channels % WIDTH) { /* some once more, the same */
        it = *(const Loose *)(from + channels - WIDTH);
        *(Loose *)(to + channels - WIDTH) = relu ? positive(it) : it;
    }
}

/* Lines from `top` to `bottom` of picture `at` of `batch` to `to`, layer->padded pixels a line,
   layer->held channels a pixel; zeros where the picture has no line. What is beside the picture
   stays, and what is beyond its channels means nothing. */
INLINED void pad_by(
    const Layer *layer, const Part *parts, size_t at, size_t batch, int top, int bottom, float *to,
    const bool relu
) {
    size_t width = layer->width, held = layer->held, picture = layer->height * width;
    size_t line = layer->padded * held, inside = width * held;
    for (int y = top; y < bottom; y++, to += line) {
        float *pixel = to + layer->left * held, *beside = pixel + inside;
        if (y < 0 || y >= layer->height) {
            memset(pixel, 0, inside * sizeof(float));
            continue;
        }
        Vector kept = *(const Loose *)beside; /* a few channels reach there: at least a pixel is */
        for (size_t x = at * picture + y * width; pixel < beside; x++, pixel += held) {
            float *into = pixel;
            for (const Part *part = parts; part < parts + layer->pictures; part++) {
                const float *end = part->from + batch * picture * part->channels;
                copy(part->from + x * part->channels, end, part->channels, into, relu);
                into += part->channels;
            }
        }
        *(Loose *)beside = kept;
    }
}

COMPILED static void
pad(const Layer *layer, const Part *parts, size_t at, size_t batch, int top, int bottom,
    float *to) {
    if (layer->relu_before) pad_by(layer, parts, at, batch, top, bottom, to, true);
    else pad_by(layer, parts, at, batch, top, bottom, to, false);
}

/* `some` lines, at once, of WIDTH channels of the depthwise convolution of padded ones, each input
   read once for all that it is a tap of. */
INLINED void taps(
    const Layer *layer, const float *padded, const float *tap, float *to, const int side,
    const int stride, const int some
) {
    size_t held = layer->held;
    int columns = layer->out_width;
    size_t line = (size_t)layer->padded * held;
    for (int x = 0; x < columns; x += PIXELS) {
        x = x + PIXELS > columns ? columns - PIXELS : x; /* some once more, the same */
        const float *above = padded + (size_t)x * stride * held;
        Vector sum[LINES][PIXELS];
        UNROLLED for (int l = 0; l < some; l++)
            UNROLLED for (int p = 0; p < PIXELS; p++) sum[l][p] = (Vector){0};
        UNROLLED for (int i = 0; i < (some - 1) * stride + side; i++, above += line) {
            Vector by[LINES][LARGEST_SIDE];
            UNROLLED for (int l = 0; l < some; l++)
                UNROLLED for (int j = 0; j < side; j++)
                    if (i >= l * stride && i < l * stride + side)
                        by[l][j] = *(const Loose *)(tap + ((i - l * stride) * side + j) * held);
            const float *from = above;
            UNROLLED for (int q = 0; q < (PIXELS - 1) * stride + side; q++, from += held) {
                Vector one = *(const Vector *)from;
                UNROLLED for (int l = 0; l < some; l++)
                    UNROLLED for (int j = q % stride; j < side; j += stride)
                        if (i >= l * stride && i < l * stride + side && q >= j &&
                            (q - j) / stride < PIXELS)
                            sum[l][(q - j) / stride] += one * by[l][j];
            }
        }
        float *out = to + (size_t)x * held;
        UNROLLED for (int l = 0; l < some; l++, out += (size_t)columns * held)
            UNROLLED for (int p = 0; p < PIXELS; p++) *(Vector *)(out + p * held) = sum[l][p];
    }
}

/* `lines` lines of all channels. */
INLINED void all_taps(
    const Layer *layer, const float *padded, int lines, float *to, const int side, const int stride
) {
    size_t from = (size_t)layer->padded * layer->held * stride;
    size_t into = (size_t)layer->out_width * layer->held;
    for (int c = 0; c < layer->channels; c += WIDTH) {
        const float *tap = layer->taps + c;
        int y = 0;
        for (; y + LINES <= lines; y += LINES)
            taps(layer, padded + y * from + c, tap, to + y * into + c, side, stride, LINES);
        for (; y < lines; y++)
            taps(layer, padded + y * from + c, tap, to + y * into + c, side, stride, 1);
    }
}

COMPILED static void
depthwise(const Layer *layer, const float *padded, int lines, float *to) {
    switch (layer->side * 10 + layer->stride) {
        case 31: all_taps(layer, padded, lines, to, 3, 1); break;
        case 32: all_taps(layer, padded, lines, to, 3, 2); break;
        case 51: all_taps(layer, padded, lines, to, 5, 1); break;
        case 52: all_taps(layer, padded, lines, to, 5, 2); break;
        case 71: all_taps(layer, padded, lines, to, 7, 1); break;
        case 72: all_taps(layer, padded, lines, to, 7, 2); break;
    }
}

/* Some columns of the product of `pixels` pixels, whose channels are those of `parts` one after
   another, with `weights` [channels, columns]: `vectors` of them, from `first` on, `rows` pixels at
   once. */
INLINED void panel(
    const Layer *layer, const Part *parts, int count, size_t pixels, const float *weights,
    int first, const float *addend, float *to, const int rows, const int vectors
) {
    size_t columns = layer->columns, end = pixels * columns;
    const float *bias = layer->bias + first; /* read late: no register is free before */
    for (size_t at = 0; at < pixels; at += rows) {
        size_t there = pixels - at < (size_t)rows ? pixels - at : (size_t)rows;
        const float *weight = weights;
        Vector sum[ROWS(1)][WIDEST];
        UNROLLED for (int r = 0; r < rows; r++)
            UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] = (Vector){0};
        for (const Part *part = parts; part < parts + count; part++) {
            const float *row[ROWS(1)];
            UNROLLED for (int r = 0; r < rows; r++) { /* the last one for those that are not there */
                size_t pixel = at + ((size_t)r < there ? (size_t)r : there - 1);
                row[r] = part->from + pixel * part->apart;
            }
            const float *next = part->from + (at + rows) * part->apart; /* fetched ahead */
            for (int k = 0; k < part->channels; k++, weight += vectors * WIDTH) {
                Vector by[WIDEST];
                __builtin_prefetch(next + k * rows, 0, 2);
                UNROLLED for (int v = 0; v < vectors; v++)
                    by[v] = *(const Loose *)(weight + v * WIDTH);
                UNROLLED for (int r = 0; r < rows; r++)
                    UNROLLED for (int v = 0; v < vectors; v++) sum[r][v] += row[r][k] * by[v];
            }
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
    const Layer *layer, const Part *parts, int count, size_t pixels, const float *addend, float *to
) {
    const float *weights = layer->weights;
    int left = (layer->columns + WIDTH - 1) / WIDTH, first = 0;
    while (left) {
        int vectors = widest(left);
        left -= vectors;
        if (!left) first = layer->columns > vectors * WIDTH ? layer->columns - vectors * WIDTH : 0;
        if (vectors == 3)
            panel(layer, parts, count, pixels, weights, first, addend, to, ROWS(3), 3);
        else if (vectors == 2)
            panel(layer, parts, count, pixels, weights, first, addend, to, ROWS(2), 2);
        else
            panel(layer, parts, count, pixels, weights, first, addend, to, ROWS(1), 1);
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

/* The layer without a depthwise part on `batch` pictures. Zeros are beyond their last line and
   column. False where there is no memory. */
static bool pointwise(
    const Layer *layer, size_t batch, const Part *parts, const float *addend, float *to
) {
    size_t stride = layer->stride, offset = layer->offset, width = layer->width;
    bool whole = stride == 1; /* all pixels of all pictures, as one line */
    size_t lines = whole ? 1 : batch * layer->out_height;
    size_t line = whole ? batch * layer->height * width : (size_t)layer->out_width;
    size_t inside = whole ? line : (width - offset + stride - 1) / stride;
    size_t most = BAND / sizeof(float) / layer->channels / ROWS(1) * ROWS(1);
    float *zeros = scratch(layer->channels);
    if (!zeros) return false;
    memset(zeros, 0, layer->channels * sizeof(float));
    if (!most) most = ROWS(1);
    for (size_t y = 0; y < lines; y++) {
        size_t above = y % layer->out_height * stride + offset, some;
        size_t from = whole ? 0 : (y / layer->out_height * layer->height + above) * width + offset;
        size_t there = whole || above < (size_t)layer->height ? inside : 0;
        for (size_t x = 0; x < line; x += some) {
            some = (x < there ? there : line) - x < most ? (x < there ? there : line) - x : most;
            Part now[MOST_PICTURES];
            for (int p = 0; p < layer->pictures; p++) {
                size_t apart = parts[p].channels * stride, first = from * parts[p].channels;
                const float *pixel = parts[p].from + first + x * apart;
                now[p] = x < there ? (Part){pixel, apart, parts[p].channels}
                                   : (Part){zeros, 0, parts[p].channels};
            }
            product(layer, now, layer->pictures, some, addend, to);
            to += some * layer->columns;
            if (addend) addend += some * layer->columns;
        }
    }
    return true;
}

/* The layer on `batch` pictures, by bands: whole pictures, or some lines of one. False where there
   is no memory. */
static bool
separable(const Layer *layer, size_t batch, const Part *parts, const float *addend, float *to) {
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
    for (size_t first = 0, end = 0; first < batch * lines; first = end) {
        end = first + band < batch * lines ? first + band : batch * lines;
        float *into = between;
        for (size_t at = first, next; at < end; at = next) {
            next = (at / lines + 1) * lines < end ? (at / lines + 1) * lines : end;
            int some = (int)(next - at), top = (int)(at % lines) * layer->stride - layer->top;
            int bottom = top + (some - 1) * layer->stride + layer->side;
            pad(layer, parts, at / lines, batch, top, bottom, padded);
            depthwise(layer, padded, some, into);
            into += some * line;
        }
        size_t pixels = (end - first) * layer->out_width, floats = pixels * layer->columns;
        const Part all = {between, layer->held, layer->channels};
        product(layer, &all, 1, pixels, addend, to);
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
#define LAYOUT 3 /* of inputs, taps and panels: where models/separable.py has another, it is old */

/* Attributes of an operation, read one after another; what went wrong lies in `status`. */
static void read_int(void *context, const char *name, int *into, void *status) {
    if (!tf.GetCode(status)) tf.OpKernelConstruction_GetAttrInt32(context, name, into, status);
}

static void read_bool(void *context, const char *name, unsigned char *into, void *status) {
    if (!tf.GetCode(status)) tf.OpKernelConstruction_GetAttrBool(context, name, into, status);
}

static void *create(void *context) {
    Layer *layer = calloc(1, sizeof *layer);
    void *status = tf.NewStatus();
    if (layer) {
        read_int(context, "picture_count", &layer->pictures, status);
        read_int(context, "side", &layer->side, status);
        read_int(context, "stride", &layer->stride, status);
        read_int(context, "offset", &layer->offset, status);
        read_int(context, "columns", &layer->columns, status);
        read_bool(context, "relu_before", &layer->relu_before, status);
        read_bool(context, "relu", &layer->relu, status);
    } else {
        tf.SetStatus(status, RESOURCE_EXHAUSTED, "no memory for " OPERATION);
    }
    if (tf.GetCode(status)) tf.OpKernelConstruction_Failure(context, status);
    tf.DeleteStatus(status);
    return layer;
}

/* Pixels that `kernel` at every `stride`th of `size` ones reaches beyond them, as SAME has it. */
static int beyond(int size, int stride, int kernel) {
    int more = ((size + stride - 1) / stride - 1) * stride + kernel - size;
    return more > 0 ? more : 0;
}

/* What `compute` adds of sizes and `parts`; false where a tensor is not as the layer has it. */
static bool measured(Layer *layer, Part *parts, void *const *tensor, int count) {
    int side = layer->side, stride = layer->stride, offset = layer->offset;
    if (side && side != 3 && side != 5 && side != 7) return false;
    if (!side && layer->relu_before) return false;
    if ((stride != 1 && stride != 2) || offset < 0 || offset >= (side ? 1 : stride)) return false;
    int64_t most = INT32_MAX / 16, channels = 0;
    for (int p = 0; p < layer->pictures; p++) {
        if (tf.NumDims(tensor[p]) != 4) return false;
        for (int i = 0; i < 4; i++) {
            int64_t size = tf.Dim(tensor[p], i);
            if (size > most || (i && i < 3 && size < 1)) return false;
            if (i < 3 && size != tf.Dim(tensor[0], i)) return false;
        }
        parts[p].channels = (int)tf.Dim(tensor[p], 3);
        channels += parts[p].channels;
    }
    void *const *given = tensor + layer->pictures; /* taps, weights, bias, addend */
    if (tf.NumDims(given[0]) != 2 || tf.NumDims(given[1]) != 1 || tf.NumDims(given[2]) != 1)
        return false;
    if (channels < 1 || channels > most || layer->columns > most) return false;
    int64_t wide = (layer->columns + WIDTH - 1) / WIDTH * WIDTH;
    layer->height = (int)tf.Dim(tensor[0], 1);
    layer->width = (int)tf.Dim(tensor[0], 2);
    layer->channels = (int)channels;
    layer->held = (layer->channels + WIDTH - 1) / WIDTH * WIDTH;
    layer->out_height = (layer->height + stride - 1) / stride;
    layer->out_width = (layer->width + stride - 1) / stride;
    layer->top = beyond(layer->height, stride, side) / 2;
    layer->left = beyond(layer->width, stride, side) / 2;
    layer->padded = layer->width + beyond(layer->width, stride, side);
    if (tf.Dim(given[0], 0) != side * side || tf.Dim(given[0], 1) != layer->held ||
        tf.Dim(given[1], 0) != channels * wide || tf.Dim(given[2], 0) != wide ||
        (side && layer->out_width < PIXELS))
        return false;
    if (count < layer->pictures + 4) return true;
    const int64_t result[] = {
        tf.Dim(tensor[0], 0), layer->out_height, layer->out_width, layer->columns};
    bool same = tf.NumDims(given[3]) == 4;
    for (int i = 0; same && i < 4; i++) same = tf.Dim(given[3], i) == result[i];
    return same;
}

static void compute(void *kernel, void *context) {
    Layer layer = *(const Layer *)kernel; /* threads may share the kernel */
    Part parts[MOST_PICTURES];
    void *tensor[MOST_PICTURES + 4] = {0}, *output = NULL, *status = tf.NewStatus();
    int count = tf.NumInputs(context), pictures = layer.pictures;
    if (pictures > MOST_PICTURES || count > pictures + 4)
        tf.SetStatus(status, INVALID_ARGUMENT, OPERATION ": too many pictures or addends");
    for (int i = 0; i < count && !tf.GetCode(status); i++)
        tf.GetInput(context, i, &tensor[i], status);
    if (!tf.GetCode(status) && !measured(&layer, parts, tensor, count))
        tf.SetStatus(status, INVALID_ARGUMENT, OPERATION ": shapes that do not fit together");
    if (!tf.GetCode(status)) {
        int64_t batch = tf.Dim(tensor[0], 0);
        int64_t shape[] = {batch, layer.out_height, layer.out_width, layer.columns};
        size_t bytes = (size_t)shape[0] * shape[1] * shape[2] * shape[3] * sizeof(float);
        output = tf.AllocateOutput(context, 0, FLOAT, shape, 4, bytes, status);
        if (!tf.GetCode(status) && batch) {
            void *const *given = tensor + pictures;
            layer.taps = tf.TensorData(given[0]);
            layer.weights = tf.TensorData(given[1]);
            layer.bias = tf.TensorData(given[2]);
            const float *addend = count > pictures + 3 ? tf.TensorData(given[3]) : NULL;
            for (int p = 0; p < pictures; p++) parts[p].from = tf.TensorData(tensor[p]);
            float *to = tf.TensorData(output);
            if (!(layer.side ? separable : pointwise)(&layer, batch, parts, addend, to))
                tf.SetStatus(status, RESOURCE_EXHAUSTED, "no memory for " OPERATION);
        }
    }
    if (tf.GetCode(status)) tf.OpKernelContext_Failure(context, status);
    if (output) tf.DeleteTensor(output);
    for (int i = 0; i < MOST_PICTURES + 4; i++)
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
    static const char *const inputs[] = {
        "pictures: picture_count * float", "taps: float", "weights: float", "bias: float",
        "addends: addend_count * float"};
    static const char *const attributes[] = {
        "picture_count: int >= 1", "addend_count: int >= 0", "side: int", "stride: int >= 1",
        "offset: int >= 0", "columns: int >= 1", "relu_before: bool", "relu: bool"};
    void *status = tf.NewStatus(), *operation = tf.NewOpDefinitionBuilder(OPERATION);
    for (size_t i = 0; i < sizeof inputs / sizeof *inputs; i++)
        tf.OpDefinitionBuilderAddInput(operation, inputs[i]);
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        tf.OpDefinitionBuilderAddAttr(operation, attributes[i]);
    tf.OpDefinitionBuilderAddOutput(operation, "result: float");
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
