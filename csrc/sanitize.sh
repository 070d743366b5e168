#!/bin/sh
# Runs tests of the CPU library built with AddressSanitizer and UndefinedBehaviorSanitizer.
#   csrc/sanitize.sh [pytest arguments]      uses PYTHON and CXX from the environment
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$PWD/build/sanitize
$python csrc/build.py cpu "$out" --sanitize
[ $# -gt 0 ] || set -- tests/wanda_kernels/test_native_selection.py tests/wanda_kernels/test_native_sums.py -k "not random"
# Python is not built with ASan, so ASan's runtime must be loaded first. Without libstdc++, ASan does not see exceptions.
# Leak detection is off: it reports Python's and torch's leaks. The library frees its memory in destructors.
export LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export WANDA_KERNELS_NATIVE_DIR="$out" PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec $python -m pytest -q -p no:cacheprovider "$@"
