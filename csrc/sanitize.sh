#!/bin/sh
# The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer, through its tests.
#   csrc/sanitize.sh [pytest arguments]      PYTHON and CXX as in the environment
set -e
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=$PWD/build/sanitize
$python csrc/build.py cpu "$out" --sanitize
[ $# -gt 0 ] || set -- tests/wanda_kernels/test_native_selection.py tests/wanda_kernels/test_native_sums.py -k "not random"
# Python itself is not built for ASan: its runtime must come first. libstdc++ beside it, or ASan cannot see throws.
# Leaks are Python's and torch's; what the library allocates, it frees in destructors.
export LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so):$(${CXX:-c++} -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export WANDA_KERNELS_NATIVE_DIR="$out" PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
exec $python -m pytest -q -p no:cacheprovider "$@"
