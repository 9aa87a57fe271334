"""Compiles draw.cpp against the installed PyTorch: python scripts/cpp/build.py draw"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def command(program: str, optimize: str = "-O2") -> list[str]:
    """Return the compiler's command line for the executable ``program``."""
    import torch
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch.utils.cpp_extension import include_paths

    libraries = Path(torch.__file__).parent / "lib"
    flags = ["-std=c++20", optimize, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    includes = [word for path in include_paths() for word in ("-isystem", path)]
    link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    return [get_cpp_compiler(), *flags, *includes, str(Path(__file__).parent / "draw.cpp"), "-o", program, *link]


if __name__ == "__main__":
    from minidiff.errors import ConfigError
    from minidiff.fast.compile import check_compiler

    try:
        check_compiler()
    except ConfigError as e:
        sys.exit(f"build: {e}")
    sys.exit(subprocess.run(command(sys.argv[1] if len(sys.argv) > 1 else "draw")).returncode)
