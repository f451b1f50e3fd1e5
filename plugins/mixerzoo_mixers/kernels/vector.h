/* What the kernels share: functions that a compiler can turn into vector code. */
#include <stdint.h>
#include <string.h>

/* e^x to about 1e-7 of its value, by e^x = 2^n e^r with |r| <= ln(2) / 2; as good as 0 below -87, NaN stays NaN. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.0f + r + r * r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.33333e-3f + r * 1.3888889e-3f))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

static inline float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

static inline float tanh_(float x) { return 2.0f / (1.0f + exp_(-2.0f * x)) - 1.0f; }
