"""``python -m kvfuse.evaluation ...``: lm-evaluation-harness's command line with kvfuse's model and tasks registered.

For example ``--model kvfuse --model_args method=receiver,receiver=Qwen/Qwen3-0.6B --tasks openbookqa_generate
--apply_chat_template --metadata data_dir=DIR``.
"""

import sys

from lm_eval.__main__ import cli_evaluate

import kvfuse.evaluation.harness.adapter  # noqa: F401  registers the model: the harness knows imported ones only
from kvfuse.evaluation.tasks.load import FOLDER

if __name__ == "__main__":
    if not any(word.startswith("--include_path") for word in sys.argv):
        sys.argv += ["--include_path", str(FOLDER)]
    cli_evaluate()
