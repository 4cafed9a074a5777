/* Pillow's BILINEAR for RGB pictures, to the last bit, with AVX2.

   The filter is a triangle as wide as the pictures' ratio, but two pixels at least; its weights are
   whole numbers of 22 fractional bits, and each of the two passes rounds to a byte.
   Pillow computes a byte at a time; here the four of a pixel are computed at once.
   formats/resampling.py says when it is asked; tests/test_resampling.py compares the bits. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BITS 22   /* of a weight, behind the point */
#define PIXEL 4   /* bytes, as Pillow holds RGB */
#define CHANNELS 3
#define LONGEST (1 << 24) /* side, in pixels: what float32 counts one by one */

/* The Arrow C data interface, by which Pillow hands its pixels over without a copy. */
struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children, *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
};

/* For each of `size` pixels of the result the first of the `taps` pixels it is made of, and copies
   of each of their weights. All have as many taps, so that no loop ends before the processor
   expects it. */
typedef struct {
    int size, taps;
    int *first;
    int32_t *weights;
} Axis;

static void release(Axis *axis) {
    free(axis->first);
    free(axis->weights);
}

/* 0 where there is no memory. The part from `start` to `end` of `length` pixels becomes `size`. */
static int prepare(Axis *axis, int length, float start, float end, int size, int copies) {
    double scale = (double)(end - start) / size;
    double reach = scale < 1 ? 1 : scale;
    int most = (int)ceil(reach * 2) + 1;
    axis->size = size;
    axis->taps = most < length ? most : length;
    axis->first = malloc(sizeof(int) * size);
    axis->weights = calloc((size_t)axis->taps * size * copies, sizeof(int32_t));
    double *exact = malloc(sizeof(double) * most);
    int enough = axis->first && axis->weights && exact;
    for (int at = 0; enough && at < size; at++) {
        double centre = start + (at + 0.5) * scale, sum = 0;
        int low = (int)(centre - reach + 0.5), high = (int)(centre + reach + 0.5);
        low = low < 0 ? 0 : low;
        high = high > length ? length : high;
        for (int i = low; i < high; i++) {
            double off = fabs((i - centre + 0.5) * (1 / reach));
            exact[i - low] = off < 1 ? 1 - off : 0;
            sum += exact[i - low];
        }
        int first = low + axis->taps > length ? length - axis->taps : low;
        int32_t *weights = axis->weights + ((size_t)at * axis->taps + (low - first)) * copies;
        for (int i = 0; i < (high - low) * copies; i++)
            weights[i] = (int32_t)(0.5 + exact[i / copies] / sum * (1 << BITS));
        axis->first[at] = first;
    }
    free(exact);
    if (!enough) release(axis);
    return enough;
}

#define AVX2 __attribute__((target("avx2")))
#define INLINED AVX2 static inline __attribute__((always_inline))

/* `sum`, and the four bytes of a pixel, or the eight of two, by their weights. */
INLINED __m128i add_one(__m128i sum, const uint8_t *pixel, __m128i weight) {
    int32_t bytes;
    memcpy(&bytes, pixel, PIXEL);
    __m128i numbers = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
    return _mm_add_epi32(sum, _mm_mullo_epi32(numbers, weight));
}
INLINED __m256i add_two(__m256i sum, const uint8_t *pixels, __m256i weight) {
    __m256i numbers = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)pixels));
    return _mm256_add_epi32(sum, _mm256_mullo_epi32(numbers, weight));
}
INLINED __m128i low(__m256i two) { return _mm256_castsi256_si128(two); }
INLINED __m128i high(__m256i two) { return _mm256_extracti128_si256(two, 1); }

/* Writes `bytes` of the pixel that is made of a sum of weighted bytes: rounded and clipped. */
INLINED uint8_t *written(uint8_t *to, __m128i sum, int bytes) {
    sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(1 << (BITS - 1))), BITS);
    sum = _mm_packs_epi32(sum, sum);
    int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
    memcpy(to, &pixel, bytes);
    return to + bytes;
}

/* `lines` lines of `width` pixels to lines of x->size pixels of `bytes` each, two taps at once. */
INLINED void
along_x(const uint8_t *from, int width, int lines, const Axis *x, uint8_t *to, int bytes) {
    for (int line = 0; line < lines; line++, from += (size_t)width * PIXEL) {
        const int32_t *weight = x->weights;
        for (int at = 0; at < x->size; at++) {
            const uint8_t *tap = from + (size_t)x->first[at] * PIXEL;
            __m256i sums = _mm256_setzero_si256();
            for (int i = 1; i < x->taps; i += 2, tap += 2 * PIXEL, weight += 2 * PIXEL)
                sums = add_two(sums, tap, _mm256_loadu_si256((const __m256i *)weight));
            __m128i sum = _mm_add_epi32(low(sums), high(sums));
            if (x->taps % 2) {
                sum = add_one(sum, tap, _mm_loadu_si128((const __m128i *)weight));
                weight += PIXEL;
            }
            to = written(to, sum, bytes);
        }
    }
}

