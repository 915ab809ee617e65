"""Training: the trainer, its schedules and history, a dense model as the teacher."""
