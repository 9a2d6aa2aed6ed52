/* Denormal floats, the tiniest: whether a thread computes with them or takes them for zero. The setting
   belongs to a thread, so each thread of the kernels makes its own. */

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

/* Flush denormal floats to zero in this thread; returns the setting before. Trained models produce them,
   in GELU and softmax of very negative numbers, and x86 processors are many times slower
   with them. */
static unsigned flush_denormals(void) {
#ifdef __SSE2__
    const unsigned before = _mm_getcsr(), both = 0x8040; /* DAZ and FTZ: operands and results */
    _mm_setcsr(before | both);
    return before;
#else
    return 0;
#endif
}

/* Restore what `flush_denormals` returned: the caller's own code may need denormals. */
static void restore_denormals(unsigned setting) {
#ifdef __SSE2__
    _mm_setcsr(setting);
#else
    (void)setting;
#endif
}
