// What a check says when it fails, without a string stream: where the compiler links libstdc++ into the library (a
// machine whose linker finds no libstdc++.so), the process holds two of them, and a stream loses its numbers or crashes.
// So STD_TORCH_CHECK, which has one, is not for us.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace wanda {

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }

// Throws what Python sees as a RuntimeError, its message the parts in a row.
template <typename... Parts>
inline void require(bool holds, Parts... parts) {
  if (!holds) throw std::runtime_error((text_of(parts) + ...));
}

}  // namespace wanda
