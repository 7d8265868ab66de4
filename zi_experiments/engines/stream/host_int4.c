/* Products of INT4 weights on the host as they are in a slab: out = x · wᵀ + bias, with float32 sums.

   w has (outputs, inputs) codes, row after row, two in a byte, the first in its high half. A weight is code / scale + minimum,
   with one of both for each group of inputs: a power of two of them, from 32 on, that divides the inputs.

   A code c becomes the number 128 + c by setting the bits of 128, two codes at a time. What that adds is taken from the
   minimum. */

#include "host_product.h"
#include <stdlib.h>

#define OFFSET 128.0f
#define OFFSET_BITS 0x4300 /* of that number in bfloat16, whose last bit is worth 1 */
#define CODES (8 * LANES) /* in a vector */
#define DOWN 4            /* rows of x that are multiplied at a time: their sums fit into registers */
#define AHEAD 1024        /* bytes of codes that are on their way */

typedef uint16_t numbers __attribute__((vector_size(4 * LANES)));

struct matrix {
    const uint8_t *codes;
    const uint16_t *scales, *minima; /* (outputs, groups) */
    const uint16_t *bias;            /* or NULL; in the type of all numbers, as x and out */
    size_t inputs, outputs, group;
};

/* 16 bits have four codes that follow one another: by how much to shift them for the first, the second, ... */
static const int SHIFTS[] = {4, 0, 12, 8};

/* Of up to LANES groups of a row from one on: what a code is worth, and the minimum less what OFFSET is worth; 0 beyond. */
INLINE void worth(const struct matrix *w, size_t row, size_t first, int is_bfloat16, floats *steps, floats *least) {
    const size_t groups = w->inputs / w->group, count = groups - first < LANES ? groups - first : LANES;
    uint16_t scales[LANES], minima[LANES] = {};
    for (int lane = 0; lane < LANES; lane++)
        scales[lane] = is_bfloat16 ? 0x7f80 : 0x7c00; /* infinite */
    memcpy(scales, w->scales + row * groups + first, count * sizeof *scales);
    memcpy(minima, w->minima + row * groups + first, count * sizeof *minima);
    *steps = 1 / of_weights((const uint8_t *)scales, is_bfloat16);
    *least = of_weights((const uint8_t *)minima, is_bfloat16) - OFFSET * *steps;
}

/* The sum of the inputs in a group. */
INLINE float sum_of(const struct matrix *w, const uint16_t *x, size_t group, int is_bfloat16) {
    floats sums = {};
    float sum = 0;
    for (size_t k = 0; k < w->group; k += LANES)
        sums += of_weights((const uint8_t *)(x + group * w->group + k), is_bfloat16);
    for (int lane = 0; lane < LANES; lane++)
        sum += sums[lane];
    return sum;
}

/* x as the kernel reads it. */
struct input {
    float *parts; /* (rows, chunks, 4, 2, LANES): a chunk has the inputs of one vector of codes, as these will be */
    float *sums;  /* (rows, spans, LANES): of the inputs of each group; a span has as many groups as a vector has floats */
    size_t chunks, spans;
};

/* Lanes of `from` by their numbers. */
INLINE floats picked(floats from, words lanes) {
#if defined(__AVX512F__)
    return (floats)_mm512_permutexvar_ps((__m512i)lanes, (__m512)from);
#elif defined(__AVX2__)
    return (floats)_mm256_permutevar8x32_ps((__m256)from, (__m256i)lanes);
#else
    floats found;
    for (int lane = 0; lane < LANES; lane++)
        found[lane] = from[lanes[lane]];
    return found;
#endif
}

/* Add to `sums` the products of the inputs in chunk `at` with `nbytes` of codes. */
INLINE void add_chunk(int down, floats sums[DOWN], const uint8_t *codes, size_t nbytes, const struct input *x, size_t at,
                      floats steps) {
    numbers four = {};
    floats added[DOWN] = {};
    memcpy(&four, codes, nbytes);
    __builtin_prefetch(codes + AHEAD);
    for (int k = 0; k < 4; k++) {
        words found = (words)((four >> SHIFTS[k] & 15) | OFFSET_BITS);
        floats even = (floats)(found << 16), odd = (floats)(found & 0xffff0000);
        for (int i = 0; i < down; i++) {
            const float *of_x = x->parts + ((i * x->chunks + at) * 4 + k) * 2 * LANES;
            added[i] += even * loaded(of_x);
            added[i] += odd * loaded(of_x + LANES);
        }
    }
    for (int i = 0; i < down; i++)
        sums[i] += added[i] * steps;
}

