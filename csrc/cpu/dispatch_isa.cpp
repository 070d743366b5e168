// Chooses the instruction set of the CPU's kernels.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace wanda::cpu {
namespace {

// Widest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("bmi");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) kernels.push_back(&kAvx512);
  if (avx2) kernels.push_back(&kAvx2);
#endif
  kernels.push_back(&kPortable);
  return kernels;
}

}  // namespace

const Kernels& kernels() {
  static const std::vector<const Kernels*> all = runnable();
  const char* wanted = std::getenv("WANDA_KERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *all.front();
  for (const Kernels* each : all) {
    if (std::strcmp(each->name, wanted) == 0) return *each;
  }
  throw std::runtime_error(std::string("WANDA_KERNELS_CPU_ISA = ") + wanted + " is unknown or cannot run here");
}

}  // namespace wanda::cpu

// For `wanda-fast doctor`: the instruction set in use. Empty if WANDA_KERNELS_CPU_ISA names none that can run.
extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_isa() {
  try {
    return wanda::cpu::kernels().name;
  } catch (const std::exception&) {
    return "";
  }
}

// For `wanda-fast doctor`: all instruction sets that this machine can run, widest first, comma-separated.
extern "C" __attribute__((visibility("default"))) const char* wanda_cpu_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const wanda::cpu::Kernels* each : wanda::cpu::runnable()) {
      if (!joined.empty()) joined += ",";
      joined += each->name;
    }
    return joined;
  }();
  return names.c_str();
}
