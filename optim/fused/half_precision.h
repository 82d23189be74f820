// Loads and stores numbers of the parameters' dtypes, converted to and from the dtype of the arithmetic.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// Half-precision numbers are held as bits and converted without branches, so that loops vectorise with any compiler.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float load(Float16 x) {
  // exponent and mantissa move to their places; the product corrects the bias, also for subnormals
  const float magnitude = float_of(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t infinite = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | infinite | uint32_t(x.bits & 0x8000) << 16);
}

inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }
inline void store(BFloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
inline void store(Float16& to, float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // 0.5f's ulp is the least float16
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  to.bits = uint16_t(half | (bits_of(x) >> 16 & 0x8000));
}

}  // namespace
