/* Fused multiply-adds in registers, as many at once as hide their latency: one core's peak.
 * Each function makes n rounds of ACCUMULATORS vector multiply-adds; the sum that it returns keeps
 * the work alive. */
#if defined(__AVX512F__)
#define BYTES 64
#define ACCUMULATORS 24 /* of 32 registers */
#elif defined(__AVX__)
#define BYTES 32
#define ACCUMULATORS 12 /* of 16 registers */
#else
#define BYTES 16
#define ACCUMULATORS 12
#endif

/* Unrolled whole, so that the accumulators are registers and not an array in memory. */
#define EACH_ACCUMULATOR _Pragma("GCC unroll 32") for (int i = 0; i < ACCUMULATORS; ++i)

#define DEFINE_PEAK(name, scalar)                                                  \
  typedef scalar name##_vector __attribute__((vector_size(BYTES)));                \
  double name(long n) {                                                            \
    name##_vector sum[ACCUMULATORS], factor, term;                                 \
    for (unsigned lane = 0; lane < BYTES / sizeof(scalar); ++lane) {               \
      factor[lane] = (scalar)0.5;                                                  \
      term[lane] = (scalar)lane;                                                   \
    }                                                                              \
    EACH_ACCUMULATOR sum[i] = term + (scalar)i;                                    \
    for (long round = 0; round < n; ++round)                                       \
      EACH_ACCUMULATOR sum[i] = sum[i] * factor + term;                            \
    double total = 0;                                                              \
    EACH_ACCUMULATOR total += sum[i][0] + sum[i][1];                               \
    return total;                                                                  \
  }                                                                                \
  long name##_flops(void) { return 2L * ACCUMULATORS * (BYTES / sizeof(scalar)); }

DEFINE_PEAK(peak_f32, float)
DEFINE_PEAK(peak_f64, double)
