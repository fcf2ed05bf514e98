"""Tasks: what a model is asked to do. Each owns its data, its metrics and its answers; commands ask the task and nothing else.

task = find_task("segment:kind=semantic")
data = task.open("scenes", image_size=64)
model = vitarium.load("model.safetensors")
task_of(model).match(model, data)
"""

from vitarium.training.tasks.base import Metric, TableData, Task
from vitarium.training.tasks.of_model import task_of
from vitarium.training.tasks.registry import find_task, list_tasks, parse_task, task

__all__ = ["Metric", "TableData", "Task", "find_task", "list_tasks", "parse_task", "task", "task_of"]
