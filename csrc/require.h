// Argument checks that become Python's RuntimeError. STD_TORCH_CHECK formats with a string stream. Where the linker
// finds no libstdc++.so, libstdc++ is linked into the library, the process holds two copies of it, and a stream then
// loses its numbers or crashes. These checks use no stream.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace wanda {

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(int64_t part) { return std::to_string(part); }

// Throws unless `holds`. The message is the parts, joined.
template <typename... Parts>
inline void require(bool holds, Parts... parts) {
  if (!holds) throw std::runtime_error((text_of(parts) + ...));
}

}  // namespace wanda
