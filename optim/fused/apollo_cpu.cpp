// Apollo's step over a list of tensors on the CPU, in one call. apollo_cpu.h has the arithmetic.
//
// The cost of a step is reading memory. A tensor is read twice: its sums must be known before its first element is
// updated. All sums but that of g * d are carried over (carried_sums.py). So the first pass reads g and d; the second
// reads g, p, B, d and writes p, B, d.
//
// An embedding's gradient is zero in the rows of words that are not in the batch. The first pass reads d only where the
// gradient is not zero. If d is zero too and there is no weight decay, p and B are not touched. d is set to zero below
// the least normal number, about 800 steps after a word was last seen.
//
// Large tensors are cut into chunks. A wave of chunks fits in the cores' own caches where possible. Each core takes the
// same chunks in both passes. If a tensor's g and d do not fit in a shared cache, the second pass goes backwards, in
// longer chunks, because the last ones are still in the cache. Otherwise it goes forwards, which suits prefetching.
//
// A chunk's sums do not depend on the thread, nor on whether they are carried over. Chunks are added up in their order.
// So the result is bit for bit the same on any number of threads and after a resume.

#include "apollo_cpu.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif

namespace {

struct Chunk {
  int64_t tensor, begin, end;
  int64_t elements_ahead;      // in the chunks before it
  Blocks zeros;                // where its gradient is zero
  ApolloSums sums;             // of this chunk, in this step
  ApolloStateSums state_sums;  // of this chunk: left by the last step, then by this one
};

template <class S>
struct Loops {
  ApolloStateSums (*sum_chunk)(const ApolloTensor&, const Scalars<S>&, int64_t, int64_t);
  ApolloSums (*dot_chunk)(const ApolloTensor&, const Scalars<S>&, int64_t, int64_t, Blocks&);
  double (*update_chunk)(const ApolloTensor&, const Scalars<S>&, int64_t, int64_t, const Blocks&, ApolloStateSums*);
  void (*direction_chunk)(const ApolloTensor&, const Scalars<S>&, S, int64_t, int64_t);
};

// The flags are those of Form, in its order.
template <class P, class S, bool... KNOWN>
Loops<S> loops_for() {
  using F = Form<P, S, KNOWN...>;
  return {sum_chunk<F>, dot_chunk<F>, update_chunk<F>, direction_chunk<F>};
}
template <class P, class S, bool... KNOWN, class... Flags>
Loops<S> loops_for(bool flag, Flags... flags) {
  return flag ? loops_for<P, S, KNOWN..., true>(flags...) : loops_for<P, S, KNOWN..., false>(flags...);
}

// Stages of a step over a list of tensors.
template <class S>
struct Step {
  Loops<S> loops;
  ApolloTensor* tensors;
  ApolloSums* sums;
  ApolloStateSums* state_sums;
  const ApolloSettings& s;
  const int64_t n, stages, threads;
  std::vector<Chunk> chunks{};
  std::vector<Scalars<S>> scalars{size_t(n)};

  void sum(Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    const Scalars<S> x = scalars_before_sums<S>(t, s);
    if (!t.state_sums_known) c.state_sums = loops.sum_chunk(t, x, c.begin, c.end);
    c.sums = loops.dot_chunk(t, x, c.begin, c.end, c.zeros);
  }

  void update(Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    c.state_sums = {};
    ApolloStateSums* left = t.numel > s.uncut ? &c.state_sums : nullptr;
    c.sums.curvature = loops.update_chunk(t, scalars[c.tensor], c.begin, c.end, c.zeros, left);
  }

  void direct(const Chunk& c) const {
    const ApolloTensor& t = tensors[c.tensor];
    const S decay = S(s.decay / (sums[c.tensor].curvature / double(t.numel_of_all_ranks)));
    loops.direction_chunk(t, scalars[c.tensor], decay, c.begin, c.end);
  }

  void add_state_sums(const Chunk& c) const {
    ApolloStateSums& total = state_sums[c.tensor];
    if (c.begin == 0) total = {};
    total.d4 += c.state_sums.d4, total.md += c.state_sums.md;
    total.bdd += c.state_sums.bdd, total.pd += c.state_sums.pd;
  }

