"""Builds the solver's inner loops, once per instruction set; all else about the package stands in pyproject.toml.

The libraries are plain C++ that `moepress.compress.gptq.native` opens by itself: no Python headers are needed, and
one build serves every Python. Each is optional: without a compiler, or with one that does not know an instruction set,
the installation goes on, and moepress works in torch alone there.
"""

import platform
from dataclasses import dataclass

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = "compress/gptq/loops.cpp"
COMMON = {
    "msvc": ["/O2", "/std:c++17", "/fp:precise"],
    "other": ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"],
}


@dataclass(frozen=True)
class Build:
    """A set of instructions and what makes each compiler use it."""

    name: str
    msvc: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    only_x86: bool = True


# NEON is part of every 64-bit Arm processor, so `base` has it there.
BUILDS = (
    Build(name="base", only_x86=False),
    Build(name="avx2", msvc=("/arch:AVX2",), other=("-mavx2", "-mfma")),
    Build(
        name="avx512",
        msvc=("/arch:AVX512",),
        other=("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
    ),
)


class BuildLoops(build_ext):
    """`build_ext` for libraries that are no Python modules."""

    def build_extension(self, ext: Extension) -> None:
        """With the flags of this compiler."""
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "other"
        build = next(build for build in BUILDS if ext.name.endswith(f"_{build.name}"))
        ext.extra_compile_args = [*COMMON[kind], *getattr(build, kind)]
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        """A name that Python, and what looks for modules in folders, does not take for a module."""
        return fullname.replace(".", "/") + ".native"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: the source says itself what it exports, and there is no PyInit function."""
        return ext.export_symbols


def extensions() -> list[Extension]:
    """Those that this kind of processor can have."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [
        Extension(
            f"moepress.compress.gptq._loops_{build.name}",
            [SOURCE],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
        for build in BUILDS
        if x86 or not build.only_x86
    ]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLoops},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
