// A square of a resized part of an RGB image, with the exact bytes of Pillow's bilinear resampling of 8-bit images.
//
// Pillow filters one axis, then the other, and rounds to 8 bits in between. Each output is a sum over the inputs under
// a triangle, which is 2 scales wide and at least 2 pixels. Weights are computed in double and stored as integers with
// kBits fractional bits. Outputs of an axis have equally many weights, as the processor predicts loops of one length.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int kBits = 22;                    // of 32; the values need 8, and 2 are spare
constexpr int64_t kPixel = 3;                // bytes
constexpr int64_t kPadded = kPixel + 1;      // a load or store of 4 bytes is one instruction
constexpr int64_t kRows = 8;                 // filtered together; a group holds one pixel of each row, side by side
constexpr int64_t kGroup = kRows * kPadded;  // bytes
constexpr int64_t kLanes = 64;               // bytes of a row filtered together

// Rounds before an addition: -march=native may fuse the two, which changes the weights.
inline double product(double a, double b) {
  volatile double rounded = a * b;
  return rounded;
}

// One axis: output i is the sum over k < count of weights[i * count + k] * input[begin + first[i] + k]. `extent` inputs
// are read.
struct Taps {
  int64_t begin = 0, extent = 0, count = 0;
  std::vector<int64_t> first;
  std::vector<int32_t> weights;
};

// For `size` outputs, starting at `corner`, of an axis that goes from `in` inputs to `out` outputs.
Taps taps_of(int64_t in, int64_t out, int64_t corner, int64_t size) {
  const double scale = double(in) / double(out), support = std::max(scale, 1.0), inverse = 1.0 / support;
  Taps taps;
  std::vector<double> centre(size);
  std::vector<int64_t> low(size), high(size);
  for (int64_t i = 0; i < size; ++i) {
    centre[i] = product(double(corner + i) + 0.5, scale);
    low[i] = std::max<int64_t>(0, int64_t(centre[i] - support + 0.5));
    high[i] = std::min<int64_t>(in, int64_t(centre[i] + support + 0.5));
    taps.count = std::max(taps.count, high[i] - low[i]);
  }
  taps.first.resize(size);
  taps.weights.resize(size * taps.count);
  std::vector<double> shares(taps.count);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t covered = high[i] - low[i];
    double sum = 0;
    for (int64_t k = 0; k < covered; ++k) {
      shares[k] = std::max(0.0, 1.0 - std::fabs(product(double(low[i] + k) - centre[i] + 0.5, inverse)));
      sum += shares[k];
    }
    taps.first[i] = std::min(low[i], in - taps.count);  // zero weights need existing pixels too
    int32_t* weights = &taps.weights[i * taps.count + low[i] - taps.first[i]];
    for (int64_t k = 0; k < covered; ++k) weights[k] = int32_t(0.5 + shares[k] / sum * (1 << kBits));
  }
  taps.begin = taps.first.front();
  taps.extent = taps.first.back() + taps.count - taps.begin;
  for (int64_t& first : taps.first) first -= taps.begin;
  return taps;
}

// No weight is negative, so a sum can only be too large.
inline uint8_t to_byte(int32_t sum) { return uint8_t(std::min(sum >> kBits, 255)); }

// The last pixel is copied alone, because the memory may end there.
inline void into_groups(const uint8_t* row, int64_t pixels, uint8_t* groups) {
  for (int64_t x = 0; x < pixels - 1; ++x) std::memcpy(groups + x * kGroup, row + x * kPixel, kPadded);
  std::memcpy(groups + (pixels - 1) * kGroup, row + (pixels - 1) * kPixel, kPixel);
}
inline void out_of_groups(const uint8_t* groups, int64_t pixels, uint8_t* row) {
  for (int64_t x = 0; x < pixels - 1; ++x) std::memcpy(row + x * kPixel, groups + x * kGroup, kPadded);
  std::memcpy(row + (pixels - 1) * kPixel, groups + (pixels - 1) * kGroup, kPixel);
}

