// The optimizers' kernels, once. Included by kernels/all-inl.h; see there and core/state_code.h.
//
// An element's arithmetic, in fp32 with every operation rounded, whatever the instruction set:
//   g = grad * grad_factor (+ coupled_decay * param)
//   AdamW   m = m * beta1 + g * rest1;  v = v * beta2 + (g * rest2) * g
//           param = param * keep - (m * step_size) / (sqrt(v) * root_correction + eps)
//   Lion    param = param * keep - lr * sign(m * beta1 + g * rest1);  m = m * beta2 + g * rest2
// 8-bit states: m is the value of its code, and beta1 (beta2) is first multiplied by the block's absmax.
#include "cpu/isa/vec.h"
#include "cpu/kernels/optim.h"

namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE {
namespace {

constexpr int kStateStep = 4 * kLanes;  // codes that store_bytes writes
static_assert(kStateBlock % kStateStep == 0);

// Asks for the cache lines of `count` elements that lie kAhead bytes beyond p, whatever is there. The hardware's own
// prefetchers stop at every page of 4 KiB, and a sweep enters a new one in each of its streams all the time.
template <int kAhead, typename T>
inline void fetch_ahead(const T* p, int64_t count) {
  for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + byte);
  }
}

constexpr int kStepAhead = 1024;  // bytes; measured, as is the next
constexpr int kNormAhead = 2048;

struct AdamwConstants {
  explicit AdamwConstants(const AdamwFactors& by)
      : factor(all(by.grad_factor)),
        keep(all(by.keep)),
        coupled(all(by.coupled_decay)),
        beta1(all(by.beta1)),
        rest1(all(by.rest1)),
        beta2(all(by.beta2)),
        rest2(all(by.rest2)),
        correction(all(by.root_correction)),
        eps(all(by.eps)),
        step(all(by.step_size)) {}

  template <bool kCoupled>
  Floats gradient(Floats g, Floats p) const {
    g = multiply(g, factor);
    return kCoupled ? add(g, multiply(p, coupled)) : g;
  }
  Floats first(Floats m, Floats decay, Floats g) const { return add(multiply(m, decay), multiply(g, rest1)); }
  Floats second(Floats v, Floats decay, Floats g) const {
    return add(multiply(v, decay), multiply(multiply(g, rest2), g));
  }
  Floats param(Floats p, Floats m, Floats root) const {
    return subtract(multiply(p, keep), divide(multiply(m, step), add(multiply(root, correction), eps)));
  }

  Floats factor, keep, coupled, beta1, rest1, beta2, rest2, correction, eps, step;
};

template <typename T, bool kCoupled>
inline void adamw_vector(const AdamwConstants& by, T* p, const T* g, float* m, float* v) {
  const Floats param = load(p);
  const Floats grad = by.gradient<kCoupled>(load(g), param);
  const Floats first = by.first(load(m), by.beta1, grad);
  const Floats second = by.second(load(v), by.beta2, grad);
  store(m, first);
  store(v, second);
  store_as(p, by.param(param, first, square_root(second)));
}

template <typename T, bool kCoupled>
void adamw_elements(const AdamwJob& job, int64_t begin, int64_t end) {
  const AdamwConstants by(job.by);
  T* p = static_cast<T*>(job.param);
  const T* g = static_cast<const T*>(job.grad);
  auto* m = static_cast<float*>(job.exp_avg);
  auto* v = static_cast<float*>(job.exp_avg_sq);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    fetch_ahead<kStepAhead>(p + i, kLanes);
    fetch_ahead<kStepAhead>(g + i, kLanes);
    fetch_ahead<kStepAhead>(m + i, kLanes);
    fetch_ahead<kStepAhead>(v + i, kLanes);
    adamw_vector<T, kCoupled>(by, p + i, g + i, m + i, v + i);
  }
  if (i < end) {  // through a padded vector
    const auto rest = static_cast<size_t>(end - i);
    T p_end[kLanes] = {};
    T g_end[kLanes] = {};
    float m_end[kLanes] = {};
    float v_end[kLanes] = {};
    std::memcpy(p_end, p + i, rest * sizeof(T));
    std::memcpy(g_end, g + i, rest * sizeof(T));
    std::memcpy(m_end, m + i, rest * sizeof(float));
    std::memcpy(v_end, v + i, rest * sizeof(float));
    adamw_vector<T, kCoupled>(by, p_end, g_end, m_end, v_end);
    std::memcpy(p + i, p_end, rest * sizeof(T));
    std::memcpy(m + i, m_end, rest * sizeof(float));
    std::memcpy(v + i, v_end, rest * sizeof(float));
  }
}

template <typename Code>
inline void encode_state(const StateEncoder& encoder, const BlockScale& scale, const float* values, Code* codes) {
  if (!scale.encodes) {
    std::memset(codes, 0, size_t{kStateStep});
    return;
  }
  const auto code = [&](int u) {
    const Floats x = normalize(load(values + u * kLanes), scale.normalizer);
    return Code(-1) < Code(0) ? encoder.of_signed(x) : encoder.of_unsigned(x);
  };
  store_bytes(codes, code(0), code(1), code(2), code(3));
}

