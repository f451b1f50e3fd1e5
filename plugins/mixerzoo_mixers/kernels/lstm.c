/* LSTMs side by side, forward and backward. One task is one LSTM and up to LANES samples, which share what is read of
   the weights; each sample goes its own way through its tokens.

   Shapes, all contiguous: gates (L, B, N, 4 S), on entry the part that comes from the input; on return of the
   forward the activated gates i, f, g, o. bias (L, 4 S). weight (L, 4 S, S); turned (L, S, 4 S), its transpose.
   hidden, cell (L, B, N, S). lengths (B): tokens after a sample's length are left as they are. Of L LSTMs, those from
   `first_reverse` on go from the last token to the first. */
#include <stdlib.h>
#include "vector.h"

#define LANES 4

/* 16 numbers at any address; the compiler makes of it whatever the processor has. */
typedef float vector __attribute__((vector_size(64), aligned(4)));

#define VECTORS 4
#define TILE (16 * VECTORS)

/* out[j] (rows) += matrix (columns, rows)^T in[j] (columns), for LANES pairs of vectors or for one. The sums of a tile
   of rows stay in registers all the way through the columns. */
#define PRODUCTS(name, LANES_)                                                                                   \
    static void name(float *const *out, const float *const *in, const float *matrix, long rows, long columns) {  \
        long r = 0;                                                                                              \
        for (; r + TILE <= rows; r += TILE) {                                                                    \
            vector sum[LANES_][VECTORS];                                                                         \
            for (int j = 0; j < LANES_; j++)                                                                     \
                for (int v = 0; v < VECTORS; v++) sum[j][v] = *(const vector *)(out[j] + r + 16 * v);            \
            for (long k = 0; k < columns; k++) {                                                                 \
                const float *m = matrix + k * rows + r;                                                          \
                for (int j = 0; j < LANES_; j++)                                                                 \
                    for (int v = 0; v < VECTORS; v++) sum[j][v] += *(const vector *)(m + 16 * v) * in[j][k];     \
            }                                                                                                    \
            for (int j = 0; j < LANES_; j++)                                                                     \
                for (int v = 0; v < VECTORS; v++) *(vector *)(out[j] + r + 16 * v) = sum[j][v];                  \
        }                                                                                                        \
        for (long k = 0; r < rows && k < columns; k++)                                                           \
            for (int j = 0; j < LANES_; j++)                                                                     \
                for (long rest = r; rest < rows; rest++) out[j][rest] += matrix[k * rows + rest] * in[j][k];     \
    }

PRODUCTS(products_together, LANES)
PRODUCTS(product, 1)

static void products(float *const *out, const float *const *in, const float *matrix, long rows, long columns,
                     long lanes) {
    if (lanes == LANES)
        products_together(out, in, matrix, rows, columns);
    else
        for (long j = 0; j < lanes; j++) product(out + j, in + j, matrix, rows, columns);
}

/* One task: which samples, and where their tokens are. */
struct task {
    long l, first, lanes, reverse, longest;
};

static struct task task_of(long number, const long *lengths, long B, long first_reverse) {
    const long groups = (B + LANES - 1) / LANES;
    struct task t = {number / groups, number % groups * LANES, LANES, 0, 0};
    if (t.first + t.lanes > B) t.lanes = B - t.first;
    t.reverse = t.l >= first_reverse;
    for (long j = 0; j < t.lanes; j++)
        if (lengths[t.first + j] > t.longest) t.longest = lengths[t.first + j];
    return t;
}

/* The place of step `step` of sample j, counted in tokens from the first of all. */
static long place(const struct task *t, const long *lengths, long j, long step, long B, long N) {
    return (t->l * B + t->first + j) * N + (t->reverse ? lengths[t->first + j] - 1 - step : step);
}

