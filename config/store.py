"""`store`: where features are kept and how."""

from typing import Literal

from pydantic import Field

from epalm.config.section import Positive, Section


class StoreConfig(Section):
    """Where features are kept and how."""

    root: str = Field("features", description="folder that holds the feature sets")
    backend: str = Field("zarr", description="a backend of store/: zarr or hdf5")
    dtype: Literal["float16", "float32"] = Field(
        "float16",
        description="stored number format; a shard whose values float16 cannot hold is stored as "
        "float32",
    )
    shard_rows: Positive = Field(512, description="media per shard")
    placement: Literal["auto", "device", "ram", "disk"] = Field(
        "auto",
        description="where features are while training: on the GPU, in memory, or on "
        "disk, mapped; auto: the first of these that has room, the smallest source first",
    )
