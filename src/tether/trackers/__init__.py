"""Experiment trackers: what a run records, shown in TensorBoard, W&B, Trackio or MLflow. None can stop a run."""
