"""Small training runs: a recipe for the two saved tiny models, and how to start processes."""

import json
import os
import sys
from pathlib import Path

IN_TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # of processes in any folder: this checkout


def write_recipe(folder: Path, models: Path, responses: list[str], **sections) -> Path:
    """Write ``chats.jsonl``, one question per response, and ``recipe.yaml``, whose ``output`` is ``out`` in the folder.

    A section given takes the place of the default one; keys of ``data`` are added to its path.
    """
    rows = [{"prompt": f"What is {i}?", "response": response} for i, response in enumerate(responses)]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "receiver": str(models / "receiver"),
        "sharer": str(models / "sharer"),
        "output": str(folder / "out"),
        "fuser": {"hidden_dim": 8, "intermediate_dim": 8},
        **sections,
        "data": {"path": str(folder / "chats.jsonl"), "validation_share": 0.2, **sections.get("data", {})},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"
