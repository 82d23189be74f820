// Apollo's step over a list of tensors on the CPU, in one call. See optim/apollo.py for the algorithm and its letters;
// optim/fused/cpu.py compiles this file and calls apollo_step through its plain C interface.
//
// What a step costs is reading memory. A tensor's sums have to be known before its first element can be updated, so that
// it is read twice. Of the four sums only that of g * d has the new gradient in it; the others (sum_block) are of numbers
// that the step before wrote, and are taken then, block by block, while these are in cache. The first pass then reads g
// and d, the second reads g, p, B, d and writes p, B, d: 9 transfers of a tensor's size, where AdamW makes 7. A small
// tensor is done in one go, in cache.
//
// An embedding's gradient is zero in the rows of words that are not in the batch. The first pass reads d only beside blocks
// of a gradient that are not zero, and the second does not read zeros again: 7 transfers, as AdamW's. Where d is zero too
// and there is no weight decay, nothing changes, and p and B are not touched: 2 transfers. d, which shrinks by beta a step,
// is zero once it is less than the least normal number, some 800 steps after a word was last seen. (Not so with rebound
// "belief", which needs the largest |g - m| and so reads everything first; nor does it carry sums.)
//
// Large tensors are cut into chunks, and go through in waves that the cores' own caches can hold where that is possible.
// Each core takes the same chunks in both passes. Where a tensor's g and d are more than a shared cache holds, the second
// pass goes backwards, in longer chunks, to find the last of them still there; elsewhere forwards, which hardware
// prefetching likes better.
//
// What a chunk sums to does not depend on the thread that does it, nor on whether its sums were carried over or are
// taken anew, and chunks are added up in their order: the result is the same, bit for bit, on any number of threads,
// and after a resume.

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

extern "C" {

struct ApolloSettings {
  double lr, beta, eps, sigma, init_lr;
  double l2, decay;        // coefficients of weight decay: added to the gradient, added to the direction
  double grad_factor;      // -1 to maximize, divided by a gradient scaler's scale
  int64_t warmup, belief, stable;
  int64_t whole;  // a tensor of so many elements, or fewer, is not cut and carries nothing; at most kHugeChunk
};

// One tensor of the list: addresses (0 for none) and numbers of elements, here and over all ranks.
struct ApolloTensor {
  void *param, *grad, *exp_avg, *hessian, *direction, *sigma;
  float* step;
  int64_t numel, whole_numel;
  int64_t carried;  // whether ApolloCarried holds what the step before has left
};

// Sums over a tensor: of d^4, (g - m) d, B d^2 and D, and the largest |g - m|. Where a tensor is sharded, the caller
// joins those of its shards.
struct ApolloSums {
  double d4, gd, bdd, curvature, max;
};

// Sums over a tensor, or this rank's shard of it, after a step: of d^4, m d, B d^2, and for L2 decay of p d.
struct ApolloCarried {
  double d4, md, bdd, pd;
};

// Stages of a step. kDirection is for decay "stable" alone, which needs the mean of D before it can go on.
enum { kSum = 1, kUpdate = 2, kDirection = 4 };

}  // extern "C"

namespace {

constexpr int64_t kBlock = 256;        // elements summed in the dtype of the state; blocks are added up in double
constexpr int64_t kChunk = 16384;      // elements of a chunk
constexpr int64_t kHuge = 1 << 20;     // a tensor of more elements has more than 8 MiB of g and d in float32
constexpr int64_t kHugeChunk = 65536;  // elements of its chunks
constexpr int64_t kWave = 65536;       // elements of a wave for each thread
constexpr int64_t kLeast = 8192;       // elements that a thread is worth starting for

// Half precision as its bits, converted without branches, so that the loops below vectorise with any compiler.
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
  // exponent and mantissa moved to their places; the product repairs the bias, of subnormals too
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
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // ulp of 0.5: the smallest float16
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? 0x7c00 : half;
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  to.bits = uint16_t(half | (bits_of(x) >> 16 & 0x8000));
}

