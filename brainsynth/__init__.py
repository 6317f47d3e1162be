"""brainsynth: synthetic 3D brain MRI at scale.

`open_dataset` reads what the jobs make and needs only zarr and NumPy. See README.md for the jobs.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["open_dataset"]

if TYPE_CHECKING:
    from brainsynth.storage.reader import open_dataset


def __getattr__(name: str) -> Any:
    if name == "open_dataset":
        from brainsynth.storage.reader import open_dataset

        return open_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
