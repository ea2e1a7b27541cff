"""What trains: loop, optimiser, average, checkpoints, draws. It knows tensors and modules, no stage and no data set."""
