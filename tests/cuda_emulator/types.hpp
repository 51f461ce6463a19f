// The 16-bit floats of CUDA: stored as they are there, computed with as float.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

static float float_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float f) {  // to nearest, ties to even
    uint32_t u;
    memcpy(&u, &f, 4);
    bits = f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return float_of_bits(uint32_t(bits) << 16); }
};

struct half {
  uint16_t bits;
  half() = default;
  explicit half(float f) {  // to nearest, ties to even
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t sign = u >> 16 & 0x8000;
    float magnitude = std::fabs(f);
    if (f != f) bits = 0x7fff;
    else if (magnitude >= 65520.0f) bits = sign | 0x7c00;
    else if (magnitude < 0x1p-14f) bits = sign | uint16_t(std::nearbyint(magnitude * 0x1p24f));
    else {
      u &= 0x7fffffff;
      bits = sign | uint16_t((u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13);
    }
  }
  operator float() const {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (!exponent) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  }
};
