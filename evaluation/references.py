"""Published figures of OpenAI's GPT-2, each with its source: the lines in our plots and tables."""

from dataclasses import dataclass
from typing import Literal

Size = Literal["124M", "355M", "774M", "1.5B"]


@dataclass(frozen=True)
class Reference:
    """One published figure.

    Attributes:
        metric: what was measured, protocol included.
        size: which GPT-2.
        value: a fraction for accuracies, nats per token for losses.
        source: where it stands.
    """

    metric: str
    size: Size
    value: float
    source: str


# Losses depend on the corpus and on the tokenizer; each of these holds for one corpus in GPT-2's tokens only.
VALIDATION_LOSS: dict[str, tuple[Reference, ...]] = {
    "fineweb-edu": (Reference("FineWeb-Edu validation loss", "124M", 3.2924, "build-nanogpt, play.ipynb"),),
}
