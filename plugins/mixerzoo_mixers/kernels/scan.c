/* The selective scan of Mamba, forward and backward: h_n = exp(delta_n a) h_(n-1) + delta_n u_n b_n, y_n = c_n . h_n.

   Shapes, all contiguous: u, delta, y (B, N, E), a (S, E), b, c (B, N, S). One task is one sample and up to BLOCK
   inner units, whose states stay in the cache; the units are the vector, so that b and c are plain numbers in it. */
#include <stdlib.h>
#include "vector.h"

#define BLOCK 32

/* Goes through the tokens of one task. `states`, if given, receives the state after every token, (N, S, BLOCK). */
static void forward(const float *u, const float *delta, const float *a, const float *b, const float *c, float *y,
                    float *states, long N, long E, long S, long width, float *state) {
    memset(state, 0, sizeof(float) * S * BLOCK);
    for (long n = 0; n < N; n++) {
        float d[BLOCK] = {0}, in[BLOCK] = {0}, out[BLOCK] = {0};
        for (long e = 0; e < width; e++) {
            d[e] = delta[n * E + e];
            in[e] = d[e] * u[n * E + e];
        }
        for (long s = 0; s < S; s++) {
            const float bs = b[n * S + s], cs = c[n * S + s];
            float *h = state + s * BLOCK;
            const float *as = a + s * BLOCK;
#pragma omp simd
            for (long e = 0; e < BLOCK; e++) {
                h[e] = exp_(d[e] * as[e]) * h[e] + in[e] * bs;
                out[e] += h[e] * cs;
            }
        }
        if (y)
            for (long e = 0; e < width; e++) y[n * E + e] = out[e];
        if (states) memcpy(states + n * S * BLOCK, state, sizeof(float) * S * BLOCK);
    }
}

/* The block of `a` that belongs to a task, with zeros where it ends early. */
static void own_decays(const float *a, float *own, long E, long S, long first, long width) {
    memset(own, 0, sizeof(float) * S * BLOCK);
    for (long s = 0; s < S; s++) memcpy(own + s * BLOCK, a + s * E + first, sizeof(float) * width);
}

int scan_forward(const float *u, const float *delta, const float *a, const float *b, const float *c, float *y, long B,
                 long N, long E, long S, int threads) {
    const long blocks = (E + BLOCK - 1) / BLOCK;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (long task = 0; task < B * blocks; task++) {
        const long i = task / blocks, first = task % blocks * BLOCK;
        const long width = E - first < BLOCK ? E - first : BLOCK, at = i * N * E + first;
        float *own = malloc(sizeof(float) * S * BLOCK * 2);
        if (!own) {
            failed = 1;
            continue;
        }
        own_decays(a, own, E, S, first, width);
        forward(u + at, delta + at, own, b + i * N * S, c + i * N * S, y + at, NULL, N, E, S, width, own + S * BLOCK);
        free(own);
    }
    return failed;
}

/* dy is given; du, ddelta (B, N, E) are written; da (B, S, E), db and dc (blocks, B, N, S) are written a task each,
   to be summed by the caller. */
int scan_backward(const float *u, const float *delta, const float *a, const float *b, const float *c, const float *dy,
                  float *du, float *ddelta, float *da, float *db, float *dc, long B, long N, long E, long S,
                  int threads) {
    const long blocks = (E + BLOCK - 1) / BLOCK;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (long task = 0; task < B * blocks; task++) {
        const long i = task / blocks, first = task % blocks * BLOCK;
        const long width = E - first < BLOCK ? E - first : BLOCK, at = i * N * E + first;
        float *own = calloc((size_t)S * BLOCK * 4 + (size_t)(N + 1) * S * BLOCK, sizeof(float));
        if (!own) {
            failed = 1;
            continue;
        }
        float *state = own + S * BLOCK, *carry = state + S * BLOCK, *sum_a = carry + S * BLOCK;
        float *states = sum_a + S * BLOCK; /* the first is the empty one */
        own_decays(a, own, E, S, first, width);
        forward(u + at, delta + at, own, b + i * N * S, c + i * N * S, NULL, states + S * BLOCK, N, E, S, width, state);
        for (long n = N - 1; n >= 0; n--) {
            float d[BLOCK] = {0}, x[BLOCK] = {0}, g[BLOCK] = {0}, dx[BLOCK] = {0}, dd[BLOCK] = {0};
            for (long e = 0; e < width; e++) {
                d[e] = delta[at + n * E + e];
                x[e] = u[at + n * E + e];
                g[e] = dy[at + n * E + e];
            }
            for (long s = 0; s < S; s++) {
                const long place = (i * N + n) * S + s;
                const float bs = b[place], cs = c[place];
                const float *before = states + (n * S + s) * BLOCK, *after = before + S * BLOCK, *as = own + s * BLOCK;
                float *dh = carry + s * BLOCK, *sa = sum_a + s * BLOCK, sum_b = 0, sum_c = 0;
#pragma omp simd reduction(+ : sum_b, sum_c)
                for (long e = 0; e < BLOCK; e++) {
                    const float decay = exp_(d[e] * as[e]), now = dh[e] + g[e] * cs;
                    const float inner = now * before[e] * decay; /* gradient of d a */
                    sum_c += g[e] * after[e];
                    sum_b += now * d[e] * x[e];
                    dx[e] += now * bs;
                    dd[e] += inner * as[e];
                    sa[e] += inner * d[e];
                    dh[e] = now * decay;
                }
                db[task % blocks * B * N * S + place] = sum_b;
                dc[task % blocks * B * N * S + place] = sum_c;
            }
            for (long e = 0; e < width; e++) {
                du[at + n * E + e] = dx[e] * d[e];
                ddelta[at + n * E + e] = dd[e] + dx[e] * x[e];
            }
        }
        for (long s = 0; s < S; s++) memcpy(da + (i * S + s) * E + first, sum_a + s * BLOCK, sizeof(float) * width);
        free(own);
    }
    return failed;
}
