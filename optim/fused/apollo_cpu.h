// The arithmetic of Apollo's step over one chunk of a tensor. optim/apollo.py explains the letters.

#pragma once

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <limits>

#include "half_precision.h"

extern "C" {

struct ApolloSettings {
  double lr, beta, eps, sigma, init_lr;
  double l2, decay;        // weight decay: added to the gradient, added to the direction
  double grad_factor;      // -1 to maximize, divided by a gradient scaler's scale
  int64_t warmup, belief, stable;
  int64_t stored;  // whether the tensors have an exp_avg
  int64_t uncut;   // a tensor of at most this many elements (up to kHugeChunk) is not cut and leaves no sums
};

// Addresses of a tensor (0 for none), and its numbers of elements on this rank and on all ranks.
struct ApolloTensor {
  void *param, *grad, *exp_avg, *hessian, *direction, *sigma;
  float* step;
  int64_t numel, numel_of_all_ranks;
  int64_t state_sums_known;  // whether its ApolloStateSums hold the sums of the last step
};

// Sums over a tensor: of d^4, (g - m) d, B d^2 and D; the maximum of |g - m|. The caller joins the sums of shards.
struct ApolloSums {
  double d4, gd, bdd, curvature, max;
};

// The sums that need no gradient, over a tensor or its shard: of d^4, m d, B d^2, and with L2 decay of p d.
struct ApolloStateSums {
  double d4, md, bdd, pd;
};

// Only decay "stable" has kDirection: it needs the mean of D before d can be computed.
enum { kSum = 1, kUpdate = 2, kDirection = 4 };

}  // extern "C"

namespace {  // apollo_cpu.cpp alone includes this file

constexpr int64_t kBlock = 256;        // elements summed in the state's dtype; their sums are added in double
constexpr int64_t kChunk = 16384;      // elements of a chunk
constexpr int64_t kHuge = 1 << 20;     // a tensor of more elements has more than 8 MiB of g and d in float32
constexpr int64_t kHugeChunk = 65536;  // elements of its chunks
constexpr int64_t kWave = 65536;       // elements of a wave for each thread
constexpr int64_t kLeast = 8192;       // elements that are worth one more thread

// The loops are compiled for each Form. P: dtype of parameters and gradients. S: of the state and of all arithmetic.
template <class P_, class S_, bool L2_, bool STORED_, bool BELIEF_, bool STABLE_>
struct Form {
  using P = P_;
  using S = S_;
  static constexpr bool L2 = L2_, STORED = STORED_, BELIEF = BELIEF_, STABLE = STABLE_;
  static constexpr bool CARRY = !STABLE && !BELIEF;  // whether large tensors leave sums for the next step
};

// delta: of B <- B + delta * d^2, where d is not divided by its norm.
template <class S>
struct Scalars {
  S l2, decay, grad_factor, lr, alpha, delta;
  S last_bound, last_offset;  // D = max(|B|, bound) + offset, in the last step and in this one
  S bound, offset;
};

inline double offset_after(double steps, const ApolloSettings& s) {
  return s.belief ? s.eps * (1 - std::pow(s.beta, steps)) / (1 - s.beta) : 0;
}

template <class S>
Scalars<S> scalars_before_sums(const ApolloTensor& t, const ApolloSettings& s) {
  Scalars<S> x{};
  x.l2 = S(s.l2);
  x.decay = S(s.decay);
  x.grad_factor = S(s.grad_factor);
  x.last_bound = s.belief ? *static_cast<S*>(t.sigma) : S(s.sigma);
  x.last_offset = S(offset_after(*t.step, s));
  return x;
}

template <class S>
Scalars<S> scalars_of_update(const ApolloTensor& t, const ApolloSettings& s, const ApolloSums& sums) {
  Scalars<S> x = scalars_before_sums<S>(t, s);
  const double steps = *t.step, warmup = double(s.warmup);
  const double alpha = (1 - s.beta) / (1 - std::pow(s.beta, steps + 1));
  const double denom = std::pow(sums.d4, 0.25) + (s.belief ? s.eps : s.eps / s.sigma);
  x.lr = S(steps < warmup && s.lr != 0 ? s.init_lr + (s.lr - s.init_lr) * steps / warmup : s.lr);
  x.alpha = S(alpha);
  x.delta = S(-(alpha * sums.gd + sums.bdd) / (denom * denom) / (denom * denom));
  x.bound = s.belief ? S(sums.max) : S(s.sigma);
  x.offset = S(offset_after(steps + 1, s));
  return x;
}

// D. A NaN in b stays one, as with torch's clamp.
template <bool BELIEF, class S>
inline S rectify(S b, S bound, S offset) {
  const S a = std::fabs(b), rectified = a < bound ? bound : a;
  return BELIEF ? rectified + offset : rectified;
}

// Adds a block's part of the sums that need no gradient. It is not inlined, so that carried and new sums have the
// same bits.
template <class F>
__attribute__((noinline)) void sum_block(ApolloStateSums& total, const ApolloTensor& t, typename F::S bound,
                                         typename F::S offset, int64_t begin, int64_t end) {
  using P = typename F::P;
  using S = typename F::S;
  const P* __restrict p = static_cast<const P*>(t.param);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict b = static_cast<const S*>(t.hessian);
  const S* __restrict d = static_cast<const S*>(t.direction);
  S d4 = 0, md = 0, bdd = 0, pd = 0;
#pragma omp simd reduction(+ : d4, md, bdd, pd)
  for (int64_t i = begin; i < end; ++i) {
    const S square = d[i] * d[i];
    const S average = F::STORED ? m[i] : d[i] * rectify<F::BELIEF>(b[i], bound, offset);
    d4 += square * square;
    md += average * d[i];
    bdd += b[i] * square;
    if (F::L2) pd += load(p[i]) * d[i];
  }
  total.d4 += double(d4), total.md += double(md), total.bdd += double(bdd), total.pd += double(pd);
}

template <class F>
ApolloStateSums sum_chunk(const ApolloTensor& t, const Scalars<typename F::S>& x, int64_t begin, int64_t end) {
  ApolloStateSums total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    sum_block<F>(total, t, x.last_bound, x.last_offset, block, stop);
  }
  return total;
}