// Filters `rows` rows of taps.extent pixels to rows of `size` pixels, kRows at once.
void filter_rows(const uint8_t* in, int64_t stride, int64_t rows, const Taps& taps, int64_t size, uint8_t* out) {
  const std::unique_ptr<uint8_t[]> before(new uint8_t[taps.extent * kGroup]), after(new uint8_t[size * kGroup]);
  std::memset(before.get(), 0, taps.extent * kGroup);
  // Read once: the compiler assumes that a written byte may change them.
  const int64_t count = taps.count, *const firsts = taps.first.data();
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t together = std::min(rows - row, kRows);
    for (int64_t i = 0; i < together; ++i)
      into_groups(in + (row + i) * stride, taps.extent, before.get() + i * kPadded);
    const int32_t* weights = taps.weights.data();
    uint8_t* to = after.get();
    for (int64_t x = 0; x < size; ++x, weights += count, to += kGroup) {
      const uint8_t* group = before.get() + firsts[x] * kGroup;
      int32_t sums[kGroup];
      for (int32_t& sum : sums) sum = 1 << (kBits - 1);
      for (int64_t k = 0; k < count; ++k) {
#pragma omp simd
        for (int64_t lane = 0; lane < kGroup; ++lane) sums[lane] += weights[k] * group[k * kGroup + lane];
      }
#pragma omp simd
      for (int64_t lane = 0; lane < kGroup; ++lane) to[lane] = to_byte(sums[lane]);
    }
    for (int64_t i = 0; i < together; ++i)
      out_of_groups(after.get() + i * kPadded, size, out + (row + i) * size * kPixel);
  }
}

inline void filter_lanes(const uint8_t* in, int64_t stride, const int32_t* weights, int64_t count, uint8_t* out,
                         int64_t lanes) {
  int32_t sums[kLanes];
  for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] = 1 << (kBits - 1);
  for (int64_t k = 0; k < count; ++k) {
#pragma omp simd
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += weights[k] * in[k * stride + lane];
  }
  for (int64_t lane = 0; lane < lanes; ++lane) out[lane] = to_byte(sums[lane]);
}

void filter_columns(const uint8_t* in, int64_t stride, int64_t bytes, const Taps& taps, int64_t size, uint8_t* out) {
  for (int64_t y = 0; y < size; ++y) {
    const uint8_t* from = in + taps.first[y] * stride;
    const int32_t* weights = &taps.weights[y * taps.count];
    uint8_t* to = out + y * bytes;
    int64_t at = 0;
    for (; at + kLanes <= bytes; at += kLanes) filter_lanes(from + at, stride, weights, taps.count, to + at, kLanes);
    filter_lanes(from + at, stride, weights, taps.count, to + at, bytes - at);
  }
}

}  // namespace

// `pixels`: the start of the part to resize, which has width x height pixels in rows `stride` bytes apart. `square`
// [size, size, 3]: starts at pixel (left, top) of the resized part, and must lie within it. Returns 0, or 1 if memory
// is lacking.
extern "C" int resize_square(const uint8_t* pixels, int64_t stride, int64_t width, int64_t height,
                             int64_t resized_width, int64_t resized_height, int64_t left, int64_t top, int64_t size,
                             int64_t columns_first, uint8_t* square) {
  try {
    const Taps across = taps_of(width, resized_width, left, size), down = taps_of(height, resized_height, top, size);
    const uint8_t* in = pixels + down.begin * stride + across.begin * kPixel;
    if (columns_first) {
      const int64_t bytes = across.extent * kPixel;
      const std::unique_ptr<uint8_t[]> filtered(new uint8_t[size * bytes]);
      filter_columns(in, stride, bytes, down, size, filtered.get());
      filter_rows(filtered.get(), bytes, size, across, size, square);
    } else {
      const int64_t bytes = size * kPixel;
      const std::unique_ptr<uint8_t[]> filtered(new uint8_t[down.extent * bytes]);
      filter_rows(in, stride, down.extent, across, size, filtered.get());
      filter_columns(filtered.get(), bytes, bytes, down, size, square);
    }
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}
