// The part of the Metal Shading Language that the kernels use, for g++.
//
// A thread of the kernel is a fiber of `runtime.cpp`. What one thread needs of the others (barriers, SIMD functions) goes
// through the functions declared in `namespace emulator`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

// Not <cmath>: it would take half of the time that a kernel takes to compile.
#ifndef INFINITY
#define INFINITY __builtin_inff()
#endif

#define device
#define constant
#define threadgroup
#define thread
#define METAL_FUNC inline

using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;

struct uint2 {
  uint x, y;
};
struct uint3 {
  uint x, y, z;
};

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

namespace emulator {

// What the lanes of a SIMD group posted at one SIMD function; `present` lanes from 0 on exist.
struct Posts {
  const uint64_t* values;
  int lane;
  int present;
};

Posts exchange(const char* function, int line, uint64_t value, uint64_t agreed);
void wait_for_threadgroup(mem_flags flags, int line);
void wait_for_simdgroup(mem_flags flags, int line);
void* shared(int id, const char* name, std::size_t bytes, std::size_t item_bytes);

uint3 position_in_threadgroup();
uint3 position_in_grid();
uint3 group_position();
uint3 group_size();
uint3 grid_size();
uint3 num_groups();
uint index_in_threadgroup();
uint simdgroup_index();
uint lane_index();
uint num_simdgroups();

float from_bfloat(uint16_t bits);
float from_half(uint16_t bits);
uint16_t to_bfloat(float value);
uint16_t to_half(float value);

// A 16-bit float: every operation is computed in float and rounded to nearest even. bfloat has to be made from a float
// explicitly, half need not be, as in Metal.
struct Bfloat {
  static float widen(uint16_t bits) { return from_bfloat(bits); }
  static uint16_t round(float value) { return to_bfloat(value); }
};
struct Half {
  static float widen(uint16_t bits) { return from_half(bits); }
  static uint16_t round(float value) { return to_half(value); }
};

template <typename Format>
struct Narrow {
  static constexpr bool is_implicit = std::is_same_v<Format, Half>;
  uint16_t bits;

  Narrow() = default;
  template <typename U, std::enable_if_t<std::is_floating_point_v<U> && is_implicit, int> = 0>
  Narrow(U value) : bits(Format::round(float(value))) {}
  template <typename U, std::enable_if_t<std::is_floating_point_v<U> && !is_implicit, int> = 0>
  explicit Narrow(U value) : bits(Format::round(float(value))) {}
  template <typename U, std::enable_if_t<std::is_integral_v<U>, long> = 0>
  Narrow(U value) : bits(Format::round(float(value))) {}
  template <typename Other, std::enable_if_t<!std::is_same_v<Other, Format>, int> = 0>
  explicit Narrow(Narrow<Other> other) : bits(Format::round(float(other))) {}

  operator float() const { return Format::widen(bits); }
  Narrow operator-() const { return Narrow(-float(*this)); }
  Narrow& operator+=(Narrow other) { return *this = *this + other; }
  Narrow& operator-=(Narrow other) { return *this = *this - other; }
  Narrow& operator*=(Narrow other) { return *this = *this * other; }
  Narrow& operator/=(Narrow other) { return *this = *this / other; }
};

// Two of a kind, or one and a whole number, give the kind; one and a float give a float; two kinds do not mix.
#define EMULATOR_OPERATOR(op)                                                                                   \
  template <typename F>                                                                                         \
  Narrow<F> operator op(Narrow<F> a, Narrow<F> b) {                                                             \
    return Narrow<F>(float(a) op float(b));                                                                     \
  }                                                                                                             \
  template <typename F, typename U, std::enable_if_t<std::is_arithmetic_v<U>, int> = 0>                         \
  auto operator op(Narrow<F> a, U b) {                                                                          \
    using Result = std::conditional_t<std::is_integral_v<U>, Narrow<F>, float>;                                 \
    return Result(float(a) op float(b));                                                                        \
  }                                                                                                             \
  template <typename F, typename U, std::enable_if_t<std::is_arithmetic_v<U>, int> = 0>                         \
  auto operator op(U a, Narrow<F> b) {                                                                          \
    using Result = std::conditional_t<std::is_integral_v<U>, Narrow<F>, float>;                                 \
    return Result(float(a) op float(b));                                                                        \
  }
EMULATOR_OPERATOR(+)
EMULATOR_OPERATOR(-)
EMULATOR_OPERATOR(*)
EMULATOR_OPERATOR(/)
#undef EMULATOR_OPERATOR

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t packed = 0;
  __builtin_memcpy(&packed, &value, sizeof(T));
  return packed;
}