// The first element usually shows that a block is not zero.
template <class X>
bool is_zero(const X* __restrict x, int64_t begin, int64_t end) {
  if (load(x[begin]) != 0) return false;
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t i = begin; i < end; ++i) any |= load(x[i]) != 0;
  return !any;
}

template <class S>
void clear_subnormal(S* __restrict x, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) x[i] = std::fabs(x[i]) < std::numeric_limits<S>::min() ? S(0) : x[i];
}

using Blocks = std::bitset<kHugeChunk / kBlock>;  // one bit for each block of a chunk

// Returns gd, the sum of g * d without L2 decay, and max, the maximum of |g - m| with it. Marks in `zeros` where the
// gradient is zero, but not with BELIEF, which needs all of m.
template <class F>
ApolloSums dot_chunk(const ApolloTensor& t, const Scalars<typename F::S>& x, int64_t begin, int64_t end,
                     Blocks& zeros) {
  using P = typename F::P;
  using S = typename F::S;
  const P* __restrict p = static_cast<const P*>(t.param);
  const P* __restrict g = static_cast<const P*>(t.grad);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict b = static_cast<const S*>(t.hessian);
  const S* __restrict d = static_cast<const S*>(t.direction);
  const S l2 = x.l2, factor = x.grad_factor, bound = x.last_bound, offset = x.last_offset;
  ApolloSums total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    if (!F::BELIEF && is_zero(g, block, stop)) {
      zeros.set((block - begin) / kBlock);
      continue;
    }
    S gd = 0, max = 0;
#pragma omp simd reduction(+ : gd) reduction(max : max)
    for (int64_t i = block; i < stop; ++i) {
      const S grad = load(g[i]) * factor;
      gd += grad * d[i];
      if (F::BELIEF) {
        const S average = F::STORED ? m[i] : d[i] * rectify<F::BELIEF>(b[i], bound, offset);
        const S delta_g = std::fabs((F::L2 ? grad + l2 * load(p[i]) : grad) - average);
        max = delta_g > max ? delta_g : max;
      }
    }
    total.gd += double(gd);
    total.max = std::max(total.max, double(max));
  }
  return total;
}

// Adds the next step's sums to `state_sums`, if not null. With STABLE it leaves d and p as they are, and returns the
// sum of D, whose mean they need.
template <class F>
double update_chunk(const ApolloTensor& t, const Scalars<typename F::S>& x, int64_t begin, int64_t end,
                    const Blocks& zeros, ApolloStateSums* state_sums) {
  using P = typename F::P;
  using S = typename F::S;
  static const P nothing[kBlock]{};
  P* __restrict p = static_cast<P*>(t.param);
  S* __restrict m = static_cast<S*>(t.exp_avg);
  S* __restrict b = static_cast<S*>(t.hessian);
  S* __restrict d = static_cast<S*>(t.direction);
  const S l2 = x.l2, decay = x.decay, factor = x.grad_factor, alpha = x.alpha, delta = x.delta, lr = x.lr;
  const S last_bound = x.last_bound, last_offset = x.last_offset, bound = x.bound, offset = x.offset;
  double total = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    const bool zero = zeros[(block - begin) / kBlock];
    if (!F::L2 && !F::STORED && zero && std::isfinite(delta) && is_zero(d, block, stop)) continue;
    const P* __restrict g = zero ? nothing : static_cast<const P*>(t.grad) + block;
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = block; i < stop; ++i) {
      const S param = load(p[i]);
      S grad = load(g[i - block]) * factor;
      if (F::L2) grad += l2 * param;
      const S last_d = d[i];
      S average = F::STORED ? m[i] : last_d * rectify<F::BELIEF>(b[i], last_bound, last_offset);
      average += alpha * (grad - average);
      const S hessian = b[i] + delta * (last_d * last_d);
      if (F::STORED) m[i] = average;
      b[i] = hessian;
      const S curvature = rectify<F::BELIEF>(hessian, bound, offset);
      if (F::STABLE) {
        sum += curvature;
      } else {
        S direction = average / curvature;
        if (F::STORED) direction += decay * param;
        d[i] = direction;
        store(p[i], param - lr * direction);
      }
    }
    total += double(sum);
    if (zero && !F::STABLE) clear_subnormal(d, block, stop);
    if (F::CARRY && state_sums) sum_block<F>(*state_sums, t, bound, offset, block, stop);
  }
  return total;
}

template <class F>
void direction_chunk(const ApolloTensor& t, const Scalars<typename F::S>& x, typename F::S decay, int64_t begin,
                     int64_t end) {
  using P = typename F::P;
  using S = typename F::S;
  P* __restrict p = static_cast<P*>(t.param);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict b = static_cast<const S*>(t.hessian);
  S* __restrict direction = static_cast<S*>(t.direction);
  const S bound = x.bound, offset = x.offset, lr = x.lr;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const S param = load(p[i]);
    const S d = m[i] / rectify<true>(b[i], bound, offset) + decay * param;
    direction[i] = d;
    store(p[i], param - lr * d);
  }
}

}  // namespace