// The scalars of one tensor's step. delta is that of B <- B + delta * d^2, with d not yet divided by its norm.
template <class S>
struct Scalars {
  S l2, decay, grad_factor, lr, alpha, delta;
  S bound_before, offset_before;  // D = max(|B|, bound) + offset, in the step before and in this one
  S bound, offset;
};

// What D adds to the bound, after `steps` steps: eps / alpha with "belief".
inline double offset_after(double steps, const ApolloSettings& s) {
  return s.belief ? s.eps * (1 - std::pow(s.beta, steps)) / (1 - s.beta) : 0;
}

template <class S>
Scalars<S> scalars_before_sums(const ApolloTensor& t, const ApolloSettings& s) {
  Scalars<S> x{};
  x.l2 = S(s.l2);
  x.decay = S(s.decay);
  x.grad_factor = S(s.grad_factor);
  x.bound_before = s.belief ? *static_cast<S*>(t.sigma) : S(s.sigma);
  x.offset_before = S(offset_after(*t.step, s));
  return x;
}

template <class S>
Scalars<S> scalars_of_update(const ApolloTensor& t, const ApolloSettings& s, const ApolloSums& sums) {
  Scalars<S> x = scalars_before_sums<S>(t, s);
  const double before = *t.step, warmup = double(s.warmup);
  const double alpha = (1 - s.beta) / (1 - std::pow(s.beta, before + 1));
  const double denom = std::pow(sums.d4, 0.25) + (s.belief ? s.eps : s.eps / s.sigma);
  x.lr = S(before < warmup ? s.init_lr + (s.lr - s.init_lr) * before / warmup : s.lr);
  x.alpha = S(alpha);
  x.delta = S(-(alpha * sums.gd + sums.bdd) / (denom * denom) / (denom * denom));
  x.bound = s.belief ? S(sums.max) : S(s.sigma);
  x.offset = S(offset_after(before + 1, s));
  return x;
}

// D. A NaN in b stays one, as with torch's clamp.
template <bool BELIEF, class S>
inline S rectify(S b, S bound, S offset) {
  const S a = std::fabs(b), rectified = a < bound ? bound : a;
  return BELIEF ? rectified + offset : rectified;
}

// Adds a block's part of the sums that do not depend on the gradient. Not inlined: the same instructions, and so the same
// bits, for a block that was updated a moment ago and for one whose sums are not known any more.
template <class P, class S, bool L2, bool STORED, bool BELIEF>
__attribute__((noinline)) void sum_block(ApolloCarried& total, const ApolloTensor& t, S bound, S offset, int64_t begin,
                                         int64_t end) {
  const P* __restrict p = static_cast<const P*>(t.param);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict b = static_cast<const S*>(t.hessian);
  const S* __restrict d = static_cast<const S*>(t.direction);
  S d4 = 0, md = 0, bdd = 0, pd = 0;
#pragma omp simd reduction(+ : d4, md, bdd, pd)
  for (int64_t i = begin; i < end; ++i) {
    const S square = d[i] * d[i];
    const S average = STORED ? m[i] : d[i] * rectify<BELIEF>(b[i], bound, offset);
    d4 += square * square;
    md += average * d[i];
    bdd += b[i] * square;
    if (L2) pd += load(p[i]) * d[i];
  }
  total.d4 += double(d4), total.md += double(md), total.bdd += double(bdd), total.pd += double(pd);
}

template <class P, class S, bool L2, bool STORED, bool BELIEF>
ApolloCarried sum_chunk(const ApolloTensor& t, const Scalars<S>& x, int64_t begin, int64_t end) {
  ApolloCarried total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    sum_block<P, S, L2, STORED, BELIEF>(total, t, x.bound_before, x.offset_before, block, stop);
  }
  return total;
}

// Whether a block is zero all over. One that is not says so at once, as a rule.
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

