"""pinfer: sparse LLM inference. Hot neurons on the GPU, cold ones on the CPU, the rest skipped."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pinfer")
    except PackageNotFoundError:  # run from a tree that is not installed
        return "0+unknown"