/* A row of w times `down` rows of x. */
INLINE void multiply_row(int is_bfloat16, int down, const struct matrix *w, size_t row, const struct input *x, uint16_t *out) {
    const size_t nbytes = w->inputs / 2, whole = w->inputs / CODES;
    const uint8_t *codes = w->codes + row * nbytes;
    const int shift = __builtin_ctzl(w->group);
    floats sums[DOWN] = {};
    words starts;
    for (int lane = 0; lane < LANES; lane++)
        starts[lane] = 8 * lane; /* that many codes of a chunk are added up before */
    for (size_t span = 0; span < x->spans; span++) {
        floats steps, least;
        worth(w, row, span * LANES, is_bfloat16, &steps, &least);
        for (int i = 0; i < down; i++)
            sums[i] += least * loaded(x->sums + (i * x->spans + span) * LANES);
        size_t at = span * LANES * w->group / CODES, end = at + LANES * w->group / CODES;
        words lanes = starts;
        for (; at < end && at < whole; at++, lanes += CODES)
            add_chunk(down, sums, codes + at * CODES / 2, CODES / 2, x, at, picked(steps, lanes >> shift));
        if (at < end && at < x->chunks)
            add_chunk(down, sums, codes + at * CODES / 2, nbytes - at * CODES / 2, x, at, picked(steps, lanes >> shift));
    }
    for (int i = 0; i < down; i++) {
        float sum = w->bias ? widened(w->bias[row], is_bfloat16) : 0;
        for (int lane = 0; lane < LANES; lane++)
            sum += sums[i][lane];
        out[i * w->outputs + row] = rounded(sum, is_bfloat16);
    }
}

INLINE void multiply_rows(int is_bfloat16, int down, const struct matrix *w, size_t row, size_t end, const struct input *x,
                          uint16_t *out) {
    for (; row < end; row++)
        multiply_row(is_bfloat16, down, w, row, x, out);
}

INLINE void block(int is_bfloat16, const struct matrix *w, size_t row, size_t end, struct input x, uint16_t *out, size_t rows) {
    for (; rows >= DOWN; rows -= DOWN, out += DOWN * w->outputs) {
        multiply_rows(is_bfloat16, DOWN, w, row, end, &x, out);
        x.parts += DOWN * x.chunks * CODES;
        x.sums += DOWN * x.spans * LANES;
    }
    if (rows == 3)
        multiply_rows(is_bfloat16, 3, w, row, end, &x, out);
    else if (rows == 2)
        multiply_rows(is_bfloat16, 2, w, row, end, &x, out);
    else if (rows == 1)
        multiply_rows(is_bfloat16, 1, w, row, end, &x, out);
}

struct job {
    const struct matrix *w;
    struct input x;
    uint16_t *out;
    size_t rows;
    int is_bfloat16;
};

static void block_of_job(const void *shared, size_t row, size_t end) {
    const struct job *job = shared;
    if (job->is_bfloat16)
        block(1, job->w, row, end, job->x, job->out, job->rows);
    else
        block(0, job->w, row, end, job->x, job->out, job->rows);
}

INLINE void arrange(int is_bfloat16, const struct matrix *w, const uint16_t *x, size_t row, const struct input *to) {
    float *parts = to->parts + row * to->chunks * CODES, *sums = to->sums + row * to->spans * LANES;
    x += row * w->inputs;
    for (size_t n = 0; n < w->inputs; n += 4) {
        float *at = parts + n / CODES * CODES + n / 4 % 2 * LANES + n % CODES / 8;
        for (int k = 0; k < 4; k++)
            at[k * 2 * LANES] = widened(x[n + k], is_bfloat16);
    }
    for (size_t group = 0; group < w->inputs / w->group; group++)
        sums[group] = sum_of(w, x, group, is_bfloat16);
}

/* Return 0, or 1 without memory. */
int multiply(const struct matrix *w, const uint16_t *x, uint16_t *out, size_t rows, int is_bfloat16) {
    const size_t chunks = (w->inputs + CODES - 1) / CODES, spans = (w->inputs / w->group + LANES - 1) / LANES;
    struct input to = {calloc(rows * chunks, CODES * sizeof(float)), calloc(rows * spans, LANES * sizeof(float)), chunks, spans};
    struct job job = {w, to, out, rows, is_bfloat16};
    const int failed = !to.parts || !to.sums;
    for (size_t row = 0; row < rows && !failed; row++)
        if (is_bfloat16)
            arrange(1, w, x, row, &to);
        else
            arrange(0, w, x, row, &to);
    if (!failed)
        in_blocks(block_of_job, &job, w->outputs);
    free(to.parts);
    free(to.sums);
    return failed;
}
