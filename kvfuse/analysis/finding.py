"""The result of an analysis: figures, two sentences that say them in words, and a picture."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfuse.support.files import write_file
from kvfuse.support.plots import Figure, save


@dataclass(frozen=True)
class Finding:
    """What ``run(study, **options)`` of every analysis returns.

    Attributes:
        figures: All measurements, as plain JSON.
        reading: Two sentences that say them in words.
        draw: Draws the picture; None where there is none.
    """

    figures: dict[str, Any]
    reading: str
    draw: Callable[[], Figure] | None = None

    def save(self, folder: str | Path, name: str) -> list[Path]:
        """Write ``name.json``, ``name.png`` and ``name.svg`` into a folder, each whole or not at all.

        Returns:
            The paths of the files.
        """
        files = [Path(folder, f"{name}.{kind}") for kind in ("json", "png", "svg")[: 3 if self.draw else 1]]
        # figures must be finite: NaN is not JSON
        content = {"analysis": name, "reading": self.reading, **self.figures}
        write_file(files[0], json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        if self.draw:
            figure = self.draw()
            for file in files[1:]:
                save(figure, file)
        return files
