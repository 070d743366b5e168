"""Builds the two native libraries with the machine's compilers, for setup.py, sanitize.sh and tests.

torch is found, never imported.

    python csrc/build.py cpu OUT_DIR [--sanitize]
    python csrc/build.py cuda OUT_DIR [--report]     registers, stack and spills of every kernel
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
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # 2.10: what later headers must not go beyond

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The bits must equal the reference's: no contraction to FMA. Nobody reads errno or traps. GCC's own AVX-512
# headers trip maybe-uninitialized.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized"]
# A file's instructions are what launch*.cpp asks the machine for before it calls the file, and no more.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
WIDEST = {
    "attention_avx512": ["-mavx512bf16"],
    "sparse_linear_avx512": ["-mavx512bf16", "-mavx512vbmi2"],
    "token_product_avx512": ["-mavx512bf16"],
}
WITH_AVX2 = ("attention_avx2", "dense_linear_avx2", "sparse_linear_avx2", "token_product_avx2")
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
CUDA_ARCHITECTURES = "80 89 90"  # unless WANDA_FAST_CUDA_ARCHITECTURES names others
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-fmad=false"]
NVCC_FLAGS += ["-DWANDA_CUDA", "-DUSE_CUDA"]  # ours, and the one that torch's headers ask for

Step = tuple[Path, list[Path], list[str]]  # output, inputs, command


class BuildError(RuntimeError):
    """What is missing, in one sentence."""


def why_not(backend: str) -> str:
    """Why the library cannot be built here; empty where it can."""
    try:
        _compiler(backend)
        _torch(backend)
    except BuildError as error:
        return str(error)
    return ""


def build(backend: str, out_dir: Path, sanitize: bool = False, report: bool = False) -> Path:
    """Compile and link `backend` in out_dir, objects beside the library. Returns the library."""
    out_dir.mkdir(parents=True, exist_ok=True)
    library = out_dir.resolve() / LIBRARIES[backend]
    steps = _cpu_steps(library, sanitize) if backend == "cpu" else _cuda_steps(library, report)
    _run(steps, out_dir / f"{backend}.ninja")
    return library


def _cpu_steps(library: Path, sanitize: bool) -> list[Step]:
    """Every object, then the library."""
    compiler, torch = _compiler("cpu"), _torch("cpu")
    extra = SANITIZE_FLAGS if sanitize else []
    of_isa = {"kernels_avx512": AVX512_FLAGS, "kernels_avx2": AVX2_FLAGS}
    flags = {
        **dict.fromkeys(("ops", "cpu_ops"), [STABLE_ABI, "-isystem", str(torch / "include")]),
        **dict.fromkeys(("launch", "launch_forward", "launch_product"), []),
        **{f"kernels_{isa}": KERNEL_FLAGS for isa in ("avx512", "avx2", "portable")},
        **dict.fromkeys(WITH_AVX2, []),
        **dict.fromkeys(WIDEST, ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]),  # GCC's own headers
    }
    if platform.machine() in ("x86_64", "AMD64"):
        of_isa |= dict.fromkeys(WITH_AVX2, AVX2_FLAGS)
        for name, wider in WIDEST.items():
            of_isa[name] = [*AVX512_FLAGS, *(flag for flag in wider if _knows(compiler, flag))]
        flags = {name: [*each, *of_isa.get(name, [])] for name, each in flags.items()}
    steps = []
    for name, each in flags.items():
        source = (CSRC if name.endswith("ops") else CSRC / "cpu") / f"{name}.cpp"
        target = library.with_name(f"cpu_{name}.o")
        command = [*compiler, *CXX_FLAGS, *each, *extra, "-c", str(source), "-o", str(target)]
        steps.append((target, [source], command))
    objects = [target for target, _, _ in steps]
    # --no-as-needed: the stable ABI's functions are found through these names alone.
    link = [*compiler, "-shared", *extra, *map(str, objects), "-o", str(library), "-Wl,--no-as-needed"]
    return [*steps, (library, objects, [*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"])]


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
    # A CPU torch has no libtorch_cuda; the library then links, but cannot be loaded.
    for name in ("torch_cuda", "torch_cpu", "torch"):
        if (torch / "lib" / f"lib{name}.so").exists():
            link += [f"-L{torch / 'lib'}", f"-l{name}"]
    return [*steps, (library, objects, link)]


def _cuda_targets() -> list[str]:
    """Machine code for each architecture, and PTX of the last for what comes later."""
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
    """Folder of the torch package, of a version that has the stable ABI and, for cuda, of nvcc's CUDA."""
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
    """torch's CUDA and nvcc's must share a major version; WANDA_FAST_CUDA=1 does without torch's."""
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
