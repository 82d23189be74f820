"""The settings of an image classifier's run. Without torch: commands that only read configs start fast."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from engine.config import RunConfig, Strict

IMAGENET_ALONE = ("size", "resize", "decoder", "on_damaged", "workers")


class DataConfig(Strict):
    name: Literal["cifar10", "cifar100", "folder", "digits", "imagenet"]
    root: str = "data"
    validation: float = Field(0.0, ge=0, lt=1)  # share of the training images held out
    mean: list[float] | None = None  # per channel, of images in 0..1; default: the data set's own
    std: list[float] | None = None
    # imagenet alone: see ImageNetData
    size: PositiveInt | None = None
    resize: PositiveInt | None = None
    decoder: Literal["exact", "fast"] | None = None
    on_damaged: Literal["error", "skip"] | None = None
    workers: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _imagenet_alone(self) -> "DataConfig":
        for key in IMAGENET_ALONE:
            if self.name != "imagenet" and getattr(self, key) is not None:
                raise ValueError(f"data.{key} is a setting of data.name=imagenet alone")
        return self


class ModelConfig(Strict):
    name: str  # of models.MODELS
    depth: PositiveInt | None = None


class Config(RunConfig):
    DIFFERENTIABLE_TWICE = True

    epochs: PositiveInt
    data: DataConfig
    model: ModelConfig
    channels_last: bool = True
    graph: bool | None = None  # updates in CUDA graphs; default: wherever they can be (cuda_graph.py)
    batchnorm_group: PositiveInt | None = None  # images behind one BatchNorm statistic; default: those of a pass
    bn_update_batches: PositiveInt | None = None  # behind renewed BatchNorm statistics; default: 50
    eval_batch: PositiveInt = 1000  # per rank

    @model_validator(mode="after")
    def _whole_groups(self) -> "Config":
        if self.batchnorm_group and self.batch % self.batchnorm_group:
            raise ValueError(f"batchnorm_group={self.batchnorm_group} does not divide batch={self.batch}")
        return self
