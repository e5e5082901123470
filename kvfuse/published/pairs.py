"""The eight published pairs and the figures known of each, with sources (``pairs.yaml``)."""

from dataclasses import dataclass
from importlib.resources import files

import yaml

REPOSITORY = "nics-efc/C2C_Fuser"


@dataclass(frozen=True)
class PublishedPair:
    """One folder of the authors' repository.

    Attributes:
        folder: Its name there.
        receiver: Hub id of the receiver.
        sharer: Hub id of the sharer.
        parameters: Number of parameters of the fuser, computed from the shapes of both caches.
        aligned: Tokens are re-encoded for the sharer; the folder's own ``config.json`` decides when it is loaded.
        authors: Figures that the authors print, with where.
        others: Figures that third parties measured, with who.
    """

    folder: str
    receiver: str
    sharer: str
    parameters: int
    aligned: bool
    authors: str
    others: str = "nothing known"

    def __str__(self) -> str:
        size = f"{self.parameters:,} parameters, {2 * self.parameters / 1e6:,.0f} MB"
        tokens = "tokens re-encoded for the sharer" if self.aligned else "the sharer reads the receiver's tokens"
        models = f"{self.sharer} -> {self.receiver}; {size}; {tokens}"
        return f"\n{self.folder}\n  {models}\n  authors: {self.authors}\n  others:  {self.others}"


_TABLE = files("kvfuse.published").joinpath("pairs.yaml").read_text(encoding="utf-8")
PUBLISHED_PAIRS = tuple(PublishedPair(**pair) for pair in yaml.safe_load(_TABLE))
