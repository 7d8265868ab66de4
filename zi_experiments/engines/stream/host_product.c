/* Products of few rows on the host: out = x · wᵀ + bias, with float32 sums.

   w has (outputs, inputs), row after row: bfloat16, float16, or codes of 4 or 8 bits in DeepSpeed's format, whose groups of
   `group` inputs have a scale and a minimum each: weight = code / scale + minimum. x has float32; for 4 bits, of each 2 · LANES
   inputs those with even numbers come first. `inputs` and `group` are multiples of 2 · LANES, whatever LANES is: of 32.

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

enum kind { SIXTEEN, EIGHT, FOUR }; /* bits of a weight */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

struct matrix {
    const uint8_t *codes;   /* or 16-bit weights */
    const uint16_t *scales; /* of groups; with minima in the 16-bit type of bias and out */
    const uint16_t *minima;
    const uint16_t *bias; /* or NULL */
    size_t inputs, outputs, group;
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

INLINE floats of_halves(const uint8_t *from, int is_bfloat16) {
    halves found;
    memcpy(&found, from, sizeof found);
    if (is_bfloat16)
        return (floats)(__builtin_convertvector(found, words) << 16);
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps((__m256i)found);
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps((__m128i)found);
#else
    _Float16 plain[LANES];
    floats wide;
    memcpy(plain, &found, sizeof plain);
    for (int lane = 0; lane < LANES; lane++)
        wide[lane] = plain[lane];
    return wide;
#endif
}

INLINE floats of_codes(bytes codes) { return __builtin_convertvector(__builtin_convertvector(codes, words), floats); }

/* The weights of 2 · LANES inputs, from a group with this step (1 / scale) and minimum. */
INLINE void unpack(enum kind kind, const uint8_t *from, float step, float minimum, int is_bfloat16, floats pair[2]) {
    if (kind == SIXTEEN) {
        pair[0] = of_halves(from, is_bfloat16);
        pair[1] = of_halves(from + 2 * LANES, is_bfloat16);
        return;
    }
    bytes first, second;
    memcpy(&first, from, sizeof first);
    if (kind == FOUR) {
        second = first & 15;
        first >>= 4;
    } else {
        memcpy(&second, from + LANES, sizeof second);
    }
    pair[0] = of_codes(first) * step + minimum;
    pair[1] = of_codes(second) * step + minimum;
}

/* `across` rows of w from `row` on, times `down` rows of x. */
INLINE void tile(enum kind kind, int is_bfloat16, int down, int across, const struct matrix *w, size_t row, const float *x,
                 uint16_t *out) {
    const size_t bits = 16 >> kind, stride = w->inputs * bits / 8, groups = w->inputs / w->group;
    floats sums[TILE][TILE] = {};
    for (size_t group = 0; group < groups; group++) {
        float steps[TILE] = {}, minima[TILE] = {};
        for (int j = 0; kind != SIXTEEN && j < across; j++) {
            size_t at = (row + j) * groups + group;
            steps[j] = 1 / widened(w->scales[at], is_bfloat16);
            minima[j] = widened(w->minima[at], is_bfloat16);
        }
        for (size_t k = group * w->group; k < (group + 1) * w->group; k += 2 * LANES) {
            for (int j = 0; j < across; j++) {
                const uint8_t *from = w->codes + (row + j) * stride + k * bits / 8;
                floats pair[2];
                __builtin_prefetch(from + AHEAD);
                unpack(kind, from, steps[j], minima[j], is_bfloat16, pair);
                for (int i = 0; i < down; i++) {
                    const float *of_x = x + i * w->inputs + k;
                    sums[i][j] += pair[0] * loaded(of_x) + pair[1] * loaded(of_x + LANES);
                }
            }
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

INLINE void tiles(enum kind kind, int is_bfloat16, int down, const struct matrix *w, size_t row, size_t end, const float *x,
                  uint16_t *out) {
    for (; row + TILE <= end; row += TILE)
        tile(kind, is_bfloat16, down, TILE, w, row, x, out);
    for (; row < end; row++)
        tile(kind, is_bfloat16, down, 1, w, row, x, out);
}

INLINE void block(enum kind kind, int is_bfloat16, const struct matrix *w, size_t row, size_t end, const float *x,
                  uint16_t *out, size_t rows) {
    for (; rows >= TILE; rows -= TILE, x += TILE * w->inputs, out += TILE * w->outputs)
        tiles(kind, is_bfloat16, TILE, w, row, end, x, out);
    if (rows == 3)
        tiles(kind, is_bfloat16, 3, w, row, end, x, out);
    else if (rows == 2)
        tiles(kind, is_bfloat16, 2, w, row, end, x, out);
    else if (rows == 1)
        tiles(kind, is_bfloat16, 1, w, row, end, x, out);
}

struct job {
    const struct matrix *w;
    const float *x;
    uint16_t *out;
    size_t rows;
    int bits, is_bfloat16;
    atomic_size_t next; /* row of w that no thread has begun */
};

static void work(void *shared) {
    struct job *job = shared;
    const struct matrix *w = job->w;
    size_t row;
    while ((row = atomic_fetch_add(&job->next, BLOCK)) < w->outputs) {
        size_t end = row + BLOCK < w->outputs ? row + BLOCK : w->outputs;
#define CASE(KIND, IS_BFLOAT16) \
    if (job->bits == 16 >> KIND && job->is_bfloat16 == IS_BFLOAT16) \
    block(KIND, IS_BFLOAT16, w, row, end, job->x, job->out, job->rows)
        CASE(SIXTEEN, 1);
        CASE(SIXTEEN, 0);
        CASE(EIGHT, 1);
        CASE(EIGHT, 0);
        CASE(FOUR, 1);
        CASE(FOUR, 0);
    }
}

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

int lanes(void) { return LANES; }

/* Computed by as many threads as torch has been told. */
void multiply(const struct matrix *w, const float *x, uint16_t *out, size_t rows, int bits, int is_bfloat16) {
    struct job job = {w, x, out, rows, bits, is_bfloat16, 0};
    GOMP_parallel(work, &job, 0, 0);
}