// The sum of g * d, L2 decay's part of g left out, in gd; and the largest |g - m|, with that part, in max. Notes in `zeros`
// which blocks of the gradient are zero, where that is of use: not with BELIEF, which needs all of m.
template <class P, class S, bool L2, bool STORED, bool BELIEF>
ApolloSums dot_chunk(const ApolloTensor& t, const Scalars<S>& x, int64_t begin, int64_t end, Blocks& zeros) {
  const P* __restrict p = static_cast<const P*>(t.param);
  const P* __restrict g = static_cast<const P*>(t.grad);
  const S* __restrict m = static_cast<const S*>(t.exp_avg);
  const S* __restrict b = static_cast<const S*>(t.hessian);
  const S* __restrict d = static_cast<const S*>(t.direction);
  const S l2 = x.l2, factor = x.grad_factor, bound = x.bound_before, offset = x.offset_before;
  ApolloSums total{};
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    if (!BELIEF && is_zero(g, block, stop)) {
      zeros.set((block - begin) / kBlock);
      continue;
    }
    S gd = 0, max = 0;
#pragma omp simd reduction(+ : gd) reduction(max : max)
    for (int64_t i = block; i < stop; ++i) {
      const S grad = load(g[i]) * factor;
      gd += grad * d[i];
      if (BELIEF) {
        const S average = STORED ? m[i] : d[i] * rectify<BELIEF>(b[i], bound, offset);
        const S delta_g = std::fabs((L2 ? grad + l2 * load(p[i]) : grad) - average);
        max = delta_g > max ? delta_g : max;
      }
    }
    total.gd += double(gd);
    total.max = std::max(total.max, double(max));
  }
  return total;
}

// m and B, with the gradient's blocks in `zeros` not read; then d and p and, with CARRY, the sums of them that the next step
// needs, added to `carried`. With STABLE, where the mean of D has to come first, the sum of D instead, which is returned.
template <class P, class S, bool L2, bool STORED, bool BELIEF, bool STABLE, bool CARRY>
double update_chunk(const ApolloTensor& t, const Scalars<S>& x, int64_t begin, int64_t end, const Blocks& zeros,
                    ApolloCarried& carried) {
  static const P nothing[kBlock]{};
  P* __restrict p = static_cast<P*>(t.param);
  S* __restrict m = static_cast<S*>(t.exp_avg);
  S* __restrict b = static_cast<S*>(t.hessian);
  S* __restrict d = static_cast<S*>(t.direction);
  const S l2 = x.l2, decay = x.decay, factor = x.grad_factor, alpha = x.alpha, delta = x.delta, lr = x.lr;
  const S bound_before = x.bound_before, offset_before = x.offset_before, bound = x.bound, offset = x.offset;
  double total = 0;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = std::min(block + kBlock, end);
    const bool zero = zeros[(block - begin) / kBlock];
    if (!L2 && !STORED && zero && std::isfinite(delta) && is_zero(d, block, stop)) continue;
    const P* __restrict g = zero ? nothing : static_cast<const P*>(t.grad) + block;
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = block; i < stop; ++i) {
      const S param = load(p[i]);
      S grad = load(g[i - block]) * factor;
      if (L2) grad += l2 * param;
      const S before = d[i];
      S average = STORED ? m[i] : before * rectify<BELIEF>(b[i], bound_before, offset_before);
      average += alpha * (grad - average);
      const S hessian = b[i] + delta * (before * before);
      if (STORED) m[i] = average;
      b[i] = hessian;
      const S curvature = rectify<BELIEF>(hessian, bound, offset);
      if (STABLE) {
        sum += curvature;
      } else {
        S direction = average / curvature;
        if (STORED) direction += decay * param;
        d[i] = direction;
        store(p[i], param - lr * direction);
      }
    }
    total += double(sum);
    if (zero && !STABLE) clear_subnormal(d, block, stop);
    if (CARRY) sum_block<P, S, L2, STORED, BELIEF>(carried, t, bound, offset, block, stop);
  }
  return total;
}