int lstm_forward(float *gates, const float *bias, const float *turned, const long *lengths, float *hidden, float *cell, long L,
                 long B, long N, long S, long first_reverse, int threads) {
    const long tasks = L * ((B + LANES - 1) / LANES);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (long number = 0; number < tasks; number++) {
        const struct task t = task_of(number, lengths, B, first_reverse);
        for (long step = 0; step < t.longest; step++) {
            float *out[LANES];
            const float *in[LANES];
            long active = 0;
            for (long j = 0; j < t.lanes; j++) {
                if (step >= lengths[t.first + j]) continue;
                float *restrict gate = gates + place(&t, lengths, j, step, B, N) * 4 * S;
                const float *restrict more = bias + t.l * 4 * S;
                for (long r = 0; r < 4 * S; r++) gate[r] += more[r];
                out[active] = gate;
                in[active++] = step ? hidden + place(&t, lengths, j, step - 1, B, N) * S : NULL;
            }
            if (step) products(out, in, turned + t.l * S * 4 * S, 4 * S, S, active);
            for (long a = 0; a < active; a++) {
                float *restrict gate = out[a];
                const long n = (gate - gates) / (4 * S);
                float *restrict h = hidden + n * S, *restrict c = cell + n * S;
                if (!step) memset(c, 0, sizeof(float) * S);
                const float *before = step ? cell + (in[a] - hidden) : c;
#pragma omp simd
                for (long s = 0; s < S; s++) {
                    gate[s] = sigmoid_(gate[s]);
                    gate[S + s] = sigmoid_(gate[S + s]);
                    gate[2 * S + s] = tanh_(gate[2 * S + s]);
                    gate[3 * S + s] = sigmoid_(gate[3 * S + s]);
                    c[s] = gate[s] * gate[2 * S + s] + gate[S + s] * before[s];
                    h[s] = gate[3 * S + s] * tanh_(c[s]);
                }
            }
        }
    }
    return 0;
}

/* dhidden (L, B, N, S) is the gradient of hidden; dgates (L, B, N, 4 S), zeros on entry, receives that of the gates
   before their activation. */
int lstm_backward(const float *gates, const float *weight, const long *lengths, const float *cell,
                  const float *dhidden, float *dgates, long L, long B, long N, long S, long first_reverse,
                  int threads) {
    const long tasks = L * ((B + LANES - 1) / LANES);
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : failed)
    for (long number = 0; number < tasks; number++) {
        const struct task t = task_of(number, lengths, B, first_reverse);
        float *dh = calloc(2 * LANES * (size_t)S, sizeof(float));
        if (!dh) {
            failed = 1;
            continue;
        }
        for (long step = t.longest - 1; step >= 0; step--) {
            float *out[LANES];
            const float *in[LANES];
            long active = 0;
            for (long j = 0; j < t.lanes; j++) {
                if (step >= lengths[t.first + j]) continue;
                const long n = place(&t, lengths, j, step, B, N);
                const float *restrict gate = gates + n * 4 * S, *restrict c = cell + n * S;
                const float *restrict before = step ? cell + place(&t, lengths, j, step - 1, B, N) * S : NULL;
                float *restrict dg = dgates + n * 4 * S, *restrict dn = dh + 2 * j * S, *restrict dc = dn + S;
#pragma omp simd
                for (long s = 0; s < S; s++) {
                    const float i = gate[s], f = gate[S + s], g = gate[2 * S + s], o = gate[3 * S + s];
                    const float tanh_c = tanh_(c[s]), now = dn[s] + dhidden[n * S + s];
                    const float inner = dc[s] + now * o * (1 - tanh_c * tanh_c);
                    dg[s] = inner * g * i * (1 - i);
                    dg[2 * S + s] = inner * i * (1 - g * g);
                    dg[3 * S + s] = now * tanh_c * o * (1 - o);
                    dg[S + s] = inner * f * (1 - f);
                    dc[s] = inner * f;
                    dn[s] = 0;
                }
                for (long s = 0; s < S; s++) dg[S + s] = before ? dg[S + s] * before[s] : 0;
                out[active] = dn;
                in[active++] = dg;
            }
            if (step) products(out, in, weight + t.l * 4 * S * S, S, 4 * S, active);
        }
        free(dh);
    }
    return failed;
}
