// relu(batch_norm(x) + shortcut) and its gradients for channels-last tensors on the CPU. Each passes over memory twice
// (norm_relu.py).
//
// Rows are cut into chunks of a fixed size, whose sums are added in order: the result is the same, bit for bit, for any
// number of threads. Within a chunk, channels are processed in groups of kLanes, whose sums stay in registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

// Addresses (0 for none) and sizes. Tensors with rows are bfloat16 or float32, as `bfloat16` says; others are float32.
struct NormRelu {
  const void *x, *shortcut;          // [rows, channels]
  void* y;                           // [rows, channels]
  const float *weight, *bias;        // [channels]
  float *mean, *inverse_std;         // [channels]: of this batch; forward writes them, backward reads them
  float *running_mean, *running_var; // [channels]; null: they stay as they are
  const void* grad_y;                // [rows, channels]
  void *grad_x, *grad_shortcut;      // [rows, channels]
  float *grad_weight, *grad_bias;    // [channels]
  double eps, momentum;
  int64_t rows, channels, bfloat16, threads;
};

}  // extern "C"

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 512;  // rows; at 64 float32 channels, 128 KiB of each tensor
constexpr int64_t kBlock = 64;   // rows summed in float32; blocks are added up in double

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline void store(float* p, float value) { *p = value; }

inline float load(const BFloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even. A NaN gets its quiet bit set.
inline void store(BFloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t(value != value ? (bits >> 16) | 0x40 : rounded);
}

inline int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// Two sums per channel over all rows, [channels][2]. `add` adds a block of rows to sums[2][kLanes] for kLanes channels.
template <class Add>
std::vector<double> sum_rows(const NormRelu& n, Add add) {
  const int64_t chunks = chunks_of(n.rows);
  std::vector<double> partial(chunks * n.channels * 2);
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    double* total = &partial[chunk * n.channels * 2];
    const int64_t end = std::min(n.rows, (chunk + 1) * kChunk);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock) {
      const int64_t last = std::min(end, first + kBlock);
      for (int64_t channel = 0; channel < n.channels; channel += kLanes) {
        float sums[2][kLanes] = {};
        add(first, last, channel, sums);
        for (int64_t lane = 0; lane < kLanes; ++lane)
          for (int64_t which = 0; which < 2; ++which) total[(channel + lane) * 2 + which] += sums[which][lane];
      }
    }
  }
  for (int64_t chunk = 1; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < n.channels * 2; ++i) partial[i] += partial[chunk * n.channels * 2 + i];
  partial.resize(n.channels * 2);
  return partial;
}

template <class Update>
void for_rows(const NormRelu& n, Update update) {
#pragma omp parallel for schedule(static) num_threads(n.threads)
  for (int64_t chunk = 0; chunk < chunks_of(n.rows); ++chunk) {
    const int64_t end = std::min(n.rows, (chunk + 1) * kChunk);
    for (int64_t first = chunk * kChunk; first < end; first += kBlock)
      for (int64_t channel = 0; channel < n.channels; channel += kLanes)
        update(first, std::min(end, first + kBlock), channel);
  }
}

template <class T, bool kShortcut>
void forward(const NormRelu& n) {
  const T *x = static_cast<const T*>(n.x), *shortcut = static_cast<const T*>(n.shortcut);
  T* y = static_cast<T*>(n.y);
  const int64_t channels = n.channels;

  // The first row is subtracted: the variance keeps its digits when the mean is far from 0.
  const auto sums = sum_rows(n, [=](int64_t first, int64_t last, int64_t channel, float(&sums)[2][kLanes]) {
    float origin[kLanes], sum[kLanes] = {}, square[kLanes] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) origin[lane] = load(x + channel + lane);
    for (int64_t row = first; row < last; ++row) {
      const T* at = x + row * channels + channel;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float value = load(at + lane) - origin[lane];
        sum[lane] += value;
        square[lane] += value * value;
      }
    }
    std::memcpy(sums[0], sum, sizeof sum);
    std::memcpy(sums[1], square, sizeof square);
  });

  std::vector<float> scale(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double mean = sums[2 * c] / n.rows, variance = std::fmax(0.0, sums[2 * c + 1] / n.rows - mean * mean);
    n.mean[c] = float(mean + load(x + c));
    n.inverse_std[c] = float(1 / std::sqrt(variance + n.eps));
    scale[c] = n.weight[c] * n.inverse_std[c];
    offset[c] = n.bias[c] - n.mean[c] * scale[c];
    if (!n.running_mean) continue;
    n.running_mean[c] += float(n.momentum * (double(n.mean[c]) - n.running_mean[c]));
    n.running_var[c] += float(n.momentum * (variance * n.rows / (n.rows - 1) - n.running_var[c]));
  }

  for_rows(n, [=, scales = scale.data(), offsets = offset.data()](int64_t first, int64_t last, int64_t channel) {
    float scale[kLanes], offset[kLanes];
    std::memcpy(scale, scales + channel, sizeof scale);
    std::memcpy(offset, offsets + channel, sizeof offset);
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * channels + channel;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        float value = load(x + at + lane) * scale[lane] + offset[lane];
        if constexpr (kShortcut) value += load(shortcut + at + lane);
        store(y + at + lane, value < 0 ? 0 : value);  // a NaN stays a NaN
      }
    }
  });
}

