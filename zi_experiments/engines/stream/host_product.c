/* Products of few rows on the host: out = x · wᵀ + bias, with float32 sums.

   w has (outputs, inputs), row after row, in bfloat16 or float16; x has float32. `inputs` is a multiple of 2 · LANES, whatever
   LANES is: of 32.

   Threads take blocks of rows of w in turn, so that one on a busy core takes fewer. They are those of the OpenMP runtime that
   torch has loaded, by the function that compilers call: it keeps them awake between products. */

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define TILE 4 /* rows of x, and rows of w, that are multiplied at a time: their sums fit into registers */
#define BLOCK 16 /* rows of w: they stay in a core's cache while all rows of x are multiplied */
#define AHEAD 1024 /* bytes of a row of w that are on their way */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct matrix {
    const uint8_t *weights;
    const uint16_t *bias; /* or NULL; in the weights' type, as out */
    size_t inputs, outputs;
};

INLINE float widened(uint16_t value, int is_bfloat16) {
    if (is_bfloat16) {
        uint32_t word = (uint32_t)value << 16;
        float found;
        memcpy(&found, &word, sizeof found);
        return found;
    }
    _Float16 half;
    memcpy(&half, &value, sizeof half);
    return half;
}

INLINE uint16_t rounded(float value, int is_bfloat16) {
    uint32_t word;
    if (!is_bfloat16) {
        _Float16 half = value;
        uint16_t found;
        memcpy(&found, &half, sizeof found);
        return found;
    }
    memcpy(&word, &value, sizeof word);
    if ((word & 0x7fffffff) > 0x7f800000) /* not a number: rounding might make it infinite */
        return 0x7fc0;
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

INLINE floats loaded(const float *from) {
    floats found;
    memcpy(&found, from, sizeof found);
    return found;
}

/* Compilers take these conversions apart unless they are named. */
#if defined(__AVX512F__)
INLINE floats of_bfloat16(const uint8_t *from) {
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
INLINE floats of_float16(const uint8_t *from) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
#elif defined(__AVX2__) && defined(__F16C__)
INLINE floats of_bfloat16(const uint8_t *from) {
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}
INLINE floats of_float16(const uint8_t *from) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
#else
INLINE floats of_bfloat16(const uint8_t *from) {
    halves found;
    memcpy(&found, from, sizeof found);
    return (floats)(__builtin_convertvector(found, words) << 16);
}
INLINE floats of_float16(const uint8_t *from) {
    _Float16 found[LANES];
    floats wide;
    memcpy(found, from, sizeof found);
    for (int lane = 0; lane < LANES; lane++)
        wide[lane] = found[lane];
    return wide;
}
#endif

INLINE floats of_weights(const uint8_t *from, int is_bfloat16) { return is_bfloat16 ? of_bfloat16(from) : of_float16(from); }

/* `across` rows of w from `row` on, times `down` rows of x. */
INLINE void tile(int is_bfloat16, int down, int across, const struct matrix *w, size_t row, const float *x, uint16_t *out) {
    floats sums[TILE][TILE] = {};
    for (size_t k = 0; k < w->inputs; k += 2 * LANES)
        for (int j = 0; j < across; j++) {
            const uint8_t *from = w->weights + 2 * ((row + j) * w->inputs + k);
            floats first = of_weights(from, is_bfloat16), second = of_weights(from + 2 * LANES, is_bfloat16);
            __builtin_prefetch(from + AHEAD);
            for (int i = 0; i < down; i++) {
                const float *of_x = x + i * w->inputs + k;
                sums[i][j] += first * loaded(of_x) + second * loaded(of_x + LANES);
            }
        }
    for (int i = 0; i < down; i++)
        for (int j = 0; j < across; j++) {
            float sum = w->bias ? widened(w->bias[row + j], is_bfloat16) : 0;
            for (int lane = 0; lane < LANES; lane++)
                sum += sums[i][j][lane];
            out[i * w->outputs + row + j] = rounded(sum, is_bfloat16);
        }
}

INLINE void tiles(int is_bfloat16, int down, const struct matrix *w, size_t row, size_t end, const float *x,
                  uint16_t *out) {
    for (; row + TILE <= end; row += TILE)
        tile(is_bfloat16, down, TILE, w, row, x, out);
    for (; row < end; row++)
        tile(is_bfloat16, down, 1, w, row, x, out);
}

INLINE void block(int is_bfloat16, const struct matrix *w, size_t row, size_t end, const float *x,
                  uint16_t *out, size_t rows) {
    for (; rows >= TILE; rows -= TILE, x += TILE * w->inputs, out += TILE * w->outputs)
        tiles(is_bfloat16, TILE, w, row, end, x, out);
    if (rows == 3)
        tiles(is_bfloat16, 3, w, row, end, x, out);
    else if (rows == 2)
        tiles(is_bfloat16, 2, w, row, end, x, out);
    else if (rows == 1)
        tiles(is_bfloat16, 1, w, row, end, x, out);
}

struct job {
    const struct matrix *w;
    const float *x;
    uint16_t *out;
    size_t rows;
    int is_bfloat16;
    atomic_size_t next; /* row of w that no thread has begun */
};

static void work(void *shared) {
    struct job *job = shared;
    const struct matrix *w = job->w;
    size_t row;
    while ((row = atomic_fetch_add(&job->next, BLOCK)) < w->outputs) {
        size_t end = row + BLOCK < w->outputs ? row + BLOCK : w->outputs;
        if (job->is_bfloat16)
            block(1, w, row, end, job->x, job->out, job->rows);
        else
            block(0, w, row, end, job->x, job->out, job->rows);
    }
}

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

/* Computed by as many threads as torch has been told. */
void multiply(const struct matrix *w, const float *x, uint16_t *out, size_t rows, int is_bfloat16) {
    struct job job = {w, x, out, rows, is_bfloat16, 0};
    GOMP_parallel(work, &job, 0, 0);
}
