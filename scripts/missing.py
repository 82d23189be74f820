"""Prints the requirements of setup.py, extras included, that this interpreter lacks, one a line.

Usage: python -m scripts.missing, in the root of the repository.
"""

from importlib.metadata import PackageNotFoundError, version

from setup import DEVELOPMENT, EXPERIMENTS, OPTIMIZER


def missing(requirements: list[str]) -> list[str]:
    """Those of `requirements` that no installed distribution satisfies."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # the interpreter is bare; pip brings a copy of its own
        from pip._vendor.packaging.requirements import Requirement

    def satisfied(requirement: Requirement) -> bool:
        try:
            return requirement.specifier.contains(version(requirement.name), prereleases=True)
        except PackageNotFoundError:
            return False

    return [text for text in requirements if not satisfied(Requirement(text))]


if __name__ == "__main__":
    print("\n".join(missing([*OPTIMIZER, *EXPERIMENTS, *DEVELOPMENT])))