template <class T, bool kShortcut>
void backward(const NormRelu& n) {
  const T *x = static_cast<const T*>(n.x), *y = static_cast<const T*>(n.y), *grad_y = static_cast<const T*>(n.grad_y);
  T *grad_x = static_cast<T*>(n.grad_x), *grad_shortcut = static_cast<T*>(n.grad_shortcut);
  const float *means = n.mean, *inverse_stds = n.inverse_std;
  const int64_t channels = n.channels;

  // g is the gradient of the ReLU's input and of the shortcut. If it is written, the second pass reads it.
  const auto sums = sum_rows(n, [=](int64_t first, int64_t last, int64_t channel, float(&sums)[2][kLanes]) {
    float mean[kLanes], bias[kLanes] = {}, weight[kLanes] = {};
    std::memcpy(mean, means + channel, sizeof mean);
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * channels + channel;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        float g = load(grad_y + at + lane);
        g = load(y + at + lane) <= 0 ? 0 : g;
        if constexpr (kShortcut) store(grad_shortcut + at + lane, g);
        bias[lane] += g;
        weight[lane] += g * (load(x + at + lane) - mean[lane]);
      }
    }
    std::memcpy(sums[0], bias, sizeof bias);
    std::memcpy(sums[1], weight, sizeof weight);
  });

  // grad_x = scale * (g - mean(g) - x_hat * mean(g * x_hat)) as scale * g + slope * x + offset
  std::vector<float> scale(channels), slope(channels), offset(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse_std = inverse_stds[c], weight = sums[2 * c + 1] * inverse_std;
    n.grad_bias[c] = float(sums[2 * c]);
    n.grad_weight[c] = float(weight);
    const double factor = n.weight[c] * inverse_std, change = -factor * inverse_std * weight / n.rows;
    scale[c] = float(factor);
    slope[c] = float(change);
    offset[c] = float(-factor * sums[2 * c] / n.rows - change * means[c]);
  }

  const T* g_source = kShortcut ? grad_shortcut : grad_y;
  for_rows(n, [=, scales = scale.data(), slopes = slope.data(), offsets = offset.data()](
                  int64_t first, int64_t last, int64_t channel) {
    float scale[kLanes], slope[kLanes], offset[kLanes];
    std::memcpy(scale, scales + channel, sizeof scale);
    std::memcpy(slope, slopes + channel, sizeof slope);
    std::memcpy(offset, offsets + channel, sizeof offset);
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * channels + channel;
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        float g = load(g_source + at + lane);
        if constexpr (!kShortcut) g = load(y + at + lane) <= 0 ? 0 : g;
        store(grad_x + at + lane, scale[lane] * g + (slope[lane] * load(x + at + lane) + offset[lane]));
      }
    }
  });
}

}  // namespace

// Each dtype and case is compiled separately: the compiler vectorises loops without conditions.
extern "C" void norm_relu_forward(const NormRelu* n) {
  const auto function = n->bfloat16 ? (n->shortcut ? forward<BFloat16, true> : forward<BFloat16, false>)
                                    : (n->shortcut ? forward<float, true> : forward<float, false>);
  function(*n);
}

extern "C" void norm_relu_backward(const NormRelu* n) {
  const auto function = n->bfloat16 ? (n->grad_shortcut ? backward<BFloat16, true> : backward<BFloat16, false>)
                                    : (n->grad_shortcut ? backward<float, true> : backward<float, false>);
  function(*n);
}
