"""INT8 for the CPU: ``from quantization import load_int8``.

Python finds it in the repository's root, with PYTHONPATH=/path/to/repository from anywhere, or
after ``pip install .``.
"""


def __getattr__(name: str) -> object:
    """Hand on ``load_int8`` late: torch takes seconds to import, and ``--help`` needs none."""
    if name == "load_int8":
        from quantization.files.artifact import load_int8

        return load_int8
    raise AttributeError(name)
