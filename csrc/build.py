"""Builds the two native libraries with this machine's compilers. Used by setup.py, sanitize.sh and tests.

The build finds the torch package but does not import it.

    python csrc/build.py cpu OUT_DIR [--sanitize]
    python csrc/build.py cuda OUT_DIR [--report]     print registers, stack and spills of every kernel
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).resolve().parent
LIBRARIES = {"cpu": "libwanda_cpu.so", "cuda": "libwanda_cuda.so"}
TORCH_AT_LEAST = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # later headers then offer what 2.10 has, no more

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The bits must equal the reference's, so products and sums are not contracted to FMA. Kernels read neither
# errno nor trap flags.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# The suffix of a file in csrc/cpu names its instruction set. dispatch_*.cpp test the machine for every
# feature before they call such a file.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# GCC's own AVX-512 headers cause these warnings.
AVX512_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# Features that some files use if the compiler knows them.
OPTIONAL_FLAGS = {
    "attention_avx512": ["-mavx512bf16"],
    "packed_rows_avx512": ["-mavx512vbmi2"],
    "sparse_linear_avx512": ["-mavx512bf16", "-mavx512vbmi2"],
    "token_product_avx512": ["-mavx512bf16"],
}
# At -O3 the instrumented files take three times as long to compile.
SANITIZE_FLAGS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
CUDA_ARCHITECTURES = "80 89 90"  # the default of WANDA_FAST_CUDA_ARCHITECTURES
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-fmad=false"]
NVCC_FLAGS += ["-DWANDA_CUDA", "-DUSE_CUDA"]  # the second is for torch's headers

Step = tuple[Path, list[Path], list[str]]  # output, inputs, command


class BuildError(RuntimeError):
    """The build cannot start; the message says what is missing, in one sentence."""


def why_not(backend: str) -> str:
    """Why the library cannot be built here, or an empty string."""
    try:
        _compiler(backend)
        _torch(backend)
    except BuildError as error:
        return str(error)
    return ""


def build(backend: str, out_dir: Path, sanitize: bool = False, report: bool = False) -> Path:
    """Compile and link `backend`. Objects and library go into `out_dir`. Returns the library's path."""
    out_dir.mkdir(parents=True, exist_ok=True)
    library = out_dir.resolve() / LIBRARIES[backend]
    steps = _cpu_steps(library, sanitize) if backend == "cpu" else _cuda_steps(library, report)
    _run(steps, out_dir / f"{backend}.ninja")
    return library


