"""The paper's benchmarks as tasks of lm-evaluation-harness: its YAML, with prompts in our own words."""

from kvfuse.evaluation.tasks.load import load_task, task_manager, task_names

__all__ = ["load_task", "task_manager", "task_names"]
