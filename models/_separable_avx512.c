/* The same by AVX-512, whose registers are twice as many and twice as wide. With -DLOWERED two of
   AVX2's stand for one of them, to test it on any CPU. */

#define WIDTH 16
#include "_separable.c"