// d and p of decay "stable".
template <class P, class S>
void direction_chunk(const ApolloTensor& t, const Scalars<S>& x, S decay, int64_t begin, int64_t end) {
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

// Calls f with the flag as a type, so that loops are compiled for each of its values.
template <class F>
auto with_flag(bool flag, F f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

struct Chunk {
  int64_t tensor, begin, end;
  int64_t before;         // elements in the chunks that come before it
  Blocks zeros;           // where its gradient is zero
  ApolloSums sums;        // of this chunk, in this step
  ApolloCarried carried;  // of this chunk, after a step
};

// P: dtype of parameters and gradients, S: of the state and of all arithmetic.
template <class P, class S>
struct Step {
  ApolloTensor* tensors;
  ApolloSums* sums;
  ApolloCarried* carried;
  const ApolloSettings& s;
  const int64_t n, stages, threads;
  std::vector<Chunk> chunks{};
  std::vector<Scalars<S>> scalars{size_t(n)};

  void sum(Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    const Scalars<S> x = scalars_before_sums<S>(t, s);
    with_flag(s.l2 != 0, [&](auto l2) {
      with_flag(t.exp_avg != nullptr, [&](auto stored) {
        with_flag(s.belief != 0, [&](auto belief) {
          if (!t.carried) c.carried = sum_chunk<P, S, l2.value, stored.value, belief.value>(t, x, c.begin, c.end);
          c.sums = dot_chunk<P, S, l2.value, stored.value, belief.value>(t, x, c.begin, c.end, c.zeros);
        });
      });
    });
  }

  void update(Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    c.carried = {};
    with_flag(s.l2 != 0, [&](auto l2) {
      with_flag(t.exp_avg != nullptr, [&](auto stored) {
        with_flag(s.belief != 0, [&](auto belief) {
          with_flag(s.stable != 0, [&](auto stable) {
            with_flag(!s.stable && !s.belief && t.numel > s.whole, [&](auto carry) {
              c.sums.curvature =
                  update_chunk<P, S, l2.value, stored.value, belief.value, stable.value, carry.value>(
                      t, scalars[c.tensor], c.begin, c.end, c.zeros, c.carried);
            });
          });
        });
      });
    });
  }

  void direct(const Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    const S decay = S(s.decay / (sums[c.tensor].curvature / double(t.whole_numel)));
    direction_chunk<P, S>(t, scalars[c.tensor], decay, c.begin, c.end);
  }

  void add(ApolloCarried& total, const Chunk& c) const {
    if (c.begin == 0) total = {};
    total.d4 += c.carried.d4, total.md += c.carried.md, total.bdd += c.carried.bdd, total.pd += c.carried.pd;
  }

  // The sums of a step, from those of its gradient, which are in them already, and those that do not depend on it.
  void complete(int64_t i) const {
    sums[i].d4 = carried[i].d4, sums[i].bdd = carried[i].bdd;
    sums[i].gd += s.l2 * carried[i].pd - carried[i].md;
  }

  // All of the step of a tensor that is in one chunk.
  void whole(int64_t i) {
    Chunk c{i, 0, tensors[i].numel, 0, {}, {}, {}};
    sum(c);
    sums[i] = c.sums;
    carried[i] = c.carried;
    complete(i);
    scalars[i] = scalars_of_update<S>(tensors[i], s, sums[i]);
    update(c);
    sums[i].curvature = c.sums.curvature;
    if (s.stable) direct(c);
  }

  // Every thread of a team calls this for one wave: the chunks from `first` to `last`.
  void wave(int64_t first, int64_t last) {
    // This thread's share: chunks that begin in its part of the wave's elements.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t start = chunks[first].before, size = chunks[last - 1].before + chunks[last - 1].end -
                                                       chunks[last - 1].begin - start;
    const auto part = [&](int64_t thread) {
      int64_t k = first;
      while (k < last && (chunks[k].before - start) * team < thread * size) ++k;
      return k;
    };
    const int64_t low = part(me), high = part(me + 1);

    if (stages & kSum) {
      for (int64_t k = low; k < high; ++k) sum(chunks[k]);
    }
#pragma omp barrier
#pragma omp single
    for (int64_t k = first; k < last; ++k) {
      const Chunk& c = chunks[k];
      const int64_t i = c.tensor;
      if (stages & kSum) {
        if (c.begin == 0) sums[i] = {};
        sums[i].gd += c.sums.gd;
        sums[i].max = std::max(sums[i].max, c.sums.max);
        if (!tensors[i].carried) add(carried[i], c);
        if (c.end == tensors[i].numel) complete(i);
      }
      if (c.end == tensors[i].numel) scalars[i] = scalars_of_update<S>(tensors[i], s, sums[i]);
    }
    if (stages & kUpdate) {
      const bool backwards = size > kHuge;
      for (int64_t k = low; k < high; ++k) update(chunks[backwards ? low + high - 1 - k : k]);
    }
    if ((stages & kUpdate) && s.stable) {
#pragma omp barrier
#pragma omp single
      for (int64_t k = first; k < last; ++k) {
        const Chunk& c = chunks[k];
        if (c.begin == 0) sums[c.tensor].curvature = 0;
        sums[c.tensor].curvature += c.sums.curvature;
      }
    }
    if (stages & kDirection) {
      for (int64_t k = low; k < high; ++k) direct(chunks[k]);
    }
  }

  void run() {
    int64_t all = 0;
    for (int64_t i = 0; i < n; ++i) all += tensors[i].numel;
    const int64_t team = std::max<int64_t>(1, std::min(threads, all / kLeast));

    const bool all_stages = stages == (s.stable ? kSum | kUpdate | kDirection : kSum | kUpdate);
    std::vector<int64_t> small;     // tensors that are done in one go
    std::vector<int64_t> waves{0};  // where each begins among the chunks; a tensor is never in two
    int64_t before = 0, wave_start = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t numel = tensors[i].numel;
      if (all_stages && numel <= s.whole) {
        if (numel) small.push_back(i);
        continue;
      }
      if (before > wave_start && before + numel - wave_start > kWave * team) {
        waves.push_back(int64_t(chunks.size()));
        wave_start = before;
      }
      const int64_t size = numel <= s.whole ? numel : numel <= kHuge ? kChunk : kHugeChunk;
      for (int64_t begin = 0; begin < numel; begin += size) {
        const int64_t end = std::min(begin + size, numel);
        chunks.push_back({i, begin, end, before, {}, {}, {}});
        before += end - begin;
      }
    }
    waves.push_back(int64_t(chunks.size()));

#pragma omp parallel num_threads(int(team))
    {
      for (size_t w = 0; w + 1 < waves.size(); ++w)
        if (waves[w] < waves[w + 1]) wave(waves[w], waves[w + 1]);
#pragma omp for schedule(dynamic)
      for (size_t k = 0; k < small.size(); ++k) whole(small[k]);
    }

    if (stages & kUpdate)
      for (const Chunk& c : chunks) add(carried[c.tensor], c);
    if (!(stages & (s.stable ? kDirection : kUpdate))) return;
    for (int64_t i = 0; i < n; ++i) {
      *tensors[i].step += 1;
      if (s.belief) *static_cast<S*>(tensors[i].sigma) = S(sums[i].max);
    }
  }
};

}  // namespace

// Runs `stages` of the step of n tensors on up to `threads` threads. dtype is that of parameters and gradients: 0 float32,
// 1 float64, 2 bfloat16, 3 float16; the state is float32, or float64 for float64. `sums` [n] passes from stage to stage,
// `carried` [n] from step to step: an update leaves there what the next one may use, of tensors larger than
// settings->whole, unless decay is stable or rebound belief.
extern "C" void apollo_step(ApolloTensor* tensors, ApolloSums* sums, ApolloCarried* carried,
                            const ApolloSettings* settings, int64_t n, int64_t dtype, int64_t stages, int64_t threads) {
  if (dtype == 0) Step<float, float>{tensors, sums, carried, *settings, n, stages, threads}.run();
  if (dtype == 1) Step<double, double>{tensors, sums, carried, *settings, n, stages, threads}.run();
  if (dtype == 2) Step<BFloat16, float>{tensors, sums, carried, *settings, n, stages, threads}.run();
  if (dtype == 3) Step<Float16, float>{tensors, sums, carried, *settings, n, stages, threads}.run();
}
