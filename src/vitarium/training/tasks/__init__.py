"""Tasks, such as classification or segmentation. A task defines its data, its metrics and the format of its answers; commands use only this
interface.

task = find_task("segment:kind=semantic")
data = task.open("scenes", image_size=64)
model = vitarium.load("model.safetensors")
task_of(model).match(model, data)
"""

from vitarium.training.tasks.base import ConfusionData, GalleryData, GalleryImage, Metric, ReportSection, TableData, Task
from vitarium.training.tasks.of_model import task_of
from vitarium.training.tasks.registry import find_task, list_tasks, parse_task, task

__all__ = [
    "ConfusionData",
    "GalleryData",
    "GalleryImage",
    "Metric",
    "ReportSection",
    "TableData",
    "Task",
    "find_task",
    "list_tasks",
    "parse_task",
    "task",
    "task_of",
]