template <typename T>
T unpack(uint64_t packed) {
  T value;
  __builtin_memcpy(&value, &packed, sizeof(T));
  return value;
}

// Pairs first, as a tree: the order of the hardware is not known, and a sum may not depend on it beyond rounding.
template <typename T, typename Join>
T reduce(const char* function, int line, T value, Join join) {
  Posts posts = exchange(function, line, pack(value), 0);
  T values[32];
  for (int i = 0; i < posts.present; i++) values[i] = unpack<T>(posts.values[i]);
  for (int count = posts.present; count > 1; count = (count + 1) / 2)
    for (int i = 0; i < count / 2; i++) values[i] = join(values[i], values[count - 1 - i]);
  return values[0];
}

template <typename T>
T take(const char* function, int line, T value, int from, bool is_uniform) {
  Posts posts = exchange(function, line, pack(value), is_uniform ? uint64_t(from) : 0);
  return unpack<T>(posts.values[from]);
}

int checked_lane(const char* function, int line, int lane);

}  // namespace emulator

using bfloat = emulator::Narrow<emulator::Bfloat>;
using half = emulator::Narrow<emulator::Half>;
using bfloat16_t = bfloat;
using float16_t = half;

namespace metal {

using ::mem_flags;

#define EMULATOR_FUNCTION(name, expression)                                                  \
  inline float name(float x) { return expression; }                                          \
  template <typename F>                                                                      \
  emulator::Narrow<F> name(emulator::Narrow<F> value) {                                      \
    return emulator::Narrow<F>(name(float(value)));                                          \
  }
#define EMULATOR_FUNCTIONS                        \
  EMULATOR_FUNCTION(exp, __builtin_expf(x))               \
  EMULATOR_FUNCTION(exp2, __builtin_exp2f(x))             \
  EMULATOR_FUNCTION(log, __builtin_logf(x))               \
  EMULATOR_FUNCTION(cos, __builtin_cosf(x))               \
  EMULATOR_FUNCTION(sin, __builtin_sinf(x))               \
  EMULATOR_FUNCTION(sqrt, __builtin_sqrtf(x))             \
  EMULATOR_FUNCTION(rsqrt, 1.0f / __builtin_sqrtf(x))
EMULATOR_FUNCTIONS
EMULATOR_FUNCTION(abs, __builtin_fabsf(x))
namespace precise {
EMULATOR_FUNCTIONS
}
namespace fast {  // as precise as the others here: what Apple's are is not known
EMULATOR_FUNCTIONS
}
#undef EMULATOR_FUNCTIONS
#undef EMULATOR_FUNCTION

inline bool isnan(float x) { return x != x; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
T simd_sum(T x, int line = __builtin_LINE()) {
  return emulator::reduce("simd_sum", line, x, [](T a, T b) { return T(a + b); });
}
template <typename T>
T simd_max(T x, int line = __builtin_LINE()) {
  return emulator::reduce("simd_max", line, x, [](T a, T b) { return a < b ? b : a; });
}
template <typename T>
T simd_min(T x, int line = __builtin_LINE()) {
  return emulator::reduce("simd_min", line, x, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T simd_broadcast(T x, ushort lane, int line = __builtin_LINE()) {
  return emulator::take("simd_broadcast", line, x, emulator::checked_lane("simd_broadcast", line, lane), true);
}
template <typename T>
T simd_shuffle(T x, ushort lane, int line = __builtin_LINE()) {
  return emulator::take("simd_shuffle", line, x, emulator::checked_lane("simd_shuffle", line, lane), false);
}
template <typename T>
T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  int from = emulator::checked_lane("simd_shuffle_xor", line, int(emulator::lane_index()) ^ mask);
  return emulator::take("simd_shuffle_xor", line, x, from, false);
}

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator::wait_for_threadgroup(flags, line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  emulator::wait_for_simdgroup(flags, line);
}

}  // namespace metal

using namespace metal;
