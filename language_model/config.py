"""The settings of a language model's run. Without torch: commands that only read configs start fast."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from engine.config import RunConfig, Strict


class DataConfig(Strict):
    name: Literal["prepared", "pydoc_topics"]  # what language_model.prepare wrote, or Python's own topics
    root: str = "data/one_billion_words"  # of prepared
    validation: float = Field(0.0, ge=0, lt=1)  # share of training sentences held out and evaluated


class ModelConfig(Strict):
    """The defaults are the published sizes."""

    name: Literal["lstm", "gru", "rnn"]  # rnn: with tanh
    cutoffs: list[PositiveInt]  # ids where clusters of the adaptive softmax start
    embedding: PositiveInt = 300
    hidden: PositiveInt = 2048
    layers: PositiveInt = 2
    dropout: float = Field(0.1, ge=0, lt=1)  # of the embeddings and of each layer's output
    div_value: float = Field(4.0, ge=1)  # cluster i has vectors of hidden / div_value**i dimensions


class TransformerConfig(Strict):
    name: Literal["transformer"]
    cutoffs: list[PositiveInt]
    width: PositiveInt = 512
    inner_width: PositiveInt = 2048  # of the feed-forward parts
    layers: PositiveInt = 6
    heads: PositiveInt = 8
    dropout: float = Field(0.1, ge=0, lt=1)  # of the word vectors and of each part's output
    div_value: float = Field(4.0, ge=1)  # cluster i has vectors of width / div_value**i dimensions

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "TransformerConfig":
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of heads, not {self.width} and {self.heads}")
        return self


class Config(RunConfig):
    epochs: PositiveInt
    data: DataConfig
    model: Annotated[ModelConfig | TransformerConfig, Field(discriminator="name")]
    sequence_length: PositiveInt = 20  # tokens of a row in an update: a Transformer's window
    gradient_clip: PositiveFloat | None = None  # of the norm of all gradients together
    eval_rows: PositiveInt = 32  # that the test text is cut into
