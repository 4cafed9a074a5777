"""The package, and the sdist of it that Beam's `--setup_file` ships to workers.

`pip install .` asks for what pyproject.toml lists. The sdist asks for nothing: the worker's image
holds the lock, and resolving again on each worker would be slow and could differ.
"""

import platform
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist

DEPENDENCIES = re.compile(r"^dependencies = \[.*?^\]$", re.MULTILINE | re.DOTALL)


class SdistWithoutDependencies(sdist):
    """An sdist whose pyproject.toml and metadata list no dependency."""

    def run(self) -> None:
        """Build it."""
        self.distribution.install_requires = []
        super().run()

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Lay out the files, with pyproject.toml changed."""
        super().make_release_tree(base_dir, files)
        path = Path(base_dir) / "pyproject.toml"
        text, count = DEPENDENCIES.subn("dependencies = []", path.read_text())
        if count != 1:
            raise ValueError("pyproject.toml: the block `dependencies = [...]` was not found")
        path.unlink()  # it may be a hard link to the one here
        path.write_text(text)


# Optional: without a compiler, or on another kind of CPU, Pillow and TensorFlow do the same more
# slowly.
RESAMPLING = Extension(
    "formats._resampling",
    ["formats/_resampling.c"],
    # Without fused products, which Pillow's wheels do not have and which change last bits.
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-fast-math"],
    py_limited_api=True,
    optional=True,
)
SEPARABLE = [
    Extension(
        f"models.{name}",
        [f"models/{name}.c"],
        depends=["models/_separable.c"],
        extra_compile_args=["-O3", "-ffp-contract=fast"],
        py_limited_api=True,
        optional=True,
    )
    for name in ("_separable", "_separable_avx512")
]
x86 = platform.machine() in ("x86_64", "AMD64")

setup(
    cmdclass={"sdist": SdistWithoutDependencies},
    ext_modules=[RESAMPLING, *SEPARABLE] if x86 else [],
)
