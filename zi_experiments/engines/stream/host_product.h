/* Vectors, 16-bit numbers and threads of the products on the host.

   Threads take blocks of rows of a matrix in turn, so that one on a busy core takes fewer. They are those of the OpenMP
   runtime that torch has loaded, by the function that compilers call: it keeps them awake between products. */

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
#define BLOCK 16 /* rows of w: they stay in a core's cache while all rows of x are multiplied */
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

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

/* `block` computes the rows of a matrix from `row` to `end`. */
typedef void block_of(const void *job, size_t row, size_t end);

struct turns {
    block_of *block;
    const void *job;
    size_t outputs;
    atomic_size_t next; /* row that no thread has begun */
};

static void take_turns(void *shared) {
    struct turns *turns = shared;
    size_t row;
    while ((row = atomic_fetch_add(&turns->next, BLOCK)) < turns->outputs)
        turns->block(turns->job, row, row + BLOCK < turns->outputs ? row + BLOCK : turns->outputs);
}

void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

/* Compute all rows, by as many threads as torch has been told. */
static inline void in_blocks(block_of *block, const void *job, size_t outputs) {
    struct turns turns = {block, job, outputs, 0};
    GOMP_parallel(take_turns, &turns, 0, 0);
}