  // Adds the sums that need no gradient to the others.
  void complete(int64_t i) const {
    sums[i].d4 = state_sums[i].d4, sums[i].bdd = state_sums[i].bdd;
    sums[i].gd += s.l2 * state_sums[i].pd - state_sums[i].md;
  }

  void step_uncut(int64_t i) {
    Chunk c{i, 0, tensors[i].numel, 0, {}, {}, {}};
    sum(c);
    sums[i] = c.sums;
    state_sums[i] = c.state_sums;
    complete(i);
    scalars[i] = scalars_of_update<S>(tensors[i], s, sums[i]);
    update(c);
    sums[i].curvature = c.sums.curvature;
    if (s.stable) direct(c);
  }

  // Every thread of a team calls this for a wave: the chunks from `first` to `last`.
  void step_wave(int64_t first, int64_t last) {
    // This thread takes the chunks that begin in its part of the wave's elements.
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const Chunk& final = chunks[last - 1];
    const int64_t start = chunks[first].elements_ahead, size = final.elements_ahead + final.end - final.begin - start;
    const auto part = [&](int64_t thread) {
      int64_t k = first;
      while (k < last && (chunks[k].elements_ahead - start) * team < thread * size) ++k;
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
        if (!tensors[i].state_sums_known) add_state_sums(c);
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
    std::vector<int64_t> uncut;     // tensors done in one go
    std::vector<int64_t> waves{0};  // the first chunk of each wave; a tensor is never in two waves
    int64_t elements = 0, wave_start = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t numel = tensors[i].numel;
      if (all_stages && numel <= s.uncut) {
        if (numel) uncut.push_back(i);
        continue;
      }
      if (elements > wave_start && elements + numel - wave_start > kWave * team) {
        waves.push_back(int64_t(chunks.size()));
        wave_start = elements;
      }
      const int64_t size = numel <= s.uncut ? numel : numel <= kHuge ? kChunk : kHugeChunk;
      for (int64_t begin = 0; begin < numel; begin += size) {
        const int64_t end = std::min(begin + size, numel);
        chunks.push_back({i, begin, end, elements, {}, {}, {}});
        elements += end - begin;
      }
    }
    waves.push_back(int64_t(chunks.size()));

#pragma omp parallel num_threads(int(team))
    {
      for (size_t w = 0; w + 1 < waves.size(); ++w)
        if (waves[w] < waves[w + 1]) step_wave(waves[w], waves[w + 1]);
#pragma omp for schedule(dynamic)
      for (size_t k = 0; k < uncut.size(); ++k) step_uncut(uncut[k]);
    }

    if (stages & kUpdate)
      for (const Chunk& c : chunks) add_state_sums(c);
    if (!(stages & (s.stable ? kDirection : kUpdate))) return;
    for (int64_t i = 0; i < n; ++i) {
      *tensors[i].step += 1;
      if (s.belief) *static_cast<S*>(tensors[i].sigma) = S(sums[i].max);
    }
  }
};

}  // namespace

// Runs `stages` of the step of n tensors on up to `threads` threads. dtype of parameters and gradients: 0 float32, 1
// float64, 2 bfloat16, 3 float16. The state is float32, or float64 for float64. `sums` [n] pass from stage to stage,
// `state_sums` [n] from step to step.
extern "C" void apollo_step(ApolloTensor* tensors, ApolloSums* sums, ApolloStateSums* state_sums,
                            const ApolloSettings* settings, int64_t n, int64_t dtype, int64_t stages, int64_t threads) {
  const ApolloSettings& s = *settings;
  const auto run = [&](auto parameter, auto state) {
    using P = decltype(parameter);
    using S = decltype(state);
    const Loops<S> loops = loops_for<P, S>(s.l2 != 0, s.stored != 0, s.belief != 0, s.stable != 0);
    Step<S>{loops, tensors, sums, state_sums, s, n, stages, threads}.run();
  };
  if (dtype == 0) run(float{}, float{});
  if (dtype == 1) run(double{}, double{});
  if (dtype == 2) run(BFloat16{}, float{});
  if (dtype == 3) run(Float16{}, float{});
}