// One whole block. Square roots in the first pass, divisions in the second: they share one slow unit, which the rest of
// each pass then hides.
template <typename T, bool kCoupled>
void adamw_block(const AdamwJob& job, const AdamwConstants& by, T* p, const T* g, int8_t* m_codes, uint8_t* v_codes,
                 float* m_absmax, float* v_absmax) {
  alignas(64) float m[kStateBlock];
  alignas(64) float v[kStateBlock];
  alignas(64) float root[kStateBlock];
  const StateDecoder decode_m(kSignedState);
  const StateDecoder decode_v(kUnsignedState);
  const Floats m_decay = all(job.by.beta1 * *m_absmax);
  const Floats v_decay = all(job.by.beta2 * *v_absmax);
  MagnitudeMax m_highest;
  MagnitudeMax v_highest;
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const Floats grad = by.gradient<kCoupled>(load(g + i), kCoupled ? load(p + i) : zero());
    const Floats first = by.first(decode_m(m_codes + i), m_decay, grad);
    const Floats second = by.second(decode_v(v_codes + i), v_decay, grad);
    m_highest.update(first);
    v_highest.update(second);
    store(m + i, first);
    store(v + i, second);
    store(root + i, square_root(second));
  }
  const BlockScale m_scale(m_highest.reduce());
  const BlockScale v_scale(v_highest.reduce());
  *m_absmax = m_scale.absmax;
  *v_absmax = v_scale.absmax;
  const StateEncoder encode_m(kSignedState);
  const StateEncoder encode_v(kUnsignedState);
  for (int64_t i = 0; i < kStateBlock; i += kStateStep) {
    for (int64_t j = i; j < i + kStateStep; j += kLanes) {
      store_as(p + j, by.param(load(p + j), load(m + j), load(root + j)));
    }
    encode_state(encode_m, m_scale, m + i, m_codes + i);
    encode_state(encode_v, v_scale, v + i, v_codes + i);
  }
}

template <typename T, bool kCoupled>
void adamw_coded_blocks(const AdamwJob& job, int64_t first, int64_t last) {
  const AdamwConstants by(job.by);
  T* p = static_cast<T*>(job.param);
  const T* g = static_cast<const T*>(job.grad);
  auto* m = static_cast<int8_t*>(job.exp_avg);
  auto* v = static_cast<uint8_t*>(job.exp_avg_sq);
  for (int64_t block = first; block < last; ++block) {
    const int64_t at = block * kStateBlock;
    float* m_absmax = job.exp_avg_absmax + block;
    float* v_absmax = job.exp_avg_sq_absmax + block;
    if (at + kStateBlock <= job.numel) {
      adamw_block<T, kCoupled>(job, by, p + at, g + at, m + at, v + at, m_absmax, v_absmax);
      continue;
    }
    const auto rest = static_cast<size_t>(job.numel - at);
    T p_end[kStateBlock] = {};
    T g_end[kStateBlock] = {};
    int8_t m_end[kStateBlock] = {};
    uint8_t v_end[kStateBlock] = {};
    std::memcpy(p_end, p + at, rest * sizeof(T));
    std::memcpy(g_end, g + at, rest * sizeof(T));
    std::memcpy(m_end, m + at, rest);
    std::memcpy(v_end, v + at, rest);
    adamw_block<T, kCoupled>(job, by, p_end, g_end, m_end, v_end, m_absmax, v_absmax);
    std::memcpy(p + at, p_end, rest * sizeof(T));
    std::memcpy(m + at, m_end, rest);
    std::memcpy(v + at, v_end, rest);
  }
}

template <typename T>
void adamw_blocks(const AdamwJob& job, int64_t first, int64_t last) {
  const bool coupled = job.by.coupled_decay != 0.0f;
  if (job.exp_avg_absmax != nullptr) {
    (coupled ? adamw_coded_blocks<T, true> : adamw_coded_blocks<T, false>)(job, first, last);
    return;
  }
  const int64_t end = last * kStateBlock < job.numel ? last * kStateBlock : job.numel;
  (coupled ? adamw_elements<T, true> : adamw_elements<T, false>)(job, first * kStateBlock, end);
}

struct LionConstants {
  explicit LionConstants(const LionFactors& by)
      : factor(all(by.grad_factor)), keep(all(by.keep)), lr(all(by.lr)), rest1(all(by.rest1)), rest2(all(by.rest2)) {}

  Floats param(Floats p, Floats m, Floats decay1, Floats g) const {
    const Floats direction = add(multiply(m, decay1), multiply(g, rest1));
    return subtract(multiply(p, keep), signed_rate(lr, direction));
  }
  Floats average(Floats m, Floats decay2, Floats g) const { return add(multiply(m, decay2), multiply(g, rest2)); }

  Floats factor, keep, lr, rest1, rest2;
};

template <typename T>
inline void lion_vector(const LionConstants& by, Floats beta1, Floats beta2, T* p, const T* g, float* m) {
  const Floats grad = multiply(load(g), by.factor);
  const Floats before = load(m);
  store_as(p, by.param(load(p), before, beta1, grad));
  store(m, by.average(before, beta2, grad));
}

