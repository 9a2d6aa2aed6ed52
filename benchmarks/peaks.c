/* Two limits of the machine, for benchmarks/peaks.py: fused multiply-adds in registers, and reads of memory.

   WIDTH is the size of a vector in bytes, as given by the compiler's command line. Each function runs on the thread that calls it. */

enum {
    CHAINS = 12
}; /* sums that do not wait for each other: two units of four or five cycles' latency, and AVX2 has 16 registers */

/* A vector register, and one that is loaded from any address. */
typedef float vf32 __attribute__((vector_size(WIDTH)));
typedef float vf32u __attribute__((vector_size(WIDTH), aligned(4)));

/* The sum of all chains and lanes: a result that depends on every one of them. */
static float total(const vf32 *sums) {
    vf32 all = sums[0];
    for (int i = 1; i < CHAINS; i++) all += sums[i];
    float result = 0;
    for (int lane = 0; lane < WIDTH / 4; lane++) result += all[lane];
    return result;
}

/* Take `rounds` multiply-adds on each chain; write to `sink`, so that none can be left out, and return the operations. What is in
   `sink`, from 0 to 1, begins them: chains that the compiler knew to be equal it would compute once. */
double multiply_add(long rounds, float *sink) {
    vf32 sums[CHAINS], half = {0}, one = {0};
    half += 0.5f, one += 1.0f; /* x / 2 + 1 stays below 2: neither denormal nor infinite */
    for (int i = 0; i < CHAINS; i++) sums[i] = (vf32){0} + *sink * i / CHAINS;
    for (long round = 0; round < rounds; round++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sums[i] = sums[i] * half + one;
    *sink = total(sums);
    return 2.0 * rounds * CHAINS * (WIDTH / 4);
}

/* Read `count` floats, add them up into `sink`, and return the bytes read. */
double read_floats(const float *from, long count, float *sink) {
    vf32 sums[CHAINS] = {{0}};
    const long step = CHAINS * (WIDTH / 4), blocks = count / step;
    for (long block = 0; block < blocks; block++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sums[i] += *(const vf32u *)(from + block * step + i * (WIDTH / 4));
    *sink = total(sums);
    return 4.0 * blocks * step;
}