def _cpu_steps(library: Path, sanitize: bool) -> list[Step]:
    """Every object, then the library."""
    compiler, torch = _compiler("cpu"), _torch("cpu")
    extra = SANITIZE_FLAGS if sanitize else []
    steps = []
    for source in [CSRC / "ops.cpp", CSRC / "cpu_ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
        if source.parent == CSRC:
            flags = [STABLE_ABI, "-isystem", str(torch / "include")]
        else:
            flags = _kernel_flags(source.stem, compiler)
        target = library.with_name(f"cpu_{source.stem}.o")
        command = [*compiler, *CXX_FLAGS, *flags, *extra, "-c", str(source), "-o", str(target)]
        steps.append((target, [source], command))
    objects = [target for target, _, _ in steps]
    # --no-as-needed: the stable ABI's functions are found through these names alone.
    link = [*compiler, "-shared", *extra, *map(str, objects), "-o", str(library), "-Wl,--no-as-needed"]
    return [*steps, (library, objects, [*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"])]


def _kernel_flags(name: str, compiler: list[str]) -> list[str]:
    """What a file of csrc/cpu is compiled with, beside CXX_FLAGS."""
    flags = KERNEL_FLAGS if name.startswith("kernels_") else []
    if platform.machine() not in ("x86_64", "AMD64"):
        return flags
    if name.endswith("_avx2"):
        return [*flags, *AVX2_FLAGS]
    if name.endswith("_avx512"):
        optional = [flag for flag in OPTIONAL_FLAGS.get(name, []) if _knows(compiler, flag)]
        return [*flags, *AVX512_FLAGS, *optional]
    return flags


def _knows(compiler: list[str], flag: str) -> bool:
    command = [*compiler, flag, "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _cuda_steps(library: Path, report: bool) -> list[Step]:
    compiler, torch = [*_compiler("cuda"), *NVCC_FLAGS], _torch("cuda")
    if report:
        compiler += ["-Xptxas", "-v"]
    steps = []
    for source in [CSRC / "ops.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]:
        target = library.with_name(f"cuda_{source.stem}.o")
        flags = [STABLE_ABI, "-I", str(torch / "include"), "-x", "cu"] if source.suffix == ".cpp" else []
        command = [*compiler, *_cuda_targets(), *flags, "-c", str(source), "-o", str(target)]
        steps.append((target, [source], command))
    objects = [target for target, _, _ in steps]
    link = [
        _compiler("cuda")[0],
        "-shared",
        *map(str, objects),
        "-o",
        str(library),
        "-Xlinker",
        "--no-as-needed",
    ]
    # A CPU build of torch has no libtorch_cuda. The library then links, but does not load.
    for name in ("torch_cuda", "torch_cpu", "torch"):
        if (torch / "lib" / f"lib{name}.so").exists():
            link += [f"-L{torch / 'lib'}", f"-l{name}"]
    return [*steps, (library, objects, link)]


def _cuda_targets() -> list[str]:
    """Machine code for each architecture, and PTX of the last one for later GPUs."""
    architectures = os.environ.get("WANDA_FAST_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).split()
    last = architectures[-1]
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in architectures]
    return [*targets, f"-gencode=arch=compute_{last},code=compute_{last}"]


def _run(steps: list[Step], ninja_file: Path) -> None:
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    ninja = shutil.which("ninja", path=os.pathsep.join(places))
    if ninja:
        ninja_file.write_text(_ninja(steps))
        subprocess.run([ninja, "-f", ninja_file.name], cwd=ninja_file.parent, check=True, stdout=sys.stderr)
        return
    for _, _, command in steps:
        subprocess.run(command, check=True)


def _ninja(steps: list[Step]) -> str:
    headers = " ".join(_escape(str(path)) for path in sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh")))
    lines = ["rule run", "  command = $do", "  description = $out"]
    for target, inputs, command in steps:
        quoted = " ".join("'" + each.replace("'", r"'\''").replace("$", "$$") + "'" for each in command)
        sources = " ".join(_escape(str(each)) for each in inputs)
        lines += [f"build {_escape(str(target))}: run {sources} | {headers}", f"  do = {quoted}"]
    return "\n".join(lines) + "\n"


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _compiler(backend: str) -> list[str]:
    if backend == "cuda":
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which(f"{home}/bin/nvcc") if home else shutil.which("nvcc")
        if not nvcc:
            raise BuildError("no nvcc on the PATH or in CUDA_HOME")
        return [nvcc]
    if os.name != "posix":
        raise BuildError("only GCC and Clang on POSIX systems are supported")
    wanted = os.environ.get("CXX")
    for command in [wanted.split()] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler found ({wanted or 'c++, g++, clang++'})")


def _torch(backend: str) -> Path:
    """Folder of the torch package. Raises unless it has the stable ABI and, for cuda, nvcc's CUDA version."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("no torch where the build runs (--no-build-isolation lets it see yours)")
    folder = Path(spec.submodule_search_locations[0])
    about = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '(\d+)\.(\d+)", about)
    if not version or tuple(map(int, version.groups())) < TORCH_AT_LEAST:
        raise BuildError(f"torch is older than {'.'.join(map(str, TORCH_AT_LEAST))}")
    if backend == "cuda":
        _require_same_cuda(re.search(r"^cuda.*= '(\d+)", about, re.MULTILINE))
    return folder


def _require_same_cuda(of_torch: re.Match | None) -> None:
    """torch and nvcc must have one CUDA major version. With WANDA_FAST_CUDA=1 torch may be a CPU build."""
    if of_torch is None:
        if os.environ.get("WANDA_FAST_CUDA") == "1":
            return
        raise BuildError("the installed torch is a CPU build")
    said = subprocess.run([*_compiler("cuda"), "--version"], capture_output=True, text=True, check=True)
    of_nvcc = re.search(r"release (\d+)", said.stdout)
    if not of_nvcc or of_nvcc[1] != of_torch[1]:
        found = of_nvcc[1] if of_nvcc else "unknown"
        raise BuildError(f"torch is built for CUDA {of_torch[1]}, nvcc is {found}")


if __name__ == "__main__":
    backend, folder, *options = sys.argv[1:]
    print(build(backend, Path(folder), "--sanitize" in options, "--report" in options))
