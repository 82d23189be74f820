"""The settings of a translation run. Without torch: commands that only read configs start fast."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from engine.config import AverageConfig, RunConfig, Strict


class DataConfig(Strict):
    name: str  # of the recipe that prepared the data
    root: str


class ModelConfig(Strict):
    """The defaults are Transformer-base: 44,138,496 parameters, and 512 for each word of the vocabulary."""

    name: Literal["transformer"] = "transformer"
    width: PositiveInt = 512
    inner_width: PositiveInt = 2048  # of the feed-forward sublayers
    heads: PositiveInt = 8
    encoder_layers: PositiveInt = 6
    decoder_layers: PositiveInt = 6
    norm: Literal["post", "pre"] = "post"
    dropout: float = Field(0.1, ge=0, lt=1)  # of embeddings and sublayers' outputs
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    activation_dropout: float = Field(0.1, ge=0, lt=1)  # after the feed-forward sublayers' ReLU

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width must be even and divisible by heads, not {self.width} and {self.heads}")
        return self


class DecodingConfig(Strict):
    beam: PositiveInt = 5
    length_penalty: NonNegativeFloat = 0.6


class Config(RunConfig):
    updates: PositiveInt
    data: DataConfig
    model: ModelConfig = ModelConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    gradient_clip: PositiveFloat = 1.0  # greatest norm of all gradients together
    validate_every: PositiveInt  # updates
    average: AverageConfig
    decoding: DecodingConfig = DecodingConfig()
    eval_batch: PositiveInt = 4096  # tokens per rank, in validation and in decoding
