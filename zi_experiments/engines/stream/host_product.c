/* Products of few rows on the host: out = x · wᵀ + bias, with float32 sums.

   w has (outputs, inputs), row after row, in bfloat16 or float16; x has float32. `inputs` is a multiple of 2 · LANES, whatever
   LANES is: of 32. */

#include "host_product.h"

#define TILE 4 /* rows of x, and rows of w, that are multiplied at a time: their sums fit into registers */
#define AHEAD 1024 /* bytes of a row of w that are on their way */

struct matrix {
    const uint8_t *weights;
    const uint16_t *bias; /* or NULL; in the weights' type, as out */
    size_t inputs, outputs;
};

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
};

static void block_of_job(const void *shared, size_t row, size_t end) {
    const struct job *job = shared;
    if (job->is_bfloat16)
        block(1, job->w, row, end, job->x, job->out, job->rows);
    else
        block(0, job->w, row, end, job->x, job->out, job->rows);
}

void multiply(const struct matrix *w, const float *x, uint16_t *out, size_t rows, int is_bfloat16) {
    struct job job = {w, x, out, rows, is_bfloat16};
    in_blocks(block_of_job, &job, w->outputs);
}
