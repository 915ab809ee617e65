"""What a model is trained for: `sgfx.training.tasks.task.Task` says what a task is; one file each."""
