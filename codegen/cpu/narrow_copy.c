/* Widens copies of 4 bits of experts (moec.codegen.cpu.narrow_copy writes them): codes of 4 bits, two
   a byte, and after all codes a scale in bf16 for each block of 32 elements. The low halves of a
   block's 16 bytes are its elements 0 to 15, the high halves 16 to 31; an element is (code - 8) * scale.
   A scale has 5 significant bits, so that each product is exact in bf16 and f16: rounding is a shift. */

#include <stdint.h>
#include <string.h>

enum { SPAN = 32, BF16 = 0, F16 = 1 };

static uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void widen_bf16(uint16_t *restrict to, const uint8_t *restrict codes, float scale) {
  for (int i = 0; i < SPAN / 2; i++)
    to[i] = (uint16_t)(bits_of((float)((codes[i] & 15) - 8) * scale) >> 16);
  for (int i = 0; i < SPAN / 2; i++)
    to[SPAN / 2 + i] = (uint16_t)(bits_of((float)((codes[i] >> 4) - 8) * scale) >> 16);
}

static uint16_t f16_of(float small) {
  uint32_t bits = bits_of(small);
  return (uint16_t)((bits >> 16 & 0x8000) | (bits & 0x7fffffff) >> 13);
}

/* The exponent of f16 begins 112 later than that of f32. */
static void widen_f16(uint16_t *restrict to, const uint8_t *restrict codes, float scale) {
  scale *= 0x1p-112f;
  for (int i = 0; i < SPAN / 2; i++)
    to[i] = f16_of((float)((codes[i] & 15) - 8) * scale);
  for (int i = 0; i < SPAN / 2; i++)
    to[SPAN / 2 + i] = f16_of((float)((codes[i] >> 4) - 8) * scale);
}

static void widen_f32(float *restrict to, const uint8_t *restrict codes, float scale) {
  for (int i = 0; i < SPAN / 2; i++)
    to[i] = (float)((codes[i] & 15) - 8) * scale;
  for (int i = 0; i < SPAN / 2; i++)
    to[SPAN / 2 + i] = (float)((codes[i] >> 4) - 8) * scale;
}

static void widen_block(void *to, const uint8_t *codes, float scale, int kind) {
  if (kind == BF16)
    widen_bf16(to, codes, scale);
  else if (kind == F16)
    widen_f16(to, codes, scale);
  else
    widen_f32(to, codes, scale);
}

/* `elements` of the kind bf16, f16 or f32, whose last block may be a part of one. */
void expert_store_widen(char *to, const uint8_t *copy, int64_t elements, int32_t kind) {
  int64_t blocks = (elements + SPAN - 1) / SPAN, width = kind == BF16 || kind == F16 ? 2 : 4;
  const uint8_t *scales = copy + blocks * SPAN / 2;
  for (int64_t b = 0; b < blocks; b++, to += SPAN * width) {
    uint16_t scale;
    memcpy(&scale, scales + 2 * b, sizeof scale);
    if ((b + 1) * SPAN <= elements) {
      widen_block(to, copy + b * SPAN / 2, float_of((uint32_t)scale << 16), kind);
      continue;
    }
    float block[SPAN];
    widen_block(block, copy + b * SPAN / 2, float_of((uint32_t)scale << 16), kind);
    memcpy(to, block, (elements - b * SPAN) * width);
  }
}
