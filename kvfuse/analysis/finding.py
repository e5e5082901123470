"""What an analysis is: a function ``run(study, **options)`` that gives a finding: figures, a reading of them, and a picture."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvfuse.support.files import write_file
from kvfuse.support.plots import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Finding:
    """What an analysis found.

    Attributes:
        figures: Everything that was measured, as plain JSON.
        reading: Two sentences that say it in words.
        draw: Makes the picture; None: there is nothing to draw.
    """

    figures: dict[str, Any]
    reading: str
    draw: "Callable[[], Figure] | None" = None

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write ``name.json``, ``name.png`` and ``name.svg`` into a folder, each whole or not at all.

        Returns:
            The files.
        """
        files = [Path(folder, f"{name}.{kind}") for kind in (("json", "png", "svg") if self.draw else ("json",))]
        told = {"analysis": name, "reading": self.reading, **self.figures}
        write_file(files[0], json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if self.draw:
            picture = self.draw()
            for file in files[1:]:
                save(picture, file)
        return files
