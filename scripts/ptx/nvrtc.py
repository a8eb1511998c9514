"""Compiles one .cu file to PTX with NVRTC: nvrtc.py LIBNVRTC SOURCE TARGET ARCHITECTURE

NVRTC and not nvcc, because the compiler packages of CUDA 12 for pip hold no nvcc. The kernels include nothing but the
headers beside them, so no CUDA header is needed either.
"""

import ctypes
import pathlib
import sys

OPTIONS = [
    "--std=c++17",
    # one rounding per operation, subnormals, IEEE division: a kernel equals its host twin byte for byte
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
]


def compile_to_ptx(library: str, source: pathlib.Path, architecture: str) -> bytes:
    nvrtc = ctypes.CDLL(library)
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def must(code: int, what: str) -> None:
        if code != 0:
            sys.exit(f"{source}: {what}: {nvrtc.nvrtcGetErrorString(code).decode()}")

    options = [f"--gpu-architecture={architecture}", f"--include-path={source.parent}", *OPTIONS]
    arguments = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    # the name ends up in messages only
    must(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
        ),
        "creating a program",
    )
    code = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    must(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "asking for the log")
    log = ctypes.create_string_buffer(size.value)
    must(nvrtc.nvrtcGetProgramLog(program, log), "reading the log")
    if log.value.strip():
        print(log.value.decode(), file=sys.stderr)
    must(code, "compiling")
    if log.value.strip():
        sys.exit(f"{source}: warnings count as errors")
    must(nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size)), "asking for the PTX")
    ptx = ctypes.create_string_buffer(size.value)
    must(nvrtc.nvrtcGetPTX(program, ptx), "reading the PTX")
    return ptx.value.rstrip(b"\n") + b"\n"


if __name__ == "__main__":
    library, source, target, architecture = sys.argv[1:]
    pathlib.Path(target).write_bytes(compile_to_ptx(library, pathlib.Path(source), architecture))
