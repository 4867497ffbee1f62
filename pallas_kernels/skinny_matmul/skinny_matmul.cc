// y[M, N] = x[M, K] W[K, N] for a few rows: the time is what reading W once takes.
//
// W goes by in memory order, kDepth of its rows at a time; sums of a panel of columns stay in the
// first-level cache. Every sum is taken over k in the same order whatever M is, so that a row of x
// gives the same bits alone and in a block.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kGroup = 8;    // rows of x that are taken together
constexpr int64_t kDepth = 8;    // rows of W in registers
constexpr int64_t kLanes = 16;   // of a vector
constexpr int64_t kSums = 8192;  // of a panel

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector Load(const float* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

inline void Store(float* to, Vector vector) { __builtin_memcpy(to, &vector, sizeof(vector)); }

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Problem {
  const float* x;
  const float* w;
  float* y;
  int64_t m, k, n;
};

// Adds to the sums of some rows of x what rows [k, k + Depth) of W give in columns [begin, end).
template <int Rows, int Depth>
inline void AddGroup(const Problem& p, int64_t first, int64_t k, int64_t begin, int64_t end) {
  const float* w = p.w + k * p.n;
  const float* x = p.x + first * p.k + k;
  float* y = p.y + first * p.n;
  int64_t n = begin;
  for (; n + kLanes <= end; n += kLanes) {
    Vector rows[Depth];
    for (int d = 0; d < Depth; ++d) {
      rows[d] = Load(w + d * p.n + n);
      __builtin_prefetch(w + (d + Depth) * p.n + n);
    }
    for (int m = 0; m < Rows; ++m) {
      Vector sum = Load(y + m * p.n + n);
      for (int d = 0; d < Depth; ++d) sum += x[m * p.k + d] * rows[d];
      Store(y + m * p.n + n, sum);
    }
  }
  for (; n < end; ++n) {
    for (int m = 0; m < Rows; ++m) {
      float sum = y[m * p.n + n];
      for (int d = 0; d < Depth; ++d) sum += x[m * p.k + d] * w[d * p.n + n];
      y[m * p.n + n] = sum;
    }
  }
}

template <int Depth>
void AddRows(const Problem& p, int64_t k, int64_t begin, int64_t end) {
  int64_t m = 0;
  for (; m + kGroup <= p.m; m += kGroup) AddGroup<kGroup, Depth>(p, m, k, begin, end);
  switch (p.m - m) {
    case 1: return AddGroup<1, Depth>(p, m, k, begin, end);
    case 2: return AddGroup<2, Depth>(p, m, k, begin, end);
    case 3: return AddGroup<3, Depth>(p, m, k, begin, end);
    case 4: return AddGroup<4, Depth>(p, m, k, begin, end);
    case 5: return AddGroup<5, Depth>(p, m, k, begin, end);
    case 6: return AddGroup<6, Depth>(p, m, k, begin, end);
    case 7: return AddGroup<7, Depth>(p, m, k, begin, end);
  }
}

void MultiplyPanel(const Problem& p, int64_t begin, int64_t end) {
  for (int64_t m = 0; m < p.m; ++m) std::fill(p.y + m * p.n + begin, p.y + m * p.n + end, 0.0f);
  int64_t k = 0;
  for (; k + kDepth <= p.k; k += kDepth) AddRows<kDepth>(p, k, begin, end);
  for (; k < p.k; ++k) AddRows<1>(p, k, begin, end);
}

// Panels are handed out one by one. The caller works too and waits only for panels that were
// begun, so that it never waits for a thread that is not there.
struct Work {
  Problem problem;
  int64_t width, num_panels;
  std::atomic<int64_t> next{0}, done{0};

  void Run() {
    for (int64_t i = next++; i < num_panels; i = next++) {
      MultiplyPanel(problem, i * width, std::min((i + 1) * width, problem.n));
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

ffi::Error SkinnyMatmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> layer,
                        ffi::RemainingArgs matrices, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0];
  const int64_t last = static_cast<int64_t>(matrices.size()) - 1;
  const int64_t which = std::clamp<int64_t>(layer.typed_data()[0], 0, last);
  auto w = matrices.get<ffi::Buffer<ffi::F32>>(which);
  if (w.has_error()) return w.error();
  auto work = std::make_shared<Work>();
  const int64_t k = w->dimensions()[0], n = w->dimensions()[1];
  work->problem = {x.typed_data(), w->typed_data(), y->typed_data(), rows, k, n};
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t widest = std::max(kSums / std::max(rows, kGroup), kLanes);
  const int64_t wanted = threads * CeilDiv(CeilDiv(n, threads), widest);  // as many for each
  work->width = CeilDiv(CeilDiv(n, wanted), kLanes) * kLanes;
  work->num_panels = CeilDiv(n, work->width);
  const int64_t helpers = std::min(threads, work->num_panels) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->num_panels) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(decodax_skinny_matmul, SkinnyMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());
