// What exp() is made of, the same numbers on the CPU and on a GPU so that the bytes agree: e^x = 2^n e^r with n the
// integer nearest to x / ln 2, e^r from the polynomial of S. Moshier's Cephes library (expf).
#pragma once

namespace qlora_native {

struct ExpNumbers {
  float lowest = -104.0f;  // outside, e^x rounds to zero or overflows anyway
  float highest = 89.0f;
  float per_ln2 = 1.44269504088896341f;
  float magic = 12582912.0f;        // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  float minus_ln2 = -0.693359375f;  // ln 2 in two parts
  float ln2_too_much = 2.12194440e-4f;
  float terms[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,  // of r^7 to r^2
                    4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

inline constexpr ExpNumbers kExp{};

}  // namespace qlora_native
