"""Builds the two import packages and, where a C++17 compiler is present, the CPU kernels.

The extension binds raw buffers through pybind11 and includes no torch header, so neither torch nor a GPU
toolkit is needed to build it and one build serves every torch version. Without a compiler the install still
succeeds: the operators then run their PyTorch reference (`python -m fastrcnn.doctor` says which is in use).

    FASTRCNN_BUILD_EXT=0   never build the extension
    FASTRCNN_BUILD_EXT=1   fail the install if the extension cannot be built
"""

import os
import re
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

# The Python module first: it takes longest.
SOURCES = [str(path) for path in Path("kernels/csrc").glob("*.cpp")]
SOURCES.sort(key=lambda path: (not path.endswith("module.cpp"), path))
POLICY = os.environ.get("FASTRCNN_BUILD_EXT", "auto")

if sys.platform == "win32":
    COMPILE_ARGS, LINK_ARGS = ["/O2", "/std:c++17", "/openmp"], []
elif sys.platform == "darwin":
    # Apple's clang ships without OpenMP: the kernels then run on one thread.
    COMPILE_ARGS, LINK_ARGS = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=off"], []
else:
    # Contraction is off so that a box compared against a threshold rounds alike in every back-end.
    COMPILE_ARGS = ["-O3", "-g0", "-std=c++17", "-fopenmp", "-fno-math-errno", "-ffp-contract=off"]
    COMPILE_ARGS += ["-fvisibility=hidden"]
    LINK_ARGS = ["-fopenmp"]


HEADERS = sorted(str(path) for path in Path("kernels/csrc").glob("*.h"))


def headers_of(source, found):
    """The headers of ours that a source file includes, by name or through a macro, those of the headers too."""
    for name in re.findall(r'^#(?:include|define \w+) "(.+\.h)"', Path(source).read_text(), re.MULTILINE):
        header = Path(source).with_name(name)
        if header not in found:
            found.add(header)
            headers_of(header, found)
    return found


def out_of_date(obj, source):
    """Whether an object file must be compiled again: its source, a header it includes or this file is newer."""
    if not os.path.exists(obj):
        return True
    inputs = (source, *headers_of(source, set()), "setup.py")
    return any(os.path.getmtime(path) > os.path.getmtime(obj) for path in inputs)


class OptionalBuildExt(build_ext):
    """Build the extension; when that fails, say what will be used instead and go on."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            self._give_up(error)

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            self._give_up(error)

    def copy_extensions_to_source(self):
        # An optional extension that was not built has no file to copy.
        self.extensions = [e for e in self.extensions if os.path.exists(self.get_ext_fullpath_built(e))]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext):
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def _give_up(self, error):
        if POLICY == "1":
            raise error
        print(
            "fastrcnn: the C++ kernels were not built "
            f"({type(error).__name__}: {error}).\n"
            "fastrcnn: the operators will use their PyTorch reference on the CPU. To build the kernels, install a "
            "C++17 compiler (Debian: apt-get install g++) and install fastrcnn again.",
            file=sys.stderr,
        )


def extensions():
    if POLICY == "0":
        print("fastrcnn: FASTRCNN_BUILD_EXT=0, the operators will use their PyTorch reference on the CPU.")
        return []
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    # One compiler a processor, and only for the files that changed.
    ParallelCompile("FASTRCNN_BUILD_JOBS", needs_recompile=out_of_date).install()
    return [
        setuptools.Extension(
            "fastrcnn_kernels._C",
            SOURCES,
            include_dirs=[pybind11.get_include()],
            depends=HEADERS,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            language="c++",
        )
    ]


setuptools.setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