template <typename T>
void lion_elements(const LionJob& job, int64_t begin, int64_t end) {
  const LionConstants by(job.by);
  const Floats beta1 = all(job.by.beta1);
  const Floats beta2 = all(job.by.beta2);
  T* p = static_cast<T*>(job.param);
  const T* g = static_cast<const T*>(job.grad);
  auto* m = static_cast<float*>(job.exp_avg);
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    fetch_ahead<kStepAhead>(p + i, kLanes);
    fetch_ahead<kStepAhead>(g + i, kLanes);
    fetch_ahead<kStepAhead>(m + i, kLanes);
    lion_vector(by, beta1, beta2, p + i, g + i, m + i);
  }
  if (i < end) {
    const auto rest = static_cast<size_t>(end - i);
    T p_end[kLanes] = {};
    T g_end[kLanes] = {};
    float m_end[kLanes] = {};
    std::memcpy(p_end, p + i, rest * sizeof(T));
    std::memcpy(g_end, g + i, rest * sizeof(T));
    std::memcpy(m_end, m + i, rest * sizeof(float));
    lion_vector(by, beta1, beta2, p_end, g_end, m_end);
    std::memcpy(p + i, p_end, rest * sizeof(T));
    std::memcpy(m + i, m_end, rest * sizeof(float));
  }
}

template <typename T>
void lion_block(const LionJob& job, const LionConstants& by, T* p, const T* g, int8_t* codes, float* absmax) {
  alignas(64) float m[kStateBlock];
  const StateDecoder decode(kSignedState);
  const Floats decay1 = all(job.by.beta1 * *absmax);
  const Floats decay2 = all(job.by.beta2 * *absmax);
  MagnitudeMax highest;
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const Floats grad = multiply(load(g + i), by.factor);
    const Floats before = decode(codes + i);
    store_as(p + i, by.param(load(p + i), before, decay1, grad));
    const Floats average = by.average(before, decay2, grad);
    highest.update(average);
    store(m + i, average);
  }
  const BlockScale scale(highest.reduce());
  *absmax = scale.absmax;
  const StateEncoder encoder(kSignedState);
  for (int64_t i = 0; i < kStateBlock; i += kStateStep) {
    encode_state(encoder, scale, m + i, codes + i);
  }
}

template <typename T>
void lion_blocks(const LionJob& job, int64_t first, int64_t last) {
  if (job.exp_avg_absmax == nullptr) {
    lion_elements<T>(job, first * kStateBlock, last * kStateBlock < job.numel ? last * kStateBlock : job.numel);
    return;
  }
  const LionConstants by(job.by);
  T* p = static_cast<T*>(job.param);
  const T* g = static_cast<const T*>(job.grad);
  auto* codes = static_cast<int8_t*>(job.exp_avg);
  for (int64_t block = first; block < last; ++block) {
    const int64_t at = block * kStateBlock;
    if (at + kStateBlock <= job.numel) {
      lion_block(job, by, p + at, g + at, codes + at, job.exp_avg_absmax + block);
      continue;
    }
    const auto rest = static_cast<size_t>(job.numel - at);
    T p_end[kStateBlock] = {};
    T g_end[kStateBlock] = {};
    int8_t codes_end[kStateBlock] = {};
    std::memcpy(p_end, p + at, rest * sizeof(T));
    std::memcpy(g_end, g + at, rest * sizeof(T));
    std::memcpy(codes_end, codes + at, rest);
    lion_block(job, by, p_end, g_end, codes_end, job.exp_avg_absmax + block);
    std::memcpy(p + at, p_end, rest * sizeof(T));
    std::memcpy(codes + at, codes_end, rest);
  }
}

// 32 running sums in double, then a halving tree over them.
template <typename T>
double sum_of_squares(const void* values, int64_t count) {
  constexpr int kStep = kNormLanes;
  const T* x = static_cast<const T*>(values);
  alignas(64) float wide[kStep];
  SquareSums sums;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    fetch_ahead<kNormAhead>(x + i, kStep);
    if constexpr (sizeof(T) == sizeof(float)) {
      sums.update(x + i);
    } else {
      for (int j = 0; j < kStep; j += kLanes) {
        store(wide + j, load(x + i + j));
      }
      sums.update(wide);
    }
  }
  if (i < count) {
    for (int j = 0; j < kStep; ++j) {
      wide[j] = i + j < count ? to_float(x[i + j]) : 0.0f;
    }
    sums.update(wide);
  }
  double slot[size_t{kStep}];
  sums.store(slot);
  return sum_by_halves(slot);
}

constexpr OptimKernels kOptimTable = {
    {adamw_blocks<float>, adamw_blocks<Bf16>, adamw_blocks<Fp16>},
    {lion_blocks<float>, lion_blocks<Bf16>, lion_blocks<Fp16>},
    {sum_of_squares<float>, sum_of_squares<Bf16>, sum_of_squares<Fp16>},
};

}  // namespace
}  // namespace qlora_native::cpu::QLORA_NATIVE_ISA_NAMESPACE