/* Lines of `width` pixels, `from` being the one that y counts as `top`, to y->size lines of pixels
   of `bytes` each, two pixels at once. */
INLINED void
along_y(const uint8_t *from, int width, int top, const Axis *y, uint8_t *to, int bytes) {
    size_t line = (size_t)width * PIXEL;
    const int32_t *weights = y->weights;
    for (int at = 0; at < y->size; at++, weights += y->taps) {
        const uint8_t *first = from + (size_t)(y->first[at] - top) * line;
        for (int x = 1; x < width; x += 2, first += 2 * PIXEL) {
            __m256i sums = _mm256_setzero_si256();
            const uint8_t *tap = first;
            for (int i = 0; i < y->taps; i++, tap += line)
                sums = add_two(sums, tap, _mm256_set1_epi32(weights[i]));
            to = written(to, low(sums), bytes);
            to = written(to, high(sums), bytes);
        }
        if (width % 2) {
            __m128i sum = _mm_setzero_si128();
            const uint8_t *tap = first;
            for (int i = 0; i < y->taps; i++, tap += line)
                sum = add_one(sum, tap, _mm_set1_epi32(weights[i]));
            to = written(to, sum, bytes);
        }
    }
}

/* One axis after the other; 0 where there is no memory. */
AVX2 static int
passes(const uint8_t *pixels, int width, const Axis *x, const Axis *y, int y_first, uint8_t *to) {
    int top = y->first[0], lines = y->first[y->size - 1] + y->taps - top;
    const uint8_t *used = pixels + (size_t)top * width * PIXEL;
    size_t between = y_first ? (size_t)width * y->size : (size_t)x->size * lines;
    uint8_t *halfway = malloc(between * PIXEL);
    if (!halfway) return 0;
    if (y_first) {
        along_y(used, width, top, y, halfway, PIXEL);
        along_x(halfway, width, y->size, x, to, CHANNELS);
    } else {
        along_x(used, width, lines, x, halfway, PIXEL);
        along_y(halfway, x->size, top, y, to, CHANNELS);
    }
    free(halfway);
    return 1;
}

/* The pixels that a capsule of Pillow's holds; NULL, with an exception, where it is another. */
static const uint8_t *pixels_of(PyObject *capsule, int width, int height) {
    struct ArrowArray *array = PyCapsule_GetPointer(capsule, "arrow_array");
    if (!array) return NULL;
    int64_t count = (int64_t)width * height;
    struct ArrowArray *bytes = array->n_children == 1 ? array->children[0] : NULL;
    if (!bytes || !array->release || array->length != count || array->offset ||
        bytes->length != count * PIXEL || bytes->offset || bytes->n_buffers != 2) {
        PyErr_Format(PyExc_ValueError, "not %d x %d pixels of four bytes", width, height);
        return NULL;
    }
    return bytes->buffers[1];
}

/* Whether a side of `length` pixels can become `size` by the part from `start` to `end`. */
static int sound(int length, int size, float start, float end) {
    return length > 0 && length <= LONGEST && size > 0 && size <= LONGEST && 0 <= start &&
           start < end && end <= length;
}

static PyObject *resize(PyObject *module, PyObject *arguments) {
    PyObject *capsule, *result;
    int width, height, columns, rows, y_first, enough = 0;
    float left, top, right, bottom;
    Axis x, y;
    if (!PyArg_ParseTuple(
            arguments, "O(ii)(ii)(ffff)p", &capsule, &width, &height, &columns, &rows, &left, &top,
            &right, &bottom, &y_first))
        return NULL;
    if (!sound(width, columns, left, right) || !sound(height, rows, top, bottom))
        return PyErr_Format(
            PyExc_ValueError, "a size or a box that is empty, too large or outside the picture");
    const uint8_t *pixels = pixels_of(capsule, width, height);
    if (!pixels) return NULL;
    result = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)columns * rows * CHANNELS);
    if (!result) return NULL;
    uint8_t *to = (uint8_t *)PyByteArray_AsString(result);
    Py_BEGIN_ALLOW_THREADS
    if (prepare(&x, width, left, right, columns, PIXEL)) {
        if (prepare(&y, height, top, bottom, rows, 1)) {
            enough = passes(pixels, width, &x, &y, y_first, to);
            release(&y);
        }
        release(&x);
    }
    Py_END_ALLOW_THREADS
    if (enough) return result;
    Py_DECREF(result);
    return PyErr_NoMemory();
}

static PyMethodDef functions[] = {
    {"resize", resize, METH_VARARGS,
     "resize(capsule, (width, height), (columns, rows), box, y_first) -> bytearray"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_resampling", "Pillow's BILINEAR with AVX2.", -1, functions,
    NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__resampling(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2")) {
        PyErr_SetString(PyExc_ImportError, "this CPU has no AVX2");
        return NULL;
    }
    return PyModule_Create(&module);
}
