"""A fast BLAS for MLX on Linux.

The MLX wheels for Linux carry the reference BLAS, ten to thirty times slower than OpenBLAS in float32. MLX
calls it through ordinary dynamic symbols, and the dynamic linker looks into libraries that were loaded with
RTLD_GLOBAL before it looks into the ones that MLX names itself. So a system BLAS that is loaded globally
BEFORE `mlx.core` serves all of MLX's matrix products, with no change to MLX. This module imports neither MLX
nor NumPy.

The environment variable MLX_TRANSFUSION_BLAS is `off` (load nothing, say nothing) or the path of a library.
"""

import ctypes
import os
import sys
from collections.abc import Iterator

VARIABLE = "MLX_TRANSFUSION_BLAS"
SYMBOL = "cblas_sgemm"

# In the order of trial. Threaded builds under the names that Fedora and openSUSE give them come before the
# plain name, which is the serial build there (on Debian and Arch the plain name is the threaded one). MKL is
# last: it loads further libraries of its own at the first call, which may be missing.
SONAMES = (
    "libopenblasp.so.0",
    "libopenblas_pthreads.so.0",
    "libopenblaso.so.0",
    "libopenblas.so.0",
    "libopenblas.so",
    "libblis.so.4",
    "libblis.so",
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
)

THREAD_FUNCTIONS = (
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("bli_thread_get_num_threads", "bli_thread_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)
"""To ask for the number of threads and to set it: OpenBLAS, BLIS, MKL."""

HINT = (
    "no fast BLAS found, so MLX computes many times slower on this CPU than it could: apt install "
    f"libopenblas0-pthread (or, without root on x86-64, pip install mkl); {VARIABLE}=off hides this line"
)


class _SymbolOwner(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


def use_system_blas() -> None:
    """Load a fast BLAS for MLX, or say in one line on stderr why none serves; the package's import calls it.

    Does nothing except on Linux, when MLX_TRANSFUSION_BLAS is `off`, or when a BLAS is in the global scope
    already (LD_PRELOAD). Thread counts stay as the user set them (OPENBLAS_NUM_THREADS and its kin).
    """
    choice = os.environ.get(VARIABLE, "").strip()
    if not sys.platform.startswith("linux") or choice.lower() == "off" or _global_blas() is not None:
        return
    if "mlx.core" in sys.modules:
        linked = _linked_blas()
        if linked is not None and _is_reference(linked):
            _say("MLX was imported first and keeps its slow BLAS: import mlx_transfusion before mlx")
    elif choice:
        fault = load(choice)
        if fault is not None:
            _say(f"{VARIABLE}={choice} cannot serve ({fault}), so MLX keeps the BLAS that it came with")
    elif find() is None:
        _say(HINT)


def find() -> str | None:
    """Load the first fast BLAS that the system has, globally; return the name it was found under, or None."""
    return next((name for name in _candidates() if load(name) is None), None)


def load(name: str) -> str | None:
    """Load the library `name` (a path, or a name for the dynamic linker) globally.

    Returns None when it serves from now on, and otherwise the reason why it was left alone.
    """
    try:
        # Privately first: what is once in the global scope cannot be taken out again.
        library = ctypes.CDLL(name, mode=ctypes.RTLD_LOCAL)
    except OSError as error:
        return str(error)
    if not hasattr(library, SYMBOL):
        return f"it has no {SYMBOL}"
    if "USE64BITINT" in _openblas_config(library):
        return "it counts with 64-bit integers, MLX with 32-bit ones"
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return None


def blas_in_use() -> str:
    """The BLAS that serves MLX on the CPU: its name, version and file, for people to read."""
    if sys.platform == "darwin":
        return "Accelerate (macOS)"
    if not sys.platform.startswith("linux"):
        return "unknown"
    path = _global_blas() or _linked_blas()
    if path is None:
        return "not known before MLX is loaded"
    if _is_reference(path):
        return f"reference BLAS (slow): {path}"
    return f"{_product(path) or 'BLAS of an unknown make'}: {path}"


def threads() -> int | None:
    """How many threads the BLAS that serves MLX may use; None where it cannot be asked or told."""
    names = _thread_functions()
    return None if names is None else int(getattr(ctypes.CDLL(None), names[0])())


def set_threads(count: int) -> None:
    """Give that BLAS `count` threads, for the whole process; nothing happens where `threads` is None."""
    if names := _thread_functions():
        getattr(ctypes.CDLL(None), names[1])(count)


def _thread_functions() -> tuple[str, str] | None:
    """Names of the C functions in the global scope that get and set the number of threads."""
    if not sys.platform.startswith("linux") or _global_blas() is None:
        return None
    everything = ctypes.CDLL(None)
    return next((pair for pair in THREAD_FUNCTIONS if all(hasattr(everything, name) for name in pair)), None)


def _candidates() -> Iterator[str]:
    """Names to try: the running environment's own (conda, `pip install mkl`) before those of the system."""
    paths = (os.path.join(sys.prefix, "lib", name) for name in SONAMES)
    yield from filter(os.path.exists, paths)
    yield from SONAMES


def _global_blas() -> str | None:
    """File of the BLAS in the process's global scope: the one that serves every library loaded after it."""
    return _owner(ctypes.CDLL(None))


def _linked_blas() -> str | None:
    """File of the BLAS that the loaded MLX brings along, or None while MLX is not loaded."""
    with open("/proc/self/maps", errors="replace") as maps:
        mlx = next((line[line.index("/") :].rstrip("\n") for line in maps if "/libmlx.so" in line), None)
    # The handle's own scope is MLX and the libraries it names, without the global scope.
    return None if mlx is None else _owner(ctypes.CDLL(mlx))


def _owner(library: ctypes.CDLL) -> str | None:
    """File that defines SYMBOL as seen from `library`, with links resolved."""
    if not hasattr(library, SYMBOL):
        return None
    info = _SymbolOwner()
    address = ctypes.cast(getattr(library, SYMBOL), ctypes.c_void_p)
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(info)):
        return None
    return os.path.realpath(os.fsdecode(info.file_name))


def _is_reference(path: str) -> bool:
    """Whether `path` is the netlib library: libblas or libcblas by name, and no fast one in disguise."""
    return os.path.basename(path).startswith(("libblas", "libcblas")) and not _product(path)


def _product(path: str) -> str:
    """Name of the fast BLAS in the file `path`, OpenBLAS with its version; empty for any other library."""
    library = ctypes.CDLL(path)
    config = _openblas_config(library)
    if config:
        return " ".join(config.split()[:2])
    if hasattr(library, "MKL_Get_Version"):
        return "Intel MKL"
    # Debian's builds under the general name libblas.so.3 keep their own symbols hidden; their folder tells.
    place = os.sep.join(path.split(os.sep)[-2:])
    return next((product for product in ("BLIS", "ATLAS") if product.lower() in place), "")


def _openblas_config(library: ctypes.CDLL) -> str:
    """OpenBLAS's account of its build, such as `OpenBLAS 0.3.21 DYNAMIC_ARCH Haswell`; else empty."""
    return _text(library, "openblas_get_config")


def _text(library: ctypes.CDLL, name: str) -> str:
    """What the C function `name`, which takes nothing, returns as a string; empty where there is none."""
    if not hasattr(library, name):
        return ""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return os.fsdecode(function())


def _say(text: str) -> None:
    print(f"mlx-transfusion: {text}", file=sys.stderr)
