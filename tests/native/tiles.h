/* Intel AMX in plain C, as far as gemm.h uses it: eight tile registers of 16 rows of 64 bytes, and the
   instructions on them.

   Included before the kernels, it lets a processor with AVX-512 alone run the code for AMX, and lets a
   sanitizer see what that reads and writes. The intrinsics of immintrin.h are macros or builtins, which
   are replaced here by name. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define __AMX_BF16__ 1 /* as a compiler for such a processor would */
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
/* There is one shape of tile, so its configuration is ignored; a saved one is empty. */
#define _tile_loadconfig(config) ((void)(config))
#define _tile_storeconfig(config) memset(config, 0, 64)
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(tile_registers[tile], 0, sizeof tile_registers[tile])
#define _tile_loadd(tile, base, stride) load_tile(tile, base, stride)
#define _tile_stored(tile, base, stride) store_tile(tile, base, stride)
#define _tile_dpbf16ps(to, a, b) multiply_add_tiles(to, a, b)

/* The registers. */
static _Thread_local unsigned char tile_registers[8][16][64];

/* 16 rows of 64 bytes, `stride` bytes apart, from memory to a register and back. */
static inline void load_tile(int tile, const void *base, long stride) {
    for (int r = 0; r < 16; r++) memcpy(tile_registers[tile][r], (const char *)base + r * stride, 64);
}

static inline void store_tile(int tile, void *base, long stride) {
    for (int r = 0; r < 16; r++) memcpy((char *)base + r * stride, tile_registers[tile][r], 64);
}

/* bfloat16 to float: the upper half of its bits. */
static inline __attribute__((no_sanitize_address, no_sanitize_undefined)) float widened(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

/* TDPBF16PS: sums (16, 16) += a (16, 16 pairs) b (16 pairs, 16). It touches nothing but registers and
   takes most of the time, so sanitizers leave it alone. */
static __attribute__((noinline, no_sanitize_address, no_sanitize_undefined)) void multiply_add_tiles(int to, int a, int b) {
    float sums[16][16];
    uint16_t left[16][32], right[16][32];
    memcpy(sums, tile_registers[to], sizeof sums);
    memcpy(left, tile_registers[a], sizeof left);
    memcpy(right, tile_registers[b], sizeof right);
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < 16; n++) {
                /* Both products of a pair. */
                sums[m][n] += widened(left[m][2 * k]) * widened(right[k][2 * n]);
                sums[m][n] += widened(left[m][2 * k + 1]) * widened(right[k][2 * n + 1]);
            }
        }
    }
    memcpy(tile_registers[to], sums, sizeof sums);
}
